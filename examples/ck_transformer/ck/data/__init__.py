"""Samples, and the loaders of public layouts."""
