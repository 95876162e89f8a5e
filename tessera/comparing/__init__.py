"""Several models or trainings side by side: at equal time, with the same seeds, in one table."""
