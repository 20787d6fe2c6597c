"""DeepSpeed's checkpoint directories: which files there are, and what their pickles say.

    ROOT/latest                                                   the tag
    ROOT/TAG/mp_rank_MM_model_states.pt                           ZeRO 0, 1, 2
             zero_pp_rank_D_mp_rank_MM_model_states.pt            ZeRO 3
             [bf16_]zero_pp_rank_D_mp_rank_MM_optim_states.pt     ZeRO 1, 2, 3
             layer_LL[-model_MM]-model_states.pt                  a layer of a PipelineModule
             layer_L_expert_E_mp_rank_MM_model_states.pt          an expert of a mixture
             expp_rank_X_mp_rank_MM_optim_states.pt               optimizer of its ranks, ZeRO 0
             zero/NAME/fp32.pt                                    universal, in place of these

``D`` is the data-parallel rank, not padded: rank 10 sorts before rank 2. ``MM`` counts tensor- and
pipeline-parallel ranks.

Source: deepspeedai/DeepSpeed deepspeed/runtime/engine.py, deepspeed/runtime/pipe/module.py,
deepspeed/checkpoint/constants.py, deepspeed/checkpoint/ds_to_universal.py @ v0.19.8.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptx.containers import torch_zip
from ckptx.containers.copies import refuse_copies
from ckptx.errors import FormatError, listing
from ckptx.storage.location import Location
from ckptx.tensors.lazy import Stored

LATEST = ("latest", "latest_universal")
UNIVERSAL = "zero"
_PARAMETER = "fp32.pt"
_MODEL = re.compile(r"mp_rank_(?P<mp>\d+)_model_states\.pt")
_MODEL_3 = re.compile(r"zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_model_states\.pt")
_OPTIM = re.compile(r"(bf16_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt")
_LAYER = re.compile(r"layer_(?P<layer>\d+)(-model_(?P<mp>\d+))?-model_states\.pt")
_EXPERT = re.compile(
    r"layer_(?P<layer>\d+)_expert_(?P<expert>\d+)_mp_rank_(?P<mp>\d+)_model_states\.pt"
)
_EXPERTS = "deepspeed_experts"
"""What comes before the number of an expert in names; deepspeed/moe/experts.py @ v0.19.8."""
_EXPERT_OPTIM = re.compile(r"expp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt")
_STATES = "*_model_states.pt"


def is_tag(directory: Location) -> bool:
    """Return whether a directory is a checkpoint itself, not the root of several."""
    return any(directory.glob(_STATES))


def tags(root: Location) -> list[str]:
    """Return the checkpoints of a root by name."""
    if not root.is_dir():
        return []
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and is_tag(entry))


def find(source: Location, tag: str | None) -> Location:
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
    """What one tensor- or pipeline-parallel rank has saved, with `Stored` for tensors.

    ``models`` and ``optimizers`` are by data-parallel rank. Below ZeRO 3 there is one model, that
    of rank 0. ``optimizers`` is empty where they were not asked for, or lie in the model's file.
    """

    directory: Location
    stage: int
    """0, 2 or 3: ZeRO 1 and 2 are stored alike and are both 2 here."""
    models: list[Mapping[str, Any]]
    optimizers: list[Mapping[str, Any]] = field(default_factory=list)
    parameters: dict[str, Stored] | None = None
    """The fp32 tensors of a universal checkpoint by name, flat at ZeRO 3; None of any other."""
    files: list[Location] = field(default_factory=list)
    """Absolute paths: the file table of the extents, one for all ranks."""
    label: str = ""
    """What tells the tensors of this rank from those of others, where there are others."""

    @property
    def model(self) -> Mapping[str, Any]:
        """What rank 0 has saved beside its optimizer."""
        return self.models[0]

    @property
    def module(self) -> Mapping[str, Any]:
        """The tensors of the module by name, of no elements at ZeRO 3."""
        found: Mapping[str, Any] = self.model["module"]
        return {str(name): value for name, value in found.items() if isinstance(value, Stored)}


@dataclass(slots=True)
class Saved:
    """The pickles of one checkpoint, of all ranks."""

    directory: Location
    ranks: list[Checkpoint] = field(default_factory=list)
    """By tensor- and pipeline-parallel rank."""
    layers: dict[int, Mapping[str, Stored]] = field(default_factory=dict)
    """The tensors of every layer of a PipelineModule, under the layer's own names."""
    experts: dict[str, Stored] = field(default_factory=dict)
    """The tensors of all experts of a mixture, under their numbers in the whole."""
    expert_optimizers: list[Mapping[str, Any]] = field(default_factory=list)
    """The optimizers without ZeRO, by expert-parallel rank."""
    files: list[Location] = field(default_factory=list)
    skipped: list[Location] = field(default_factory=list)
    """Files that were not read because nothing of them was asked for."""


