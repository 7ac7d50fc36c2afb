"""What a model shows without being cut: answers by layer, attention by modality, norms, changed meanings."""
