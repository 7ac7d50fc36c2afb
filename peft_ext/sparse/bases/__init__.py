"""Base layers seen as neurons, also quantised, sharded, offloaded, shared or inside an attention."""
