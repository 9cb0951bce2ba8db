"""A trained V-MoE as a Hugging Face folder: written, checked, read back, pushed."""
