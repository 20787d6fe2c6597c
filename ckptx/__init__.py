"""Convert checkpoints of large language models, proved before a byte moves."""

from ckptx.version import __version__ as __version__
