"""Shards that `HuggingFaceStorageWriter` of `torch.distributed.checkpoint` writes.

    shard-00001-model-00001-of-00001.safetensors      the chunks of rank 0
    shard-00002-model-00001-of-00001.safetensors      ... of rank 1

The header of each says under ``DCP_SHARDING_INFO`` where in the whole tensors its chunks begin.
There is no ``.metadata``, and nothing says how many shards there are, or how large a tensor is: it
reaches as far as its chunks do.

Source: torch:torch/distributed/checkpoint/{hf_storage,_hf_utils}.py @ v2.13.0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ckptx.containers import safetensors
from ckptx.errors import FormatError
from ckptx.storage.location import Location
from ckptx.tensors import tiling
from ckptx.tensors.joins import tile
from ckptx.tensors.lazy import Filled, LazyTensor, Shape, Stored

_SHARD = re.compile(r"shard-\d{5,}-model-\d{5,}-of-\d{5,}\.safetensors")
_INFO = "DCP_SHARDING_INFO"
_OFFSETS = "saved_offsets"


def shards(directory: Location) -> list[Location]:
    """Return the shards in a directory, in order of rank."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _SHARD.fullmatch(path.name))


def tensors(paths: list[Location]) -> tuple[dict[str, LazyTensor], dict[str, Stored]]:
    """Return the tensors of shards put together, and every chunk under a name of its own.

    ``paths`` are the file table that both refer to.

    Raises:
        FormatError: a file is damaged or says no offsets, or chunks overlap or leave gaps.
    """
    chunks: dict[str, list[tuple[Shape, Stored]]] = {}
    stored: dict[str, Stored] = {}
    for number, path in enumerate(paths):
        offsets = _offsets(path)
        for name, chunk in safetensors.tensors(path, number).items():
            origin = _origin(path, name, chunk, offsets)
            chunks.setdefault(name, []).append((origin, chunk))
            stored[f"{path.name}: {name}"] = chunk
    return {name: _whole(paths, name, parts) for name, parts in chunks.items()}, stored


def _offsets(path: Location) -> Mapping[str, Any]:
    said = safetensors.read_header(path).metadata.get(_INFO)
    try:
        value = json.loads(said or "")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise FormatError(
            f"{path}: expected {_INFO} in the header, which says where its chunks belong; it is "
            "no shard of torch.distributed.checkpoint"
        )
    return value


def _origin(path: Location, name: str, chunk: Stored, offsets: Mapping[str, Any]) -> Shape:
    entry = offsets.get(name)
    origin = entry.get(_OFFSETS) if isinstance(entry, dict) else None
    natural = isinstance(origin, list) and all(type(n) is int and n >= 0 for n in origin)
    if not natural or len(origin or ()) != len(chunk.shape):
        raise FormatError(
            f"{path}: {name!r} is {list(chunk.shape)}, found {_OFFSETS} {str(origin)[:80]} in "
            f"{_INFO}; the file is damaged"
        )
    return tuple(origin or ())


def _whole(paths: list[Location], name: str, parts: list[tuple[Shape, Stored]]) -> LazyTensor:
    ranks = {len(origin) for origin, _ in parts}
    dtypes = {chunk.dtype for _, chunk in parts}
    where = f"{paths[0].parent}: {name!r}"
    if len(ranks) > 1 or len(dtypes) > 1:
        raise FormatError(f"{where}: shards hold chunks of different axes or dtypes")
    shape = tuple(
        max(origin[axis] + chunk.shape[axis] for origin, chunk in parts)
        for axis in range(ranks.pop())
    )
    if fault := tiling.fault(shape, [(origin, chunk.shape) for origin, chunk in parts]):
        raise FormatError(f"{where}: {fault}; a shard is missing, or one is of another checkpoint")
    solid = [(origin, chunk) for origin, chunk in parts if 0 not in chunk.shape]
    return tile(shape, solid) if solid else Filled(dtypes.pop(), shape)