def read(directory: Location, masters: bool) -> Saved:
    """Read the files of one checkpoint; those of optimizers if ``masters`` are asked for.

    Raises:
        FormatError: a file is missing or damaged, or files are not of one checkpoint, or of a kind
            that is not loaded.
    """
    models = _by_rank(directory, _MODEL_3)
    single = _by_rank(directory, _MODEL)
    optimizers = _by_rank(directory, _OPTIM)
    if models and single:
        raise FormatError(
            f"{directory}: expected model states of ZeRO 3 (zero_pp_rank_*) or of another stage "
            "(mp_rank_*), found both; they are of two checkpoints, remove one"
        )
    _check_known(directory)
    everything = [*models, *single, *optimizers]
    world = max((dp for _, dp in everything), default=0) + 1
    count = max((mp for mp, _ in everything), default=0) + 1
    saved = Saved(directory)
    # Which ranks there should be is in the model states: a rank that is missing is named by them.
    _check_grid(directory, models or single, count, world if models else 1, "model states")
    for mp in range(count):
        found = Checkpoint(directory, 3 if models else 2, [], files=saved.files)
        found.label = f"mp_rank_{mp:02d} " if count > 1 else ""
        own = {dp: path for (rank, dp), path in (models or single).items() if rank == mp}
        found.models = _read_all(found, own, world if models else 1)
        for model in found.models:
            _check_kind(model, directory, count)
        if found.stage == 2 and not found.model.get("param_shapes"):
            found.stage = 0
        saved.ranks.append(found)
    _check_ranks(saved)
    first = saved.ranks[0]
    _read_layers(saved)
    _read_experts(saved, masters)
    if (directory / UNIVERSAL).is_dir():
        _read_universal(saved, masters)
    elif masters and (first.stage or optimizers):
        _read_optimizers(saved, optimizers, world)
    else:
        saved.skipped += optimizers.values()
    # Model states without weights may be alike: those of ZeRO 3 and of a PipelineModule.
    for shares in (single if first.model["module"] else {}, optimizers if masters else {}):
        refuse_copies([*shares.values()])
    return saved


def _check_known(directory: Location) -> None:
    """Raise where a file is named like DeepSpeed's states, and not as DeepSpeed names any."""
    known = (_MODEL, _MODEL_3, _OPTIM, _LAYER, _EXPERT, _EXPERT_OPTIM)
    for path in sorted([*directory.glob(_STATES), *directory.glob("*_optim_states.pt")]):
        if not any(pattern.fullmatch(path.name) for pattern in known):
            raise FormatError(
                f"{path}: not the name of a file that DeepSpeed writes; if it does not belong to "
                "the checkpoint, move it away"
            )


def _check_grid(
    directory: Location,
    files: Mapping[tuple[int, int], Location],
    count: int,
    world: int,
    what: str,
) -> None:
    """Raise unless there is a file of every rank."""
    # Numbers are read from names of files: they may be any.
    grid = ((mp, dp) for mp in range(count) for dp in range(world))
    missing = list(itertools.islice((place for place in grid if place not in files), 10))
    if not missing:
        return
    if count == 1:
        said = f"rank {', '.join(str(dp) for _, dp in missing)}"
    else:
        said = ", ".join(f"mp_rank_{mp:02d} of rank {dp}" for mp, dp in missing)
    raise FormatError(
        f"{directory}: {what} of {count * world - len(files)} of {count * world} ranks are "
        f"missing: {said}; copy them"
    )


