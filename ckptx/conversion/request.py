"""A job: what the user asked for, as plain values that travel to both processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ckptx.protocol.context import Context

QUEUE_SIZE = 50
"""Messages that may wait between the two processes unless another number is asked for."""


@dataclass(frozen=True, slots=True)
class Edits:
    """What ``modify`` changes. Patterns match names in the source.

    Edits are applied in this order: remove, cast, rename.
    """

    remove: tuple[str, ...] = ()
    """Globs."""
    cast: tuple[tuple[str, str], ...] = ()
    """Globs with dtypes; the last that matches a name counts. Globs leave integers as they are."""
    rename: tuple[tuple[str, str], ...] = ()
    """Names with ``*`` for any text, which a ``*`` of the new name stands for, in order."""

    def __bool__(self) -> bool:
        """Return whether there is anything to do."""
        return bool(self.remove or self.cast or self.rename)


@dataclass(frozen=True, slots=True)
class Other:
    """A checkpoint that the mean is of, besides the first, and how it is read."""

    path: Path
    loader: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Mean:
    """What ``average`` makes of the source: its mean with others."""

    others: tuple[Other, ...]
    weights: tuple[float, ...] = ()
    """Of the source and each of the others; empty where all weigh the same."""


@dataclass(frozen=True, slots=True)
class ConversionRequest:
    """One conversion. Sizes are in bytes."""

    loader: str
    saver: str
    source: Path
    target: Path
    loader_options: Mapping[str, Any] = field(default_factory=dict)
    """The loader's own options, by their click names."""
    saver_options: Mapping[str, Any] = field(default_factory=dict)
    dtypes: tuple[tuple[str, str], ...] = ()
    """Globs of names with the dtypes of their tensors, the last that matches counts; an empty one
    is for all that have none of their own."""
    hf_base: Path | None = None
    fill_from_base: tuple[str, ...] = ()
    overwrite: bool | Literal["foreign"] = False
    """Whether an existing target is replaced, if ckptx wrote all of it; or whoever wrote it."""
    earlier: tuple[str, ...] | None = None
    """Of a step of a run the steps before it: a pointer to one of them moves on to this one."""
    max_memory: int = 512 << 20
    """The memory of the whole conversion, all processes together."""
    threads: int = 0
    """0 lets the writer choose."""
    digest: str = "xxh3_128"
    check_replicas: str = "sample"
    resume: bool = True
    """Whether to continue what an interrupted run has left, and to leave it if interrupted."""
    lock: bool = True
    """Whether the target is locked while it is written."""
    journal_every: int = 256 << 20
    """Bytes of output between two points from which an interrupted run is continued."""
    max_queue_size: int = QUEUE_SIZE
    """Messages that may wait between the two processes."""
    model_type: str = "GPT"
    checking: bool = True
    """Whether Megatron-style modules must send messages in protocol order."""
    megatron_path: str | None = None
    edits: Edits | None = None
    """What ``modify`` changes on the way."""
    mean: Mean | None = None
    """What ``average`` takes the mean with."""

    def __post_init__(self) -> None:
        if self.edits is not None:  # what is edited is as loadable as it was
            object.__setattr__(self, "saver_options", {**self.saver_options, "no_config": True})
        # Absolute from here on: a plugin may change the working directory.
        for name in ("source", "target"):
            object.__setattr__(self, name, Path(os.path.abspath(getattr(self, name))))  # noqa: PTH100 - keeps symlinks

    @property
    def dtype(self) -> str | None:
        """The dtype of all tensors that have none of their own; None leaves them as stored."""
        return next((dtype for glob, dtype in reversed(self.dtypes) if not glob), None)

    @property
    def parts(self) -> tuple[tuple[str, str], ...]:
        """The globs of tensors that have a dtype of their own, with it."""
        return tuple(one for one in self.dtypes if one[0])

    @property
    def inputs(self) -> list[Path]:
        """The places that are read, of which the target replaces nothing."""
        adapters = map(Path, self.loader_options.get("adapter") or ())
        others = [one.path for one in self.mean.others] if self.mean else []
        return [self.source, *others, *([self.hf_base] if self.hf_base else []), *adapters]

    def context(self) -> Context:
        """Return the context that the loader and the saver get."""
        return Context(
            dtype=self.dtype,
            hf_base=self.hf_base,
            fill_from_base=self.fill_from_base,
            target=self.target,
            model_type=self.model_type,
            checking=self.checking,
        )
