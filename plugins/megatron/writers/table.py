"""Whose conventions a Megatron checkpoint follows besides Megatron Core's names of tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import click

from ckptx.conversion.options import option
from ckptx.errors import PlanError, SchemaError
from ckptx.model.family import Family
from ckptx.model.layout import ExtraState
from ckptx.plugins.megatron.directory import SIDECARS
from ckptx.plugins.megatron.source import Source
from ckptx.plugins.megatron.writers import bridge, nemo
from ckptx.protocol.context import Options
from ckptx.schemas.conventions.mcore import with_cores
from ckptx.storage.location import Location

Settings: TypeAlias = Callable[[Location, Collection[str]], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Writer:
    """A project that saves models of Megatron Core."""

    name: str
    wrote: Callable[[Location], bool] = lambda place: False
    """Whether files of an iteration tell that it is the writer."""
    settings: Settings = lambda place, accepted: {}
    """Returns what its files say of the model, as args; the args to be ignored are given."""
    sidecars: str = SIDECARS
    """The folder with the tokenizer."""
    files: Callable[[Mapping[str, Any], Family], Mapping[str, bytes]] = lambda args, family: {}
    """Returns the files beside the tensors."""
    pointers: Mapping[str, str] = field(default_factory=dict)
    """Which of these are beside the iterations, too, by their names there."""
    states: Callable[[Sequence[ExtraState]], Iterable[ExtraState]] = lambda states: states
    """Returns the extra states that it looks for, of those of today's releases."""
    load_hint: str = ""
    """The code that loads an iteration, unless it is Megatron's own script."""


_LENGTH = (
    "max_position_embeddings is seq_length of the run, with which the model was trained; "
    "--hf-base takes that of a config"
)
MEGATRON_LM = Writer("megatron-lm")
OLDER = Writer("megatron-lm-0.14", states=with_cores)
BRIDGE = Writer(
    "bridge",
    lambda place: (place / bridge.RUN_CONFIG).is_file(),
    bridge.settings,
    sidecars="tokenizer",
    files=bridge.files,
    pointers={bridge.LATEST: bridge.TRAIN_STATE},
    load_hint='megatron.bridge.training.model_load_save.load_megatron_model("{place}")',
)
NEMO = Writer("nemo2", nemo.wrote, nemo.settings, sidecars=nemo.TOKENIZER)
SOURCES = {writer.name: writer for writer in (MEGATRON_LM, BRIDGE, NEMO)}
TARGETS = {writer.name: writer for writer in (MEGATRON_LM, OLDER, BRIDGE)}


def writer_option() -> click.Option:
    """Return ``--writer``."""
    told = "Who wrote the checkpoint, where its files do not tell."
    return option("--writer", click.Choice([*SOURCES]), told)


def target_writer_option() -> click.Option:
    """Return ``--target-writer``."""
    for_it = "Whose files to write beside the tensors, for it to load them."
    return option("--target-writer", click.Choice([*TARGETS]), for_it, MEGATRON_LM.name)


def writer_of(place: Location, options: Options) -> Writer:
    """Return the writer that was given, else the one that the files of an iteration tell."""
    if given := options.get("writer"):
        return SOURCES[given]
    return next((one for one in SOURCES.values() if one.wrote(place)), MEGATRON_LM)


def described(writer: Writer, checkpoint: Source, options: Options) -> Source:
    """Return a checkpoint without args with those that its writer's files say.

    Raises:
        FormatError: the files are damaged.
        SchemaError: they say what args cannot say.
    """
    if checkpoint.args:
        return checkpoint
    try:
        args = writer.settings(checkpoint.place, options.get("accept_arg") or ())
    except SchemaError as error:
        raise SchemaError(f"{checkpoint.place}: {error}") from error
    notes = (*checkpoint.notes, *[_LENGTH] * bool(args))
    return replace(checkpoint, args=args, notes=notes)


def target_writer(options: Options, ckpt_format: str) -> Writer:
    """Return the writer for whom a target is written.

    Raises:
        PlanError: it has no checkpoints of this format.
    """
    writer = TARGETS[options.get("target_writer") or MEGATRON_LM.name]
    if writer is BRIDGE and ckpt_format != "torch_dist":
        raise PlanError(
            f"--target-writer {writer.name} loads torch_dist only; leave --ckpt-format out"
        )
    return writer
