"""What was selected, in numbers and as a figure."""
