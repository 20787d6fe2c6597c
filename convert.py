"""Convert a checkpoint with the options of Megatron's ``tools/checkpoint/convert.py``."""

from __future__ import annotations

if __name__ == "__main__":
    from ckptx.cli.main import convert

    convert()
