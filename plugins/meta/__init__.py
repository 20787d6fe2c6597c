"""Meta's own files."""
