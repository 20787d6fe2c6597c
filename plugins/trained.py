"""What the plugins for checkpoints of training frameworks share: a model's names and small files.

Source of the prefixes: torch:torch/distributed/{fsdp,algorithms/_checkpoint}, torch/_dynamo @
v2.13.0; of the folders: huggingface/accelerate src/accelerate/utils/fsdp_utils.py @ v1.15.0,
volcengine/verl verl/utils/checkpoint/fsdp_checkpoint_manager.py @ 01ee5e0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from ckptx.errors import FormatError, listing
from ckptx.lazy import LazyTensor
from ckptx.model_directory import CONFIG, sidecars

T = TypeVar("T", bound=LazyTensor)

WEIGHTS_ONLY = "only weights are converted"
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "module.")
"""What FSDP 1, activation checkpointing, torch.compile and DDP put into names."""
_BESIDE = ("huggingface", "hf_config", "tokenizer")


def unwrapped(tensors: Mapping[str, T], source: Path) -> dict[str, T]:
    """Return the tensors under the names that they have without wrappers.

    Raises:
        FormatError: two tensors have one name then.
    """
    found: dict[str, T] = {}
    for name, tensor in tensors.items():
        plain = name
        for word in WRAPPERS:
            plain = plain.replace(f".{word}", ".").removeprefix(word)
        if plain in found:
            raise FormatError(f"{source}: {name!r} and another tensor are both {plain!r}")
        found[plain] = tensor
    return found


def strip_option() -> click.Option:
    """Return ``--strip-prefix``, which loaders declare alike."""
    return click.Option(
        ["--strip-prefix"],
        multiple=True,
        metavar="PREFIX",
        help="Take this from the start of names, as 'actor.'. Repeatable; what FSDP, DDP, "
        "activation checkpointing and torch.compile add is taken anyway.",
    )


def plain_names(
    tensors: Mapping[str, T], options: Mapping[str, Any], source: Path
) -> tuple[dict[str, T], tuple[str, ...]]:
    """Return the tensors without the prefixes of ``--strip-prefix`` and of wrappers, and remarks.

    Raises:
        FormatError: a prefix is that of no name, or two tensors have one name then.
    """
    notes: list[str] = []
    named = dict(tensors)
    for prefix in options.get("strip_prefix") or ():
        count = sum(name.startswith(prefix) for name in named)
        if not count:
            raise FormatError(
                f"{source}: no name starts with --strip-prefix {prefix!r}; names are as "
                f"{listing(named, 2)}"
            )
        others = {name for name in named if not name.startswith(prefix)}
        clash = sorted(
            name for name in named if name not in others and name[len(prefix) :] in others
        )
        if clash:
            raise FormatError(
                f"{source}: {clash[0]!r} without --strip-prefix is the name of another tensor"
            )
        named = {name.removeprefix(prefix): tensor for name, tensor in named.items()}
        notes.append(f"{prefix!r} was taken from the start of {count} of {len(named)} names")
    plain = unwrapped(named, source)
    found = [
        word
        for word in WRAPPERS
        if any(name.startswith(word) or f".{word}" in name for name in named)
    ]
    if plain.keys() != named.keys():
        notes.append(f"names of wrappers were taken out: {', '.join(found)}")
    return plain, tuple(notes)


def beside(source: Path) -> dict[str, bytes]:
    """Return the sidecars of the nearest directory that has a config: here, or above."""
    for directory in (source, *list(source.absolute().parents)[:2]):
        for place in (directory, *(directory / name for name in _BESIDE)):
            if (place / CONFIG).is_file():
                return sidecars(place)
    return {}


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files below a directory."""
    files = [path] if path.is_file() else (one for one in path.rglob("*") if one.is_file())
    return sum(file.stat().st_size for file in files)
