"""Three multi-task problems that are computed, not downloaded."""
