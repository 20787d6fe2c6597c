"""The mean of several checkpoints of one model, as the messages of one.

Sources may be of any formats: their tensors meet under canonical names, or their own where no
schema knows the model. What is not the same model is refused. Numbers that are no floating-point
numbers have no mean: they must be equal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ckptx.errors import PlanError, first_few, listing
from ckptx.protocol.messages import PASSTHROUGH, Begin, Dropped, End, Message, SourceTensor, Tensors
from ckptx.protocol.model import VOCAB_TENSORS, Model, collect, resize_vocabulary
from ckptx.protocol.sidecars import CONFIG, read_config
from ckptx.storage.blocks import equal
from ckptx.tensors.dtypes import DTYPES, FLOATS
from ckptx.tensors.lazy import LazyTensor, replicated
from ckptx.tensors.mean import Renumbered, mean

_ANYWAY = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
"""Keys of a config by which the same model may differ."""
_AVERAGED = {"float64", *DTYPES}


@dataclass(slots=True)
class _Source:
    """One of the checkpoints, and where its files stand among those of all."""

    path: Path
    model: Model
    first: int

    def renumbered(self, tensors: Sequence[LazyTensor]) -> tuple[LazyTensor, ...]:
        """Return tensors of it as they are called among those of all."""
        return tuple(map(Renumbered(self.first), tensors))

    @property
    def tensors(self) -> dict[tuple[str, str], LazyTensor]:
        """Everything by message and key."""
        model, renumbered = self.model, Renumbered(self.first)
        messages = {**model.messages, PASSTHROUGH: model.passthrough or {}}
        return {
            (message, key): renumbered(tensor)
            for message, tensors in messages.items()
            for key, tensor in tensors.items()
        }


def averaged(
    streams: Sequence[tuple[Path, Iterator[Message]]],
    weights: Sequence[float] = (),
    dtype: str | None = None,
) -> Iterator[Message]:
    """Yield the mean of several checkpoints, each given by its path and its messages.

    ``dtype`` is what all tensors are cast to afterwards; without one each must have the same in
    all checkpoints.

    Raises:
        PlanError: they are not of one model.
    """
    sources: list[_Source] = []
    parts: dict[str, str] = {}
    for path, messages in streams:
        first = sum(len(one.model.begin.files) for one in sources)
        sources.append(_Source(path, collect(_watched(messages, parts)), first))
    for other in sources[1:]:
        _check_same_model(sources[0], other)
    cut = _same_vocabulary(sources)
    found = [one.tensors for one in sources]
    for one, own in zip(sources[1:], found[1:], strict=True):
        for left, right, names in ((sources[0], one, found[0]), (one, sources[0], own)):
            if lacking := [_label(name) for name in names if name not in (found[0].keys() & own)]:
                raise PlanError(f"{right.path}: lacks {listing(lacking)}, which {left.path} has")
    begin = _begin(sources)
    yield begin
    made: dict[str, dict[str, LazyTensor]] = {message: {} for message, _ in found[0]}
    for name in found[0]:
        tensors = [own[name] for own in found]
        _check_alike(name, sources, tensors, begin.files, dtype)
        kept = tensors[0].dtype not in FLOATS
        made[name[0]][name[1]] = replicated(tensors) if kept else mean(tensors, weights)
    for message, of_message in made.items():
        yield Tensors(message, of_message, parts[message])
    yield _end(sources, cut, weights)


def _watched(messages: Iterator[Message], parts: dict[str, str]) -> Iterator[Message]:
    for message in messages:
        if isinstance(message, Tensors):
            parts[message.name] = message.part
        yield message


def _label(name: tuple[str, str]) -> str:
    message, key = name
    return key if message == PASSTHROUGH else f"{message}: {key}"


def _check_same_model(one: _Source, other: _Source) -> None:
    """Raise unless two checkpoints say of themselves that they are one model.

    Raises:
        PlanError: they differ.
    """
    begins = one.model.begin, other.model.begin
    for known, unknown in ((one, other), (other, one)):
        begin = unknown.model.begin
        if known.model.begin.parts and not begin.parts and CONFIG not in begin.sidecars:
            raise PlanError(
                f"{unknown.path}: nothing beside the weights says which model it is, as of "
                f"{known.path}; give --hf-base with a config that is of all"
            )
    said = [dict(_settings(begin)) for begin in begins]
    differing = [
        f"{key} is {said[0].get(key)} and {said[1].get(key)}"
        for key in dict.fromkeys((*said[0], *said[1]))
        if said[0].get(key) != said[1].get(key)
    ]
    a, b = (read_config(begin.sidecars, begin.root) for begin in begins)
    if not differing and a is not None and b is not None:
        differing = [
            f"{key} of {CONFIG} is {a.get(key)} and {b.get(key)}"
            for key in dict.fromkeys((*a, *b))
            if key not in _ANYWAY and a.get(key) != b.get(key)
        ]
    if differing:
        raise PlanError(
            f"{one.path} and {other.path} are not of one model: {first_few(differing, 5)}"
        )


def _settings(begin: Begin) -> Iterator[tuple[str, Any]]:
    """Yield what tells one model from another, by name."""
    yield "family", begin.family
    if not begin.parts:
        yield "layout", begin.layout
    for part, spec in begin.parts.items():
        label = "" if part == "language" else f"{part}: "
        for field in fields(spec):
            if field.compare and field.name not in ("dtype", "vocab_size", "extra"):
                yield f"{label}{field.name}", getattr(spec, field.name)
        for name, value in spec.extra.items():
            yield f"{label}{name}", value


def _same_vocabulary(sources: Sequence[_Source]) -> tuple[Dropped, ...]:
    """Cut the padding of all sources where they have vocabularies of several sizes."""
    models = [one.model for one in sources]
    held = [
        {
            (message, key): tensors[key].shape[0]
            for message, tensors in model.messages.items()
            for key in tensors
            if (message, key) in VOCAB_TENSORS
        }
        for model in models
    ]
    if all(one == held[0] for one in held):
        return ()
    known = {model.spec.vocab_size for model in models} - {None}
    if len(known) != 1:
        return ()  # their shapes say it
    return tuple(
        replace(drop, name=f"{one.path.name}: {drop.name}", tensors=one.renumbered(drop.tensors))
        for one in sources
        for drop in resize_vocabulary(one.model, *known, fill=False)
    )


def _check_alike(
    name: tuple[str, str],
    sources: Sequence[_Source],
    tensors: Sequence[LazyTensor],
    files: Sequence[str],
    dtype: str | None,
) -> None:
    """Raise unless tensors of one name have a mean.

    Raises:
        PlanError: they have not.
    """
    label, first = _label(name), tensors[0]
    for one, other in zip(sources[1:], tensors[1:], strict=True):
        both = f"{sources[0].path} and {other.dtype} {list(other.shape)} in {one.path}"
        where = f"{label!r} is {first.dtype} {list(first.shape)} in {both}"
        if other.shape != first.shape:
            raise PlanError(f"{where}: tensors of one shape have a mean")
        if other.dtype != first.dtype and not (dtype and {first.dtype, other.dtype} <= _AVERAGED):
            raise PlanError(f"{where}: say with --dtype which the mean shall have")
        if first.dtype not in FLOATS and not equal(first, other, files):
            raise PlanError(
                f"{where}, and their values differ: only floating-point numbers have a mean"
            )
    if first.dtype in FLOATS and first.dtype not in _AVERAGED:
        raise PlanError(
            f"{label!r} is {first.dtype}, codes of which there is no mean; convert the checkpoints "
            "to bf16 first"
        )


def _begin(sources: Sequence[_Source]) -> Begin:
    """Return what the mean is: the first checkpoint, with the files of all."""
    begins = [one.model.begin for one in sources]
    declared = (
        SourceTensor(f"{one.path.name}: {own.name}", Renumbered(one.first)(own.extent))
        for one in sources
        for own in one.model.begin.sources
    )
    return replace(
        begins[0],
        files=tuple(file for begin in begins for file in begin.files),
        sources=tuple(declared),
        root=os.path.commonpath(
            [begin.root or str(one.path) for begin, one in zip(begins, sources, strict=True)]
        ),
        training={**begins[0].training, "iteration": "release"},
        accepted=tuple(dict.fromkeys(key for begin in begins for key in begin.accepted)),
    )


def _end(sources: Sequence[_Source], cut: Sequence[Dropped], weights: Sequence[float]) -> End:
    """Return what is not converted of all checkpoints, and the remarks on them."""
    by = f" by {', '.join(f'{weight:g}' for weight in weights)}" if weights else ""
    notes = [f"the mean{by}, in float32, of {', '.join(str(one.path) for one in sources)}"]
    dropped = []
    for one in sources:
        end = one.model.end
        notes += (f"{one.path.name}: {note}" for note in end.notes)
        dropped += [
            replace(
                drop, name=f"{one.path.name}: {drop.name}", tensors=one.renumbered(drop.tensors)
            )
            for drop in end.dropped
        ]
    small = sources[0].model.begin.sidecars
    for one in sources[1:]:
        theirs = one.model.begin.sidecars
        for name in sorted(small.keys() & theirs.keys() - {CONFIG}):
            if small[name] != theirs[name]:
                notes.append(f"{name} is that of {sources[0].path}; {one.path} has another")
    return End((*dropped, *cut), tuple(notes))
