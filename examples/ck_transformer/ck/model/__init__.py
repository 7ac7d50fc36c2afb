"""CK-Transformer and fact search as models of transformers."""