def _check_ranks(saved: Saved) -> None:
    """Raise unless tensor- and pipeline-parallel ranks have saved one model at one time."""
    first = saved.ranks[0]
    # Only rank 0 looks for shared parameters; tensor-parallel ranks have them all alike.
    shared = first.model.get("shared_params")
    for dp, model in enumerate(first.models[1:], 1):
        if not shared and model.get("shared_params"):
            raise FormatError(
                f"{saved.directory}: the model states of rank {dp} have 'shared_params', expected "
                "them in those of rank 0, which alone looks for them; the files are in each "
                "other's place, copy them again"
            )
    for other in saved.ranks[1:]:
        if not other.model.get("shared_params") and other.model["module"] is not None:
            other.models = [{**model, "shared_params": shared} for model in other.models]
        for key in ("ds_version", "global_steps", "mp_world_size"):
            if other.model.get(key) != first.model.get(key):
                raise FormatError(
                    f"{saved.directory}: {key!r} of {other.label.strip()} is not that of "
                    f"{first.label.strip()}; the files are not of one checkpoint"
                )


def _read_optimizers(saved: Saved, files: Mapping[tuple[int, int], Location], world: int) -> None:
    if not files:
        hint = ", or take the module's weights with --weights module"
        raise FormatError(
            f"{saved.directory}: holds no *_optim_states.pt, where the fp32 weights are; copy them"
            f"{'' if saved.ranks[0].stage == 3 else hint}"
        )
    _check_grid(saved.directory, files, len(saved.ranks), world, "optimizer states")
    for mp, found in enumerate(saved.ranks):
        own = {dp: path for (rank, dp), path in files.items() if rank == mp}
        found.optimizers = _read_all(found, own, world)
        counts = {_partitions(state["optimizer_state_dict"]) for state in found.optimizers}
        if counts != {world}:
            raise FormatError(
                f"{found.directory}: the optimizer was split over "
                f"{' and '.join(map(str, sorted(counts)))} ranks, found files of {world}; the "
                "files are not of one checkpoint, or some are missing"
            )


def _read_layers(saved: Saved) -> None:
    """Read the layers of a PipelineModule, which are whole or not loaded."""
    whole = saved.ranks[0].model["module"] is not None
    found = _matches(saved.directory, _LAYER)
    if whole:
        if found:
            raise FormatError(
                f"{found[0][1]}: a layer of a PipelineModule beside the model states of a module; "
                "they are of two checkpoints, remove one"
            )
        return
    if not found:
        raise FormatError(
            f"{saved.directory}: a checkpoint of a PipelineModule, and holds no "
            "layer_*-model_states.pt, where its weights are; copy them"
        )
    for match, path in found:
        if int(match["mp"] or 0):
            raise FormatError(
                f"{path}: of tensor-parallel rank {int(match['mp'])} of a PipelineModule; "
                "such ranks do not say how they split a layer, and are not loaded"
            )
        layer = int(match["layer"])
        if layer in saved.layers:
            raise FormatError(f"{path}: another file is of the same layer; remove one")
        saved.layers[layer] = _read_tensors(saved, path)
    saved.layers = dict(sorted(saved.layers.items()))


