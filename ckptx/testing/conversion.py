"""Loaders and savers run in this process: what two supervised processes do, without them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from ckptx.conversion import engine
from ckptx.conversion.proof import Proof, prove
from ckptx.protocol.context import Context
from ckptx.protocol.contracts import Loader, SavePlan, Saver
from ckptx.protocol.messages import PASSTHROUGH, Begin, End, Message, Tensors
from ckptx.registry.open import checkpoint_messages
from ckptx.storage.file_plan import FilePlan, Region
from ckptx.storage.gather import read
from ckptx.storage.open_files import Files
from ckptx.tensors.lazy import LazyTensor
from ckptx.testing.models import Arrays, Canonical
from ckptx.writing.writer import WriteOptions, execute


def save(
    saver: Saver, messages: Iterable[Message], target: Path, options: Mapping[str, Any]
) -> Path:
    """Plan, prove and write a model; return the path that a loader reads it from."""
    planned = engine.make_plan(saver, messages, options, Context(target=target))
    planned.prove()
    plan = planned.plan
    target = target.parent if plan.single_file else target
    place = target / plan.directory
    place.mkdir(parents=True, exist_ok=True)
    with mock.patch.object(os, "fsync", return_value=None):  # no test outlives a power cut
        execute(plan, planned.begin.files, place, WriteOptions(threads=1))
    for name, data in plan.pointers.items():
        (target / name).write_bytes(data)
    return target / plan.files[0].path if plan.single_file else target


def checked(plan: SavePlan, messages: Iterable[Message]) -> Proof:
    """Return the proof of a plan that was made from these messages."""
    sent = list(messages)
    return prove(plan, begin_of(sent), end_of(sent))


def convert(
    loader: Loader,
    source: Path,
    saver: Saver,
    target: Path,
    saver_options: Mapping[str, Any] | None = None,
    loader_options: Mapping[str, Any] | None = None,
) -> Path:
    """Convert ``source``; return the path that a loader reads the result from."""
    messages = checkpoint_messages(source, loader, options=loader_options)
    return save(saver, messages, target, saver_options or {})


def begin_of(messages: Iterable[Message]) -> Begin:
    """Return the Begin among messages."""
    return next(message for message in messages if isinstance(message, Begin))


def end_of(messages: Iterable[Message]) -> End:
    """Return the End among messages."""
    return next(message for message in messages if isinstance(message, End))


def tensors_of(messages: Iterable[Message]) -> Iterator[tuple[str, str, LazyTensor]]:
    """Yield message, key and tensor of all that messages hold."""
    for message in messages:
        if isinstance(message, Tensors):
            for key, tensor in message.tensors.items():
                yield message.name, key, tensor


def values(messages: Iterable[Message]) -> Canonical:
    """Read every tensor of the messages; those that pass through are under `PASSTHROUGH`."""
    sent = list(messages)
    files = Files(begin_of(sent).files)
    found: Canonical = {}
    try:
        for name, key, tensor in tensors_of(sent):
            found.setdefault(name, {})[key] = read(tensor, files)
    finally:
        files.close()
    return found


def loaded(loader: Loader, source: Path, options: Mapping[str, Any] | None = None) -> Canonical:
    """Load a checkpoint and read every tensor of it."""
    return values(checkpoint_messages(source, loader, options=options))


def loaded_by_name(loader: Loader, source: Path) -> Arrays:
    """Load a checkpoint whose tensors pass through, and read them."""
    return loaded(loader, source)[PASSTHROUGH]


def plan_of_messages(messages: Iterable[Message]) -> SavePlan:
    """Return a plan that writes every tensor once, to one file each: what a lossless saver uses."""
    files = []
    for number, (name, key, tensor) in enumerate(tensors_of(messages)):
        if tensor.nbytes:
            region = Region(0, tensor.nbytes, tensor, f"{name}: {key}")
            files.append(FilePlan(str(number), tensor.nbytes, [region]))
    return SavePlan(files)
