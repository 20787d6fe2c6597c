"""What a loader and a saver are: the contract of every plugin, ours included.

A loader and a saver know neither queues nor processes. A loader yields messages; a saver consumes
them and answers with a plan. So both are testable in one process:
``saver.plan(loader.load(path, {}), {})``.

``options`` are the plugin's own by their click names; what the engine says is in the `Context`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ckptx.protocol.context import UNTOLD, Context, Options
from ckptx.protocol.messages import Dropped, Messages
from ckptx.storage.file_plan import FilePlan
from ckptx.storage.location import Location

if TYPE_CHECKING:
    import click


@runtime_checkable
class Loader(Protocol):
    """Reads one format."""

    name: str
    """What follows ``--loader``: ``"hf"``."""
    # One that no `Format` declares has `capabilities`, plain data for ``ckptx plugins``.

    def options(self) -> list[click.Option]:
        """Return the options that the loader adds to the command line."""

    def detect(self, source: Location) -> bool:
        """Return whether ``source`` is this format; reads a few bytes, imports nothing heavy."""

    def load(self, source: Location, options: Options, context: Context = UNTOLD) -> Messages:
        """Yield one `Begin`, the `Tensors` in protocol order, and one `End`."""


@runtime_checkable
class Saver(Protocol):
    """Writes one format."""

    # A saver of adapters alone has `wants` set to `ADAPTERS`; others are given weights.
    name: str
    """What follows ``--saver``: ``"core"``."""

    def options(self) -> list[click.Option]:
        """Return the options that the saver adds to the command line."""

    def plan(self, messages: Messages, options: Options, context: Context = UNTOLD) -> SavePlan:
        """Return what the target will hold; reads the messages up to and including `End`."""


@dataclass(frozen=True, slots=True)
class SideFile:
    """A state dict that a plugin wants in a file of its own, as ``torch.save`` writes it."""

    path: str
    """Below the model's directory: ``"proprio_projector--0_checkpoint.pt"``."""
    tensors: Mapping[str, str]
    """The name of a tensor of the model by the name that it has in the file."""
    keep: bool = False
    """Whether the weights of the model hold these tensors, too."""


@dataclass(frozen=True, slots=True)
class SavePlan:
    """Everything a saver will write.

    ``directory`` is the atomic unit below the target that the user named: ``""`` for the target
    itself, ``"release"`` or ``"iter_0000010"`` in a Megatron root. ``pointers`` are small files
    beside it, written last (the tracker file of Megatron). A target that is one file has
    ``single_file`` set and exactly one file plan, whose path is the file's name.
    """

    files: Sequence[FilePlan]
    directory: str = ""
    pointers: Mapping[str, bytes] = field(default_factory=dict)
    single_file: bool = False
    dropped: tuple[Dropped, ...] = ()
    """What the saver leaves behind of the messages it was given: rows of padding."""
    notes: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()
    """Settings of the source that the user told the saver to ignore, for the manifest."""
    stages: Sequence[str] = ()
    """Lines that show which pipeline stage holds which layers."""
    load_hint: str = ""
    """A command or line of code that loads the result; ``{target}`` stands for its path."""
    conflict: str = ""
    """Why the result does not belong beside what lies below the target already, which the user
    can overrule by ``--overwrite``."""
    step_flag: str = ""
    """What stands for ``{step}`` in the hint where a pointer is left as it is: the flag that loads
    the result all the same, empty where there is none."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Facts for ``plan --json``: parallel sizes, padded vocabulary, ..."""
