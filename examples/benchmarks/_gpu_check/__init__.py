"""The stages of `gpu_check.py` beside this folder; each goes on after a failure and writes what it has at once."""
