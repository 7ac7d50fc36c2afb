"""Pretrained models and data sets that packages ship, or any of the Hub, behind one function each."""
