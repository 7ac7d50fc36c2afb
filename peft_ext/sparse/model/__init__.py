"""A model with sparse adapters: putting them in, merging, saving, combining, swapping."""
