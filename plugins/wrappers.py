"""Names that wrappers of a model have changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ckptx.errors import FormatError
from ckptx.lazy import LazyTensor

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "module.")
"""What FSDP 1, activation checkpointing, torch.compile and DDP put into names."""


def unwrapped(tensors: Mapping[str, LazyTensor], source: Path) -> dict[str, LazyTensor]:
    """Return the tensors under the names that they have without wrappers.

    Raises:
        FormatError: two tensors would have one name.
    """
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        plain = name
        for word in WRAPPERS:
            plain = plain.replace(f".{word}", ".").removeprefix(word)
        if plain in found:
            raise FormatError(f"{source}: {name!r} and another tensor are both {plain!r}")
        found[plain] = tensor
    return found
