"""Format plugins: one module per loader and saver."""
