"""Checkpoints of the m2mKD authors and of Deep Incubation."""
