"""What is knocked out: attention edges between groups of tokens, or what a module adds."""
