"""Kernels of m2mkd_ds: each has a naive version that defines correctness. Depends on torch alone, never on m2mkd_ds."""
