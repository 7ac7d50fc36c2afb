"""What a knockout needs to know of a model: its layers, its masks, where a prompt begins, and whose call it is."""
