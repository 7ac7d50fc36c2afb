"""Tiny parts of many families, to compose models of."""
