"""What a loader and a saver are: the contract of every plugin, ours included.

A loader and a saver know neither queues nor processes. A loader yields messages; a saver consumes
them and answers with a plan. So both are testable in one process:
``saver.plan(loader.load(path, {}), {})``.

The ``options`` of `Loader.load` and `Saver.plan` hold the plugin's own options by their click
names, and those of the engine:

    dtype           dtype to convert to, or None; the engine casts what travels between the two
    hf_base         directory of a Hugging Face model: config and tokenizer source, or None
    fill_from_base  patterns of tensor names that may be filled from ``hf_base``
    saver           the name of the saver; one that wants adapters only is given nothing else
    target          the path the user named, or None; for the names of single files
    spool           loaders only: a `ckptx.spool.Spool` for tensors that exist in memory only
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import click

    from ckptx.plan import SavePlan
    from ckptx.protocol import Message


@runtime_checkable
class Loader(Protocol):
    """Reads one format."""

    name: str
    """What follows ``--loader``: ``"hf"``."""
    capabilities: Mapping[str, Any]
    """Plain data for ``ckptx plugins``: ``{"formats": [...], "lossless": True, ...}``."""

    def options(self) -> list[click.Option]:
        """Return the options that the loader adds to the command line."""
        ...

    def detect(self, source: Path) -> bool:
        """Return whether ``source`` is this format; reads a few bytes, imports nothing heavy."""
        ...

    def load(self, source: Path, options: Mapping[str, Any]) -> Iterator[Message]:
        """Yield one `Begin`, the `Tensors` in protocol order, and one `End`."""
        ...


@runtime_checkable
class Saver(Protocol):
    """Writes one format."""

    name: str
    """What follows ``--saver``: ``"core"``."""
    capabilities: Mapping[str, Any]
    """Plain data for ``ckptx plugins``."""

    def options(self) -> list[click.Option]:
        """Return the options that the saver adds to the command line."""
        ...

    def plan(self, messages: Iterator[Message], options: Mapping[str, Any]) -> SavePlan:
        """Return what the target will hold; reads the messages up to and including `End`."""
        ...


@dataclass(frozen=True, slots=True)
class SideFile:
    """A state dict that a plugin wants in a file of its own, as ``torch.save`` writes it."""

    path: str
    """Below the model's directory: ``"proprio_projector--0_checkpoint.pt"``."""
    tensors: Mapping[str, str]
    """The name of a tensor of the model by the name that it has in the file."""
    keep: bool = False
    """Whether the weights of the model hold these tensors, too."""
