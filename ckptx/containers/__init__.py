"""Containers: bytes on disk and the extents of the tensors in them."""
