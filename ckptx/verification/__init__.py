"""Two checkpoints compared, and why they differ."""
