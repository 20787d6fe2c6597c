"""What modules around a model, or around its parts, have put into the names of its tensors.

Source: torch:torch/distributed/{fsdp,algorithms/_checkpoint}, torch/_dynamo @ v2.13.0,
Lightning-AI/pytorch-lightning src/lightning/{fabric,pytorch}/strategies @ 2.5.5
(``_forward_module``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

import click

from ckptx.errors import FormatError, listing
from ckptx.protocol.context import Options
from ckptx.storage.location import Location
from ckptx.tensors.lazy import LazyTensor

T = TypeVar("T", bound=LazyTensor)

INSIDE = ("_forward_module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""What Lightning, FSDP 1, activation checkpointing and torch.compile put into names."""
WRAPPERS = (*INSIDE, "module.")
"""And DDP, whose name models have for parts of their own, too."""


def unwrapped(name: str, inside: Collection[str] = WRAPPERS) -> str:
    """Return a name without wrappers: any at its start, and those of ``inside`` anywhere.

    Examples:
        >>> unwrapped("_orig_mod.module.model.layers.0._checkpoint_wrapped_module.mlp.weight")
        'model.layers.0.mlp.weight'
    """
    while outer := next((word for word in WRAPPERS if name.startswith(word)), None):
        name = name.removeprefix(outer)
    for word in inside:
        while f".{word}" in name:
            name = name.replace(f".{word}", ".")
    return name


def strip_wrappers(
    tensors: Mapping[str, T], source: Location, inside: Collection[str] = WRAPPERS
) -> tuple[dict[str, T], tuple[str, ...]]:
    """Return the tensors under the names that they have without wrappers, and a remark if any had.

    Raises:
        FormatError: two tensors have one name then.
    """
    found: dict[str, T] = {}
    for name, tensor in tensors.items():
        plain = unwrapped(name, inside)
        if plain in found:
            raise FormatError(f"{source}: {name!r} and another tensor are both {plain!r}")
        found[plain] = tensor
    if found.keys() == tensors.keys():
        return found, ()
    words = [
        word
        for word in WRAPPERS
        if any(f".{word}" in f".{name}" for name in tensors if name not in found)
    ]
    return found, (f"names of wrappers were taken out: {', '.join(words)}",)


def name_options() -> list[click.Option]:
    """Return the options for names, which loaders of Hugging Face's names declare alike."""
    ignore = "Leave the tensors of this pattern behind, as '*.my_scale'. Repeatable."
    return [
        strip_option(),
        click.Option(["--prefix"], multiple=True, hidden=True),  # as DeepSpeed's loader had it
        click.Option(["--ignore"], help=ignore, multiple=True, metavar="GLOB"),
    ]


def strip_option() -> click.Option:
    """Return ``--strip-prefix``, which loaders declare alike."""
    about = (
        "Take this from the start of names, as 'actor.'. Repeatable; what FSDP, DDP, activation "
        "checkpointing, Lightning and torch.compile add is taken anyway."
    )
    return click.Option(["--strip-prefix"], help=about, multiple=True, metavar="PREFIX")


def file_names(
    tensors: Mapping[str, T],
    options: Options,
    source: Location,
    inside: Collection[str] = WRAPPERS,
) -> tuple[dict[str, T], tuple[str, ...]]:
    """Return the tensors without the prefixes of ``--strip-prefix`` and of wrappers, and remarks.

    ``inside`` are the wrappers that are taken out of the middle of names, too.

    Raises:
        FormatError: a prefix is that of no name, or two tensors have one name then.
    """
    notes: list[str] = []
    named = dict(tensors)
    for prefix in (*(options.get("strip_prefix") or ()), *(options.get("prefix") or ())):
        if not (count := sum(name.startswith(prefix) for name in named)):
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
    plain, remarks = strip_wrappers(named, source, inside)
    return plain, (*notes, *remarks)
