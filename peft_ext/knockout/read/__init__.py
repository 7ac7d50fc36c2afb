"""Read-outs of a model: answers by layer, attention by modality, norms, changed meanings."""
