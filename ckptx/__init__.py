"""Convert checkpoints of large language models, proved before a byte moves."""

__version__ = "0.1.0"
