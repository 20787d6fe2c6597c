"""RLinf's local shards: what each rank's ``state_dict()`` gives, without where it lies.

    local_shard_checkpoint/
        checkpoint_rank_0.pt    {"model": {name: tensor}, "optimizers": ..., "lr_schedulers": ...,
                                 "fsdp_version": "fsdp2", "rng": ...}

DTensors were reduced to their local tensors, so places have to follow from how RLinf shards. Under
``fsdp`` (FSDP 1) a state dict is a full one: every rank holds the whole model. Under ``fsdp2`` the
mesh has one axis and parameters are cut along their first one, in parts as of `torch.chunk`. What
no rank says is how long a whole tensor is: only the dimensions of a known model show that the last
ranks are there, and that a tensor which all ranks hold alike is no buffer.

Source: RLinf/RLinf rlinf/hybrid_engines/fsdp/strategy/{base,checkpoint,fsdp}.py,
rlinf/hybrid_engines/fsdp/utils.py (create_device_mesh, apply_fsdp2_to_model) @ a3816b5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ckptx.containers import torch_zip
from ckptx.errors import FormatError, listing
from ckptx.plugins.run_directory import all_ranks, check_same_tensors, names_in
from ckptx.protocol.messages import TRAINING_STATE, Dropped, SourceTensor
from ckptx.storage.location import Location
from ckptx.tensors.joins import concat
from ckptx.tensors.lazy import LazyTensor, Stored, replicated

FOLDER = "local_shard_checkpoint"
_FILE = re.compile(r"checkpoint_rank_(0|[1-9]\d{0,5})\.pt")
_WHOLE, _ROWS = "fsdp", "fsdp2"


def holds_shards(directory: Location) -> bool:
    """Return whether a directory is one of local shards."""
    return directory.is_dir() and any(_FILE.fullmatch(path.name) for path in directory.iterdir())


def read(
    directory: Location,
) -> tuple[dict[str, LazyTensor], tuple[SourceTensor, ...], tuple[str, ...], tuple[Dropped, ...]]:
    """Return the tensors of the model, those of all ranks, the files, and what stays behind.

    Raises:
        FormatError: ranks are missing, damaged, or do not hold shares of the same tensors.
    """
    ranks = {int(m[1]): directory / m[0] for m in map(_FILE.fullmatch, names_in(directory)) if m}
    named = "checkpoint_rank_{}.pt"
    files = all_ranks(directory, ranks, max(ranks) + 1, named, "at least ")
    held: dict[str, list[Stored]] = {}
    sources: list[SourceTensor] = []
    kinds: dict[str, Location] = {}
    left: dict[str, None] = {}
    for number, file in enumerate(files):
        value = torch_zip.read(file, number)
        state = _state(value, file)
        kinds.setdefault(value["fsdp_version"], file)
        left |= dict.fromkeys(str(key) for key in value if key not in ("model", "fsdp_version"))
        for name, tensor in state.items():
            if not isinstance(tensor, Stored):
                raise FormatError(
                    f"{file}: {name!r}: expected a tensor, found {type(tensor).__name__}"
                )
            held.setdefault(str(name), []).append(tensor)
            sources.append(SourceTensor(f"rank {number}: {name}", tensor))
        check_same_tensors(held, number + 1, file)
    if len(kinds) > 1:
        raise FormatError(
            f"{directory}: {' and '.join(path.name for path in kinds.values())} are of FSDP "
            f"versions {' and '.join(kinds)}; the files are of different runs"
        )
    (version,) = kinds
    join = _copies if version == _WHOLE else _rows
    tensors = {name: join(parts, f"{directory}: {name!r}") for name, parts in held.items()}
    dropped = tuple(Dropped(key, TRAINING_STATE) for key in left)
    return tensors, tuple(sources), tuple(str(file.absolute()) for file in files), dropped


def _state(value: Any, file: Location) -> Mapping[Any, Any]:
    state = value.get("model") if isinstance(value, Mapping) else None
    if not isinstance(state, Mapping) or not state:
        raise FormatError(f"{file}: expected a dictionary with the tensors of 'model'")
    version = value.get("fsdp_version")
    if version not in (_WHOLE, _ROWS):
        raise FormatError(
            f"{file}: says fsdp_version {version!r:.40}, expected {_WHOLE!r} or {_ROWS!r}; give "
            "dcp_checkpoint, or model_state_dict/full_weights.pt"
        )
    return state


def _copies(parts: list[Stored], where: str) -> LazyTensor:
    """Return the tensor that every rank holds whole."""
    if len({(part.shape, part.dtype) for part in parts}) > 1:
        raise FormatError(
            f"{where}: ranks hold different shapes, where FSDP 1 gives all the whole tensor; the "
            "files are of different runs"
        )
    return replicated(list(parts))


def _rows(parts: list[Stored], where: str) -> LazyTensor:
    """Return the tensor of which ranks hold rows, as many as `torch.chunk` gives each."""
    first = parts[0]
    if not first.shape:
        return _copies(parts, where)
    if len({(part.shape[1:], part.dtype) for part in parts}) > 1:
        raise FormatError(
            f"{where}: ranks hold rows of different lengths or dtypes; the files are of different "
            "runs"
        )
    found = [part.shape[0] for part in parts]
    total, most = sum(found), -(-sum(found) // len(parts))
    expected = [max(0, min(most, total - rank * most)) for rank in range(len(parts))]
    if found != expected:
        raise FormatError(
            f"{where}: ranks hold {listing(map(str, found))} rows, FSDP 2 gives "
            f"{listing(map(str, expected))}; a rank is missing or of another run"
        )
    return concat([part for part in parts if part.shape[0]] or [first], 0)
