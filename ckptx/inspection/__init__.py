"""What a checkpoint holds, and whether it is healthy."""
