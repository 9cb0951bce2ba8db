"""Rows back to tokens: a weighted sum in fp32, one order, one pass."""
