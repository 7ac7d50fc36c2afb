"""Training, testing, comparing."""
