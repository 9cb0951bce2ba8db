"""A run's teacher as a server, or as stored logits."""
