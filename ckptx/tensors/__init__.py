"""Lazy tensors: references to bytes and what is done to them; no I/O."""