def _read_experts(saved: Saved, masters: bool) -> None:
    """Read the experts of DeepSpeed's own mixtures, one in each file."""
    files = {
        (int(match["layer"]), int(match["expert"])): path
        for match, path in _matches(saved.directory, _EXPERT)
    }
    optimizers = _by_rank(saved.directory, _EXPERT_OPTIM)
    counts = saved.ranks[0].model.get("num_experts") or ()
    if not isinstance(counts, list | tuple) or not all(
        type(count) is int and count >= 0 for count in counts
    ):
        raise FormatError(f"{saved.directory}: 'num_experts' is not a list of numbers")
    foreign = [
        path.name
        for (layer, expert), path in files.items()
        if layer >= len(counts) or expert >= counts[layer]
    ]
    if foreign:
        raise FormatError(
            f"{saved.directory}: {listing(foreign)}: the model states say of no such expert; the "
            "files are not of one checkpoint"
        )
    if sum(counts) != len(files):
        places = ((layer, e) for layer, count in enumerate(counts) for e in range(count))
        missing = itertools.islice((place for place in places if place not in files), 10)
        names = [f"layer_{layer}_expert_{expert}" for layer, expert in missing]
        raise FormatError(
            f"{saved.directory}: the files of {sum(counts) - len(files)} of {sum(counts)} experts "
            f"are missing: {listing(names)}; copy them"
        )
    if not (wanted := sorted(files)):
        saved.skipped += optimizers.values()
        return
    if len(saved.ranks) > 1 or saved.ranks[0].stage == 3 or (saved.directory / UNIVERSAL).is_dir():
        raise FormatError(
            f"{saved.directory}: a mixture of experts that is split over tensor-parallel ranks, "
            "or by ZeRO 3, or universal, is not loaded"
        )
    for layer, expert in wanted:
        path = files[layer, expert]
        found = _read_tensors(saved, path)
        foreign = [name for name in found if f".{_EXPERTS}.{expert}." not in name]
        if foreign or saved.experts.keys() & found.keys():
            raise FormatError(
                f"{path}: holds {listing(foreign or found)}, expected expert {expert} of layer "
                f"{layer} alone; it is in the place of another file, copy it again"
            )
        saved.experts |= found
    _check_grid(saved.directory, optimizers, 1, len(optimizers), "optimizers of experts")
    for _, path in sorted(optimizers.items()):
        if masters:
            value = torch_zip.read(path, len(saved.files))
            saved.files.append(path.absolute())
            if not isinstance(value, Mapping):
                raise FormatError(f"{path}: expected a dictionary of DeepSpeed with 'optimizer'")
            saved.expert_optimizers.append(value)
        else:
            saved.skipped.append(path)


def _read_tensors(saved: Saved, path: Location) -> dict[str, Stored]:
    value = torch_zip.read(path, len(saved.files))
    saved.files.append(path.absolute())
    if not isinstance(value, Mapping) or not all(isinstance(t, Stored) for t in value.values()):
        raise FormatError(f"{path}: expected a dictionary of tensors, as DeepSpeed writes it")
    return {str(name): tensor for name, tensor in value.items()}


def _read_universal(saved: Saved, masters: bool) -> None:
    """Read the parameters of a universal checkpoint, each a file in a folder of its name."""
    if len(saved.ranks) > 1:
        raise FormatError(
            f"{saved.directory}: a universal checkpoint of {len(saved.ranks)} tensor or pipeline "
            "parallel ranks is not loaded; give the checkpoint that it was made from"
        )
    (found,) = saved.ranks
    paths = sorted(path for path in (saved.directory / UNIVERSAL).rglob("*") if path.is_file())
    wanted = [path for path in paths if path.name == _PARAMETER] if masters else []
    saved.skipped += [path for path in paths if path not in set(wanted)]
    found.parameters = {}
    for path in wanted:
        value = torch_zip.read(path, len(saved.files))
        saved.files.append(path.absolute())
        tensor = value.get("param") if isinstance(value, Mapping) else value
        if not isinstance(tensor, Stored):
            raise FormatError(f"{path}: expected a tensor, alone or as 'param' of a dictionary")
        found.parameters[path.parent.name] = tensor


def _partitions(state: Mapping[str, Any]) -> int:
    """Return over how many ranks an optimizer is split; groups of experts over fewer."""
    count = state.get("partition_count", 1)
    counts = count if isinstance(count, list) else [count]
    return max((one for one in counts if type(one) is int), default=1)


def _matches(directory: Location, pattern: re.Pattern[str]) -> list[tuple[re.Match[str], Location]]:
    """Return the files of a kind with what their names say."""
    found = ((pattern.fullmatch(path.name), path) for path in sorted(directory.iterdir()))
    return [(match, path) for match, path in found if match is not None]


