"""Selection of the trained entries: a criterion ranks them within a scope (a neuron, a layer or the network)."""
