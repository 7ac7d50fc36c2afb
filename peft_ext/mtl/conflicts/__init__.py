"""Gradient conflicts: the record of a training, and its figures."""
