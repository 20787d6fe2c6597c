"""Whether a directory has a tokenizer: looked at before a framework is started for it."""

from __future__ import annotations

from pathlib import Path

_NAMES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def holds_tokenizer(directory: Path) -> bool:
    """Return whether a tokenizer of any kind that transformers reads lies in a directory."""
    found = any((directory / name).is_file() for name in _NAMES)
    return found or any(directory.glob("*.tiktoken"))
