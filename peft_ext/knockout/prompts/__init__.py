"""From a question about an image to a prompt whose tokens are known by what they stand for."""
