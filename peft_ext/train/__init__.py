"""Training runs from a file: any PEFT method with TRL's trainers."""
