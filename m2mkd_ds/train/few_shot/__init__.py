"""Few-shot episodes over the models of a run."""
