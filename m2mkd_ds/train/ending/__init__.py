"""How a run ends: stopped on request, failed with its cause, or hung."""
