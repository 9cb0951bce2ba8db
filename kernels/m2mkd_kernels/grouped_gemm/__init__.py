"""Grouped matrix multiply with bias and activation: rows sorted by group, one weight matrix a group."""
