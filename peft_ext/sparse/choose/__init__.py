"""Choice of the layers to adapt, and scores of their entries."""
