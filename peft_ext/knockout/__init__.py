"""Looking inside models: where attention goes, and what depends on it."""
