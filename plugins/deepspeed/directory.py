"""DeepSpeed's checkpoint directories: which files there are, and what their pickles say.

    ROOT/latest                                                   the tag
    ROOT/TAG/mp_rank_00_model_states.pt                           ZeRO 0, 1, 2
             zero_pp_rank_D_mp_rank_00_model_states.pt            ZeRO 3
             [bf16_]zero_pp_rank_D_mp_rank_00_optim_states.pt     ZeRO 1, 2, 3
             zero/NAME/fp32.pt                                    universal, in place of these

``D`` is the data-parallel rank, not padded: rank 10 sorts before rank 2.

Source: deepspeedai/DeepSpeed deepspeed/runtime/engine.py, deepspeed/checkpoint/constants.py,
deepspeed/checkpoint/ds_to_universal.py @ v0.19.8.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptx.containers import torch_zip
from ckptx.errors import FormatError, listing
from ckptx.lazy import Stored

LATEST = ("latest", "latest_universal")
UNIVERSAL = "zero"
_PARAMETER = "fp32.pt"
_MODEL = re.compile(r"mp_rank_(?P<mp>\d+)_model_states\.pt")
_MODEL_3 = re.compile(r"zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_model_states\.pt")
_OPTIM = re.compile(r"(bf16_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt")
_STATES = "*_model_states.pt"

REFUSED = {
    "layer_*-model_states.pt": "a checkpoint of DeepSpeed's PipelineModule, whose layers have no "
    "names; it is not loaded yet",
    "layer_*_expert_*_model_states.pt": "holds files of DeepSpeed's own mixture of experts, which "
    "are not loaded yet",
    "expp_rank_*_optim_states.pt": "holds files of DeepSpeed's own mixture of experts, which are "
    "not loaded yet",
}
"""Patterns of files that say what is not loaded, and what that is."""


def is_tag(directory: Path) -> bool:
    """Return whether a directory is a checkpoint itself, not the root of several."""
    return any(directory.glob(_STATES))


def tags(root: Path) -> list[str]:
    """Return the checkpoints of a root by name."""
    if not root.is_dir():
        return []
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and is_tag(entry))


def find(source: Path, tag: str | None) -> Path:
    """Return the directory of the checkpoint that is meant: a tag, the latest, or ``source``.

    Raises:
        FormatError: there is no such tag, or several and nothing says which.
    """
    if is_tag(source):
        if tag not in (None, source.absolute().name):
            raise FormatError(
                f"{source}: is the checkpoint {source.absolute().name!r} itself, and --tag says "
                f"{tag!r}; give the directory above, or no --tag"
            )
        return source
    known = tags(source)
    origin = "--tag"
    pointer = next((source / name for name in LATEST if (source / name).is_file()), None)
    if tag is None and pointer is not None:
        tag, origin = pointer.read_text(errors="replace").strip(), str(pointer)
    if tag is None and len(known) == 1:
        tag = known[0]
    if not known:
        raise FormatError(f"{source}: no checkpoint of DeepSpeed: no *_model_states.pt below it")
    if tag is None:
        raise FormatError(
            f"{source}: holds {listing(known)} and no file {LATEST[0]!r}; say which with --tag"
        )
    if tag not in known:
        raise FormatError(
            f"{source}: {origin} says {tag!r}, found {listing(known)}; say which with --tag"
        )
    return source / tag


@dataclass(slots=True)
class Checkpoint:
    """The pickles of one checkpoint, with `ckptx.lazy.Stored` extents for tensors.

    ``models`` and ``optimizers`` are by data-parallel rank. Below ZeRO 3 there is one model, that
    of rank 0. ``optimizers`` is empty where they were not asked for, or lie in the model's file.
    """

    directory: Path
    stage: int
    """0, 2 or 3: ZeRO 1 and 2 are stored alike and are both 2 here."""
    models: list[Mapping[str, Any]]
    optimizers: list[Mapping[str, Any]] = field(default_factory=list)
    parameters: dict[str, Stored] | None = None
    """The fp32 tensors of a universal checkpoint by name, flat at ZeRO 3; None of any other."""
    files: list[Path] = field(default_factory=list)
    """Absolute paths: the file table of the extents."""
    skipped: list[Path] = field(default_factory=list)
    """Files that were not read because nothing of them was asked for."""

    @property
    def model(self) -> Mapping[str, Any]:
        """What rank 0 has saved beside its optimizer."""
        return self.models[0]

    @property
    def module(self) -> Mapping[str, Any]:
        """The tensors of the module by name, of no elements at ZeRO 3."""
        found: Mapping[str, Any] = self.model["module"]
        return found


def read(directory: Path, masters: bool) -> Checkpoint:
    """Read the files of one checkpoint; those of optimizers if ``masters`` are asked for.

    Raises:
        FormatError: a file is missing or damaged, or files are not of one checkpoint, or of a kind
            that is not loaded.
    """
    for pattern, reason in REFUSED.items():
        if any(directory.glob(pattern)):
            raise FormatError(f"{directory}: {reason}")
    models = _by_rank(directory, _MODEL_3)
    single = _by_rank(directory, _MODEL)
    optimizers = _by_rank(directory, _OPTIM)
    if bool(models) == bool(single):
        raise FormatError(
            f"{directory}: expected model states of ZeRO 3 (zero_pp_rank_*) or of another stage "
            "(mp_rank_*), found both; they are of two checkpoints, remove one"
        )
    found = Checkpoint(directory, 3 if models else 2, [])
    world = max((*models, *optimizers), default=0) + 1
    found.models = _read_all(found, models or single, world if models else 1, "model states")
    for model in found.models:
        _check_kind(model, directory)
    if found.stage == 2 and not found.model.get("param_shapes"):
        found.stage = 0
    if (directory / UNIVERSAL).is_dir():
        _read_universal(found, masters)
    elif found.stage and masters:
        found.optimizers = _read_optimizers(found, optimizers, world)
    else:
        found.skipped = list(optimizers.values())
    return found


def _read_optimizers(
    found: Checkpoint, files: Mapping[int, Path], world: int
) -> list[Mapping[str, Any]]:
    if not files:
        hint = "" if found.stage == 3 else ", or take the module's weights with --weights module"
        raise FormatError(
            f"{found.directory}: holds no *_optim_states.pt, where the fp32 weights are; copy them"
            f"{hint}"
        )
    states = _read_all(found, files, world, "optimizer states")
    counts = {_partitions(state["optimizer_state_dict"]) for state in states}
    if counts != {world}:
        raise FormatError(
            f"{found.directory}: the optimizer was split over "
            f"{' and '.join(map(str, sorted(counts)))} ranks, found files of {world}; the files "
            "are not of one checkpoint, or some are missing"
        )
    return states


def _read_universal(found: Checkpoint, masters: bool) -> None:
    """Read the parameters of a universal checkpoint, each a file in a folder of its name."""
    paths = sorted(path for path in (found.directory / UNIVERSAL).rglob("*") if path.is_file())
    wanted = [path for path in paths if path.name == _PARAMETER] if masters else []
    found.skipped = [path for path in paths if path not in set(wanted)]
    found.parameters = {}
    for path in wanted:
        value = torch_zip.read(path, len(found.files)).value
        found.files.append(path.absolute())
        tensor = value.get("param") if isinstance(value, Mapping) else value
        if not isinstance(tensor, Stored):
            raise FormatError(f"{path}: expected a tensor, alone or as 'param' of a dictionary")
        found.parameters[path.parent.name] = tensor


def _partitions(state: Mapping[str, Any]) -> int:
    """Return over how many ranks an optimizer is split; groups of experts over fewer."""
    count = state.get("partition_count", 1)
    counts = count if isinstance(count, list) else [count]
    return max((one for one in counts if type(one) is int), default=1)


def _by_rank(directory: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """Return the files of a kind by data-parallel rank, in the order of ranks."""
    found: dict[int, Path] = {}
    for path in directory.iterdir():
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        groups = match.groupdict()
        if int(groups["mp"]):
            raise FormatError(
                f"{path}: of tensor or pipeline parallel rank {int(groups['mp'])}; checkpoints of "
                "several such ranks are not loaded yet"
            )
        rank = int(groups.get("dp") or 0)
        if rank in found:
            raise FormatError(
                f"{path}: {found[rank].name} is of the same rank; they are of two checkpoints, "
                "remove one"
            )
        found[rank] = path
    return dict(sorted(found.items()))


def _read_all(
    found: Checkpoint, files: Mapping[int, Path], world: int, what: str
) -> list[Mapping[str, Any]]:
    """Return the pickles of all ranks, which must be of one save."""
    missing = [str(rank) for rank in range(world) if rank not in files]
    if missing:
        raise FormatError(
            f"{found.directory}: {what} of {len(missing)} of {world} ranks are missing: rank "
            f"{', '.join(missing[:10])}; copy them"
        )
    states = [_read_file(found, files[rank]) for rank in range(world)]
    for rank, state in enumerate(states):
        for key in ("ds_version", "global_steps"):
            if state.get(key) != states[0].get(key):
                raise FormatError(
                    f"{files[rank]}: its {key} is not that of {files[0].name}; the files are not "
                    "of one checkpoint"
                )
    return states


def _read_file(found: Checkpoint, path: Path) -> Mapping[str, Any]:
    value = torch_zip.read(path, len(found.files)).value
    found.files.append(path.absolute())
    of_model = "_model_states" in path.name
    key, kind = ("module", object) if of_model else ("optimizer_state_dict", Mapping)
    if not (isinstance(value, Mapping) and key in value and isinstance(value[key], kind)):
        raise FormatError(f"{path}: expected a dictionary of DeepSpeed with {key!r}")
    return value


def _check_kind(model: Mapping[str, Any], directory: Path) -> None:
    """Raise where a model was split in a way that the names of files do not show."""
    if not isinstance(model["module"], Mapping):
        raise FormatError(f"{directory}: {REFUSED['layer_*-model_states.pt']}")
    if _any(model.get("num_experts")) or model.get("ds_autoep_layers"):
        raise FormatError(f"{directory}: {REFUSED['layer_*_expert_*_model_states.pt']}")
    degree = model.get("mp_world_size") or 1
    if degree != 1:
        raise FormatError(
            f"{directory}: split over {degree} tensor or pipeline parallel ranks; such checkpoints "
            "are not loaded yet"
        )
    for key, sound in _SOUND.items():
        if model.get(key) is not None and not sound(model[key]):
            raise FormatError(
                f"{directory}: {key!r} of the model states is not what DeepSpeed writes; the files "
                "are damaged, or of a version that is not known"
            )


def _any(counts: Any) -> bool:
    return bool(counts) and any(counts if isinstance(counts, Iterable) else [counts])


def _are_shapes(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(shape, tuple | list) and all(type(size) is int and size >= 0 for size in shape)
        for shape in value.values()
    )


_SOUND: Mapping[str, Callable[[Any], bool]] = {
    "param_shapes": lambda value: isinstance(value, list) and all(map(_are_shapes, value)),
    "frozen_param_shapes": _are_shapes,
    "frozen_param_fragments": lambda value: isinstance(value, Mapping),
    "shared_params": lambda value: isinstance(value, Mapping),
    "buffer_names": lambda value: isinstance(value, list),
}
"""What is relied on in the model states, where it is there."""
