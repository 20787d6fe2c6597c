"""ckptx: convert large-language-model checkpoints from any layout to any other, proved before a byte moves."""

__version__ = "0.1.0"
