"""Sparse adapters of PEFT's own methods, SHiRA and Super-Tuning, as adapters of ours."""

from .convert import convert


__all__ = ["convert"]
