"""Parts of `examples/quickstart.py`: data, methods, search, measurements and report."""
