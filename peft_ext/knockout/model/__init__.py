"""A model as knockouts see it: its layers, its masks, the beginning of a prompt, and the calling thread."""
