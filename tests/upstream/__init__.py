"""Runs PEFT's own tests, downloaded from PyPI, against the configs of this package. Start at `run.py`."""
