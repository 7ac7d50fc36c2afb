"""Selected entries, in numbers and as a figure."""
