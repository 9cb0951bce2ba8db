"""Imported by the server that loader workers are forked from, and by nobody else: what a worker needs."""

import os

# Before numpy is imported: the server must have no threads, and a worker computes with one.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import m2mkd_ds.data.batches  # noqa: F401
