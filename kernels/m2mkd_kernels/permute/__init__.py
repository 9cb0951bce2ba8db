"""Tokens to rows, and the gradient of rows back to tokens."""
