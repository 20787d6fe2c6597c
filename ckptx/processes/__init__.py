"""Child processes, signals and ranks."""
