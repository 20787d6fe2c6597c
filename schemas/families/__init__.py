"""The model families: names, config and limits of each."""
