"""Evaluate adapters with libraries that others use too: lm_eval and evaluate."""
