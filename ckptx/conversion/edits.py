"""Change a checkpoint by the names of its tensors: remove, cast, rename; its format stays.

The edits stand between a loader and the saver of the same format, so that what is written is
planned, proved and published like any conversion. Names are those of the source, and tensors are
what the files hold: no schema is asked, so a model directory that fits none can be mended. Then the
schema, where there is one, says whether ``config.json`` still describes the tensors.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckptx.conversion.casting import cast_float
from ckptx.conversion.request import Edits
from ckptx.errors import CkptxError, PlanError, SchemaError, listing
from ckptx.hf_models.directory import hf_messages
from ckptx.protocol.from_names import main_dtype, passthrough
from ckptx.protocol.messages import Begin, Dropped, End, Message
from ckptx.protocol.sidecars import CONFIG, read_config
from ckptx.registry.families import family_of
from ckptx.tensors.lazy import LazyTensor

_MODIFIED = ("hf", "pytorch", "dcp")
"""Formats that are modified; the savers that write them have the same names."""


def saver_for(loader: str) -> str:
    """Return the saver that writes what a loader has read.

    Raises:
        PlanError: a format's tensors cannot be changed one by one.
    """
    if loader not in _MODIFIED:
        raise PlanError(
            f"modify changes {', '.join(_MODIFIED)}, not {loader!r}, whose files are those of a "
            "model with fixed tensors on fixed ranks; convert it --to hf, modify that, and "
            "convert back"
        )
    return loader


def edited(messages: Iterator[Message], edits: Edits, loader: str) -> Iterator[Message]:
    """Yield the messages of a source with its tensors changed, all passing through by name.

    Raises:
        PlanError: a pattern matches nothing, names would collide, or a cast has no meaning.
    """
    saver_for(loader)
    begin = next(messages, None)
    if not isinstance(begin, Begin):
        raise PlanError(f"loader {loader!r} did not begin with Begin")
    if not begin.layout.startswith("hf"):
        raise PlanError(
            f"{begin.root}: its tensors are named as {begin.layout} and lie beside Megatron's "
            "args, which modify would lose; convert it --to hf first"
        )
    left = () if loader == "hf" else _left_behind(messages)
    container = str(begin.training.get("container") or "")
    prefix = f"{container}." if container else ""
    found = {source.name.removeprefix(prefix): source.extent for source in begin.sources}
    tensors, removed = apply(found, edits)
    config = read_config(begin.sidecars, begin.root)
    codes = (name for glob, _ in edits.cast for name in match(found, glob))
    if any(found[name].dtype.startswith("float8") for name in codes):
        raise PlanError(
            f"{begin.root}: float8 weights are codes that scales belong to; 'convert --to hf "
            "--dtype bf16' makes numbers of them"
        )
    training = {**begin.training, "keep_container": container}
    begin = replace(begin, layout="hf", parts={}, family="", training=training)
    yield begin
    yield passthrough(tensors)
    notes = _config_notes(begin, config, tensors) if config is not None else ()
    yield End((*removed, *left), notes)


def _config_notes(
    begin: Begin, config: Mapping[str, Any], tensors: Mapping[str, LazyTensor]
) -> tuple[str, ...]:
    """Return what is to be checked in the config that stays beside the tensors."""
    if family_of(config) is None:
        named = ", ".join(map(str, config.get("architectures") or ["nothing"]))
        return (
            f"{CONFIG} is kept and says {named}, which no schema knows: check that it still "
            "describes the tensors",
        )
    notes: list[str] = []
    said = config.get("dtype") or config.get("torch_dtype")
    dtype = main_dtype(tensors)
    if said not in (None, dtype) and "quantization_config" not in config:
        notes.append(f"{CONFIG}: dtype was {said} and is now {dtype}, as most weights are")
    try:
        for message in hf_messages(begin, tensors):
            if isinstance(message, End):
                notes += message.notes
    except CkptxError as error:
        notes.append(
            f"{CONFIG} is kept and no longer describes the tensors: {error}. Change it before the "
            "model is loaded by it"
        )
    return tuple(notes)


def apply(
    found: Mapping[str, LazyTensor], edits: Edits
) -> tuple[dict[str, LazyTensor], tuple[Dropped, ...]]:
    """Return the changed tensors under their new names, and those that were removed.

    Raises:
        PlanError: a pattern matches nothing, names would collide, or a cast has no meaning.
    """
    dropped: dict[str, Dropped] = {}
    for glob in edits.remove:
        for name in match(found, glob, "--remove"):
            tensor = found[name]
            reason = f"removed on request: --remove {glob!r}"
            dropped.setdefault(name, Dropped(name, reason, tensor.nbytes, (tensor,)))
    kept = {name: tensor for name, tensor in found.items() if name not in dropped}
    if not kept:
        raise PlanError("nothing would be left: every tensor matches --remove")
    for glob, dtype in edits.cast:
        for name in match(kept, glob, "--cast"):
            tensor = found[name]
            try:  # a pattern leaves integers as they are, like --dtype; a name means that tensor
                kept[name] = tensor.cast(dtype) if name == glob else cast_float(tensor, dtype)
            except PlanError as error:
                raise PlanError(f"--cast {glob!r}: {name!r}: {error}") from error
    names = _new_names(kept, edits.rename)
    return {names.get(name, name): tensor for name, tensor in kept.items()}, tuple(dropped.values())


def match(names: Mapping[str, LazyTensor], glob: str, option: str = "") -> list[str]:
    """Return the names that a glob matches.

    Raises:
        PlanError: there is none, and ``option`` was meant to find some.
    """
    found = [name for name in names if name == glob or fnmatch.fnmatchcase(name, glob)]
    if not found and option:
        raise PlanError(f"{option} {glob!r}: matches no tensor; there are {listing(names, 3)}")
    return found


def _new_names(
    names: Mapping[str, LazyTensor], rename: Sequence[tuple[str, str]]
) -> dict[str, str]:
    """Return the new names of the tensors that get one.

    Raises:
        PlanError: a pattern matches nothing, a name would change twice, or two would be one.
    """
    found: dict[str, str] = {}
    for old, new in rename:
        if old.count("*") != new.count("*"):
            raise PlanError(f"--rename {old!r} {new!r}: as many * are needed on either side")
        pattern = re.compile("(.*)".join(map(re.escape, old.split("*"))), re.DOTALL)
        fixed = new.split("*")
        matches = {name: one for name in names if (one := pattern.fullmatch(name))}
        if not matches:
            raise PlanError(f"--rename {old!r}: matches no tensor; there are {listing(names, 3)}")
        for name, one in matches.items():
            if name in found:
                raise PlanError(f"--rename {old!r}: {name!r} is renamed by another --rename, too")
            found[name] = fixed[0] + "".join(
                text + after for text, after in zip(one.groups(), fixed[1:], strict=True)
            )
    owners: dict[str, str] = {}
    for name in names:
        final = found.get(name, name)
        if not final:
            raise PlanError(f"--rename: {name!r} would have no name")
        if final in owners:
            raise PlanError(
                f"--rename: {owners[final]!r} and {name!r} would both be called {final!r}; remove "
                "one of them, or choose another name"
            )
        owners[final] = name
    return found


def _left_behind(messages: Iterator[Message]) -> tuple[Dropped, ...]:
    """Return what a loader leaves behind that is no tensor of the model.

    Raises:
        SchemaError: the tensors are not those of the config beside, so the loader does not get to
            the end of what it has to say.
    """
    try:
        ends = [message for message in messages if isinstance(message, End)]
    except SchemaError as error:
        raise SchemaError(
            f"{error}; to modify the tensors whatever they are, move {CONFIG} away meanwhile"
        ) from error
    return tuple(drop for end in ends for drop in end.dropped if not drop.tensors)
