"""Knockouts over the layers of a model and the samples of a data set, computed once where passes agree."""
