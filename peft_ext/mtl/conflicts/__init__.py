"""How often tasks' gradients conflict: the record of a training, and its figures."""
