"""Comparisons of peft_ext with the papers' published code, one file per subject."""
