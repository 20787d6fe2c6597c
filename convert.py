"""Convert a checkpoint with the options of Megatron's ``tools/checkpoint/convert.py``."""

from __future__ import annotations

if __name__ == "__main__":
    from ckptx.__main__ import convert

    convert()
