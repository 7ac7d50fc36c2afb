"""Which layers are adapted, and what their entries are scored by."""
