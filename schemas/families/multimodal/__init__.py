"""Models of several parts, and those that lie in several files."""
