"""Gradient of a group's bias: sums of a group's rows."""
