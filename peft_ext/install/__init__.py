"""Wrappers around PEFT's and transformers' saving and loading: an adapter loads whole or not at all."""
