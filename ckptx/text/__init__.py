"""Text for people, from plain values."""
