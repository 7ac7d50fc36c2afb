"""Samples of several tasks: data sets, batches, labels counted, and a loss per task."""
