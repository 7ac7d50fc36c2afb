"""Parts of `experiment.py`: which trainings there are, what they say together, and how that is shown."""
