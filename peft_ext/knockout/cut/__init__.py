"""Knockouts: of attention edges between groups of tokens, or of a module's output."""