def _by_rank(directory: Location, pattern: re.Pattern[str]) -> dict[tuple[int, int], Location]:
    """Return the files of a kind by model- and data-parallel rank."""
    found: dict[tuple[int, int], Location] = {}
    for match, path in _matches(directory, pattern):
        groups = match.groupdict()
        rank = (int(groups["mp"]), int(groups.get("dp") or 0))
        if rank in found:
            raise FormatError(
                f"{path}: {found[rank].name} is of the same rank; they are of two checkpoints, "
                "remove one"
            )
        found[rank] = path
    return found


def _read_all(
    found: Checkpoint, files: Mapping[int, Location], world: int
) -> list[Mapping[str, Any]]:
    """Return the pickles of all ranks, which must be of one save."""
    states = [_read_file(found, files[rank]) for rank in range(world)]
    for rank, state in enumerate(states):
        for key in ("ds_version", "global_steps"):
            if state.get(key) != states[0].get(key):
                raise FormatError(
                    f"{files[rank]}: its {key} is not that of {files[0].name}; the files are not "
                    "of one checkpoint"
                )
    return states


def _read_file(found: Checkpoint, path: Location) -> Mapping[str, Any]:
    value = torch_zip.read(path, len(found.files))
    found.files.append(path.absolute())
    of_model = "_model_states" in path.name
    key, kind = ("module", object) if of_model else ("optimizer_state_dict", Mapping)
    if not (isinstance(value, Mapping) and key in value and isinstance(value[key], kind)):
        raise FormatError(f"{path}: expected a dictionary of DeepSpeed with {key!r}")
    return value


def _check_kind(model: Mapping[str, Any], directory: Location, count: int) -> None:
    """Raise where model states are not of as many ranks as there are, or of a kind not loaded."""
    if model["module"] is not None and not isinstance(model["module"], Mapping):
        raise FormatError(f"{directory}: 'module' of the model states is no dictionary of tensors")
    if isinstance((model["module"] or {}).get("language_model"), Mapping):
        raise FormatError(
            f"{directory}: 'module' of the model states is the nested tree of a legacy Megatron "
            "model (language_model), in parts of ZeRO 3, which are not put together; gather them "
            "with zero_to_fp32 of DeepSpeed, or save with stage3_gather_16bit_weights_on_model_save"
        )
    if model.get("ds_autoep_layers"):
        raise FormatError(
            f"{directory}: AutoEP has split the experts of this checkpoint, which is not loaded; "
            "save it without, or gather it with DeepSpeed"
        )
    degrees = model.get("checkpoint_parallel_dimensions")
    degrees = degrees if isinstance(degrees, Mapping) else {}
    sizes = [degrees.get(key) for key in ("pp_degree", "tp_degree")]
    said = [size for size in sizes if type(size) is int]
    exact = len(said) == len(sizes)
    size = model.get("mp_world_size")
    wanted = math.prod(said) if exact else size if type(size) is int else 1
    if count < wanted or (exact and count > wanted):
        raise FormatError(
            f"{directory}: split over {wanted} tensor or pipeline parallel ranks, found files of "
            f"{count}; copy all of them, and of one checkpoint"
        )
    for key, sound in _SOUND.items():
        if model.get(key) is not None and not sound(model[key]):
            raise FormatError(
                f"{directory}: {key!r} of the model states is not what DeepSpeed writes; the files "
                "are damaged, or of a version that is not known"
            )


def _are_shapes(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(shape, tuple | list) and all(type(size) is int and size >= 0 for size in shape)
        for shape in value.values()
    )


def _are_names(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


_SOUND: Mapping[str, Callable[[Any], bool]] = {
    "param_shapes": lambda value: isinstance(value, list) and all(map(_are_shapes, value)),
    "frozen_param_shapes": _are_shapes,
    "frozen_param_fragments": lambda value: isinstance(value, Mapping),
    "shared_params": lambda value: isinstance(value, Mapping) and _are_names(value.values()),
    "buffer_names": lambda value: isinstance(value, list) and _are_names(value),
}
"""What is relied on in the model states, where it is there."""
