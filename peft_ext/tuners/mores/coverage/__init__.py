"""What a call to the model covers: which tokens of which prompt, by its arguments, its cache and generate()."""
