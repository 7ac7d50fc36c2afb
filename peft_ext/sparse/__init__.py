"""The shared core: a support, the selectors that choose it, the layer that carries it, the products with it."""
