"""The version of ckptx, which everything that imports little can ask for."""

__version__ = "0.1.0"
