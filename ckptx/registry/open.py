"""Open a checkpoint of any format: the only place that calls a loader.

`checkpoint_messages` is the stream that a conversion sends on as it comes; `open_checkpoint`
collects it into a `Checkpoint`, whose tensors are whole and have the names that Hugging Face has
for them where a schema knows the model, whatever the ranks hold of each.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from ckptx.errors import CkptxError, FormatError, PluginError
from ckptx.protocol.context import ANYTHING, WEIGHTS, Context, Wants, split_options
from ckptx.protocol.contracts import Loader
from ckptx.protocol.messages import Begin, End, Message, Tensors
from ckptx.protocol.model import Model, collect
from ckptx.registry import explain, registry
from ckptx.registry.detection import remembering
from ckptx.registry.families import hf_tensors
from ckptx.storage.location import Location
from ckptx.storage.open_files import Files
from ckptx.storage.spool import Spool, TemporarySpool
from ckptx.tensors.lazy import LazyTensor

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong with a checkpoint.

    ``kind`` is ``unreadable``, ``incomplete`` (tensors do not fit the model that config or args
    describe), ``unfinished`` (a conversion was killed), ``nan`` or ``inf``.
    """

    kind: str
    message: str
    tensor: str = ""


@dataclass(slots=True)
class Checkpoint:
    """A checkpoint that is open, until it is closed or its ``with`` ends.

    A checkpoint whose tensors do not fit its own config or args is open, too: its ``model`` has no
    messages then, `misfit` says why, and `tensors` are named as they are stored.
    """

    path: Location
    format: str
    """The name of the loader."""
    model: Model
    misfit: CkptxError | None = None
    """Why the tensors are not those of the model that config or args describe."""
    _spool: Spool | None = field(default=None, repr=False)
    """Where tensors are decoded to; None if it belongs to somebody else."""

    @property
    def begin(self) -> Begin:
        """What the loader says of the whole: files, parts, how it is split."""
        return self.model.begin

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What is wrong with the checkpoint, as far as its metadata tell."""
        return (Problem("incomplete", str(self.misfit)),) if self.misfit else ()

    def tensors(self, names: str = "model") -> tuple[str, Mapping[str, LazyTensor]]:
        """Return how the tensors are named, and the tensors; see `tensors_by_name`."""
        return tensors_by_name(self.model, names)

    def files(self) -> Files:
        """Return the open files that the tensors are read from; close them after use."""
        return Files(self.begin.files)

    def close(self) -> None:
        """Remove what was decoded; nothing can be read after that."""
        if self._spool is not None:
            self._spool.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@remembering()
def open_checkpoint(
    location: Location,
    format: str | Loader | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    wants: Wants = ANYTHING,
    spool: Spool | Path | None = None,
    context: Context | None = None,
) -> Checkpoint:
    """Return a checkpoint; only its metadata are read.

    Args:
        location: a file or a directory.
        format: the name of the loader, or the loader; detected unless given.
        options: the loader's own by their click names, and the engine's that concern reading.
        wants: what of it is to be loaded.
        spool: where tensors are decoded to that lie compressed; given a directory or nothing (the
            directory for temporary files), the checkpoint makes a spool of its own if need be.
        context: what else the loader is told; ``options`` are its own alone then.

    Raises:
        CkptxError: it cannot be read at all.
    """
    own = spool if isinstance(spool, Spool) else TemporarySpool(spool)
    loader = find_loader(location, format)
    misfit: CkptxError | None = None
    try:
        messages = checkpoint_messages(
            location, loader, options=options, wants=wants, spool=own, context=context
        )
        begin = next(messages)
        try:
            model = collect(chain([begin], messages))
        except PluginError:
            raise
        except CkptxError as error:
            if not isinstance(begin, Begin):
                raise
            model, misfit = Model(begin, End()), error
    except BaseException:
        if own is not spool:
            own.close()
        raise
    return Checkpoint(location, loader.name, model, misfit, None if own is spool else own)


@contextmanager
def opened(checkpoint: Checkpoint | Location) -> Iterator[Checkpoint]:
    """Return a checkpoint that is open already, or open it by its path for the while."""
    if isinstance(checkpoint, Checkpoint):
        yield checkpoint
        return
    with open_checkpoint(checkpoint) as own:
        yield own


def checkpoint_messages(
    location: Location,
    format: str | Loader | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    wants: Wants = WEIGHTS,
    spool: Spool | None = None,
    context: Context | None = None,
    megatron_path: str | None = None,
) -> Iterator[Message]:
    """Return the messages of a checkpoint as its loader sends them; see `open_checkpoint`.

    With a ``context``, ``options`` are the loader's own alone.

    Raises:
        PluginError: no loader is so named or recognises it; while they come, too: they are not
            one `Begin`, `Tensors`, and one `End`.
    """
    loader = find_loader(location, format, megatron_path)
    own, told = (options or {}, {}) if context else split_options(options)
    context = replace(context or Context(**told), wants=wants, spool=spool)
    return _advised(in_order(loader.load(location, own, context), loader.name), location, loader)


def _advised(messages: Iterator[Message], location: Location, loader: Loader) -> Iterator[Message]:
    """Yield messages; where there is none, the error says which checkpoints lie below."""
    begun = False
    try:
        for message in messages:
            begun = True
            yield message
    except FormatError as error:
        if begun or not location.is_dir() or loader.detect(location):
            raise
        if below := explain.checkpoints_below(location, loader.detect):
            raise FormatError(f"{error}; {below}") from error
        raise


def find_loader(
    location: Location, format: str | Loader | None, megatron_path: str | None = None
) -> Loader:
    """Return the loader of a checkpoint, detected unless it is given.

    Raises:
        PluginError: there is none, or not exactly one recognises the checkpoint.
    """
    if format is None or isinstance(format, str):
        return registry.loader(format or registry.detect(location), megatron_path, location)
    return format


def in_order(messages: Iterator[Message], name: str) -> Iterator[Message]:
    """Yield the messages of loader ``name`` if they are one `Begin`, `Tensors`, and one `End`."""
    last: Message | None = None
    for message in messages:
        first = last is None
        known = isinstance(message, Begin if first else (Tensors, End))
        if not known or isinstance(last, End):
            expected = (
                "nothing" if isinstance(last, End) else "Begin" if first else "Tensors or End"
            )
            raise PluginError(f"loader {name!r} sent {title(message)}, expected {expected}")
        last = message
        yield message
    if not isinstance(last, End):
        raise PluginError(f"loader {name!r} ended without sending End")


def title(message: object) -> str:
    """Return what a message is, for errors."""
    name = getattr(message, "name", "")
    return f"{type(message).__name__} {name!r}" if name else type(message).__name__


def tensors_by_name(model: Model, names: str = "model") -> tuple[str, Mapping[str, LazyTensor]]:
    """Return how the tensors of a model are named, and the tensors.

    With ``names`` ``"model"`` they are whole: under Hugging Face's names, or canonical ones
    (``"transformer layer 0: qkv weight"``) where Hugging Face has none. With ``"stored"``, and
    where nothing else is known, each is what one place of the files holds.
    """
    if names != "stored" and model.passthrough is not None:
        hf = model.begin.layout.startswith("hf")
        return "huggingface" if hf else "stored", model.passthrough
    if names != "stored" and model.messages:
        try:  # on a copy: the names of Hugging Face have no padding
            return "huggingface", hf_tensors(replace(model, messages=dict(model.messages)))[0]
        except CkptxError as error:
            _log.info("no names of Hugging Face: %s", error)
        return "canonical", {
            f"{message}: {key}": tensor
            for message, tensors in model.messages.items()
            for key, tensor in tensors.items()
        }
    return "stored", {source.name: source.extent for source in model.begin.sources}
