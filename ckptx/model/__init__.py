"""What a model is, whatever its files: dimensions, canonical names, layouts, sharding."""
