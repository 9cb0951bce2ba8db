"""Checkpoint folders: written by all ranks, visible at once or not at all, verified, retired."""
