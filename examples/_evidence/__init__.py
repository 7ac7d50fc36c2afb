"""Parts of `evidence.py`."""
