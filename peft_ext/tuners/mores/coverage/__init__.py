"""Tokens of the prompt that a call to the model covers, by its arguments, its cache and generate()."""
