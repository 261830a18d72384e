"""Running a model with a gate in force."""
