"""Tensors that ranks share, in the rank files of `torch.save`: DTensor and ShardedTensor.

A rank's file holds its local tensor, and beside it what the whole is and where the local tensor
lies in it:

    DTensor        global size; the mesh, this rank's coordinates in it, one placement per mesh axis
    ShardedTensor  global size; offsets and sizes of each local shard

torch makes these objects only inside the process group that saved them. Here they stay records, and
any number of ranks is read by one process.

Source: torch:torch/distributed/tensor/_api.py, torch/distributed/tensor/_utils.py,
torch/distributed/device_mesh.py, torch/distributed/_shard/sharded_tensor/api.py @ v2.13.0. Meshes
of older torch: torch/distributed/device_mesh.py @ 00131b6 (`mesh` instead of a layout) and
torch/distributed/_mesh_layout.py @ 000fedc (a layout of ``shape`` and ``stride``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ckptx.containers.pickle_values import Record, TorchDtype
from ckptx.errors import FormatError
from ckptx.tensors import tiling
from ckptx.tensors.joins import tile
from ckptx.tensors.lazy import Filled, LazyTensor, Shape, Stored, replicated

_WRAPPED = "_rebuild_from_type_v2"
"""How subclasses of a tensor that wrap others are pickled, in `torch._tensor`."""


class Rank(NamedTuple):
    """Whose file is read: its name for errors, its rank, and how many ranks there are."""

    file: str
    number: int
    world: int


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank has of a tensor: local tensors by their offsets in the whole of ``shape``."""

    dtype: str
    shape: Shape
    boxes: tuple[tuple[Shape, Stored], ...]


class Placement(NamedTuple):
    """How a tensor lies along one axis of a mesh.

    ``axis`` is that of the tensor which is split, None for copies. ``split_factor`` is 1, or for a
    `_StridedShard` into how many parts later mesh axes have split the same axis before.
    """

    axis: int | None
    split_factor: int = 1


def share(value: Any, rank: Rank, name: str) -> Share:
    """Return what a rank's file holds under a name.

    Raises:
        FormatError: it is no tensor, of a kind that is not known, does not fit its own description,
            or is of another rank or another number of ranks than the file's name says.
    """
    where = f"{rank.file}: {name!r}"
    if isinstance(value, Stored):
        return Share(value.dtype, value.shape, (((0,) * len(value.shape), value),))
    try:
        kind, dtype, shape, state = _wrapped(value)
        boxes = _READERS[kind](state, shape, rank, where)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        found = type(value).__name__
        raise FormatError(
            f"{where}: expected a tensor, a DTensor or a ShardedTensor, found {found} that is none "
            f"of them as torch saves them ({type(error).__name__}: {error!s:.80})"
        ) from error
    for offsets, local in boxes:
        if local.dtype != dtype or len(offsets) != len(shape) or len(local.shape) != len(shape):
            raise FormatError(
                f"{where}: expected a local tensor {dtype} of {len(shape)} axes, found "
                f"{local.dtype} {list(local.shape)}; the file is damaged"
            )
    return Share(dtype, shape, boxes)


def is_sharded(value: Any) -> bool:
    """Return whether a value is what one rank holds of a tensor."""
    if not isinstance(value, Record) or type(value).name != _WRAPPED or len(value.args) < 2:
        return False
    return getattr(value.args[1], "name", None) in tuple(_READERS)


def whole(shares: Sequence[Share], where: str) -> LazyTensor:
    """Return the tensor of which every rank has a share; equal boxes are copies, to be compared.

    Raises:
        FormatError: shares are of different tensors, overlap, or leave something out.
    """
    first = shares[0]
    for number, other in enumerate(shares):
        if (other.dtype, other.shape) != (first.dtype, first.shape):
            raise FormatError(
                f"{where}: expected {first.dtype} {list(first.shape)}, as in rank 0, found "
                f"{other.dtype} {list(other.shape)} in rank {number}; the files are of different "
                "runs"
            )
    copies: dict[tuple[Shape, Shape], list[LazyTensor]] = {}
    for one in shares:
        for offsets, local in one.boxes:
            if local.numel:
                copies.setdefault((offsets, local.shape), []).append(local)
    if fault := tiling.fault(first.shape, list(copies)):
        raise FormatError(f"{where}: {fault}; the rank files are not those of one checkpoint")
    if not copies:
        return Filled(first.dtype, first.shape)
    parts = [(offsets, replicated(same)) for (offsets, _), same in copies.items()]
    return tile(first.shape, parts)


def local_box(
    shape: Shape, mesh: Shape, coordinates: Shape, placements: Sequence[Placement]
) -> tuple[Shape, Shape]:
    """Return offsets and sizes, in elements, of what a rank has of a tensor of ``shape``.

    Each mesh axis cuts as `torch.chunk` does: parts of ``ceil(length / ranks)``, the last ones
    smaller or empty. Plain shards cut first, from left to right. Those that are strided cut what
    these have left, from right to left: FSDP shards what tensor parallelism has sharded before.

    Examples:
        >>> rows = Placement(0)
        >>> local_box((5, 4), (2,), (1,), [rows])
        ((3, 0), (2, 4))
        >>> local_box((8, 4), (2, 2), (0, 1), [Placement(0, split_factor=2), rows])
        ((4, 0), (2, 4))
    """
    offsets, sizes = [0] * len(shape), list(shape)
    axes = range(len(mesh))
    order = [a for a in axes if placements[a].split_factor == 1]
    order += [a for a in reversed(axes) if placements[a].split_factor > 1]
    for mesh_axis in order:
        if (axis := placements[mesh_axis].axis) is None:
            continue
        full = -(-sizes[axis] // mesh[mesh_axis])
        start = min(sizes[axis], coordinates[mesh_axis] * full)
        offsets[axis] += start
        sizes[axis] = min(sizes[axis] - start, full)
    return tuple(offsets), tuple(sizes)


def _wrapped(value: Any) -> tuple[str, str, Shape, Any]:
    """Return class, dtype, global shape and state of a wrapper subclass of a tensor."""
    if not isinstance(value, Record) or type(value).name != _WRAPPED:
        raise TypeError("no wrapper subclass")
    function, kind, (_, dtype, size, *_), state = value.args
    if function.name != "_rebuild_wrapper_subclass" or not isinstance(dtype, TorchDtype):
        raise TypeError(f"rebuilt by {function.name}")
    return kind.name, dtype.name, _numbers(size), state


def _dtensor(state: Any, shape: Shape, rank: Rank, where: str) -> tuple[tuple[Shape, Stored], ...]:
    attributes = _attributes(state)
    local = attributes["_local_tensor"]
    spec = _attributes(attributes["_spec"])
    if not isinstance(local, Stored):
        raise TypeError(f"a local tensor that is {type(local).__name__}")
    mesh = _attributes(spec["mesh"])
    sizes = _mesh_sizes(mesh)
    _check_mesh(mesh, sizes, rank, where)
    placements = [_placement(one, where) for one in spec["placements"]]
    coordinates = _numbers(mesh["_coordinate_on_dim"])
    if not len(placements) == len(coordinates) == len(sizes):
        raise ValueError(f"{len(placements)} placements on a mesh of {list(sizes)}")
    if any(place >= size for place, size in zip(coordinates, sizes, strict=True)):
        raise ValueError(f"coordinates {list(coordinates)} in a mesh of {list(sizes)}")
    _check_strides(sizes, placements, where)
    offsets, expected = local_box(shape, sizes, coordinates, placements)
    if local.shape != expected and not (0 in expected and not local.numel):
        raise FormatError(
            f"{where}: expected a local tensor {list(expected)} at coordinates {list(coordinates)} "
            f"of mesh {list(sizes)}, found {list(local.shape)}; the file is damaged"
        )
    return ((offsets, local),) if local.numel else ()


def _sharded_tensor(
    state: Any, shape: Shape, rank: Rank, where: str
) -> tuple[tuple[Shape, Stored], ...]:
    shards, _, group, *_ = state
    if group is not None:
        saved = _attributes(group)
        _check_rank(saved["global_rank"], rank, where)
        if saved["global_world_size"] != rank.world:
            raise FormatError(
                f"{where}: was saved by {saved['global_world_size']} ranks, the file's name says "
                f"{rank.world}; the files are of different runs"
            )
    boxes = []
    for shard in shards:
        entry = _attributes(shard)
        local, place = entry["tensor"], _attributes(entry["metadata"])
        if not isinstance(local, Stored) or local.shape != _numbers(place["shard_sizes"]):
            raise ValueError("a shard that is not of the size which its metadata says")
        if local.numel:
            boxes.append((_numbers(place["shard_offsets"]), local))
    return tuple(boxes)


_READERS = {"DTensor": _dtensor, "ShardedTensor": _sharded_tensor}


def _placement(record: Any, where: str) -> Placement:
    kind = type(record).name
    attributes = _attributes(record)
    if kind == "Replicate":
        return Placement(None)
    if kind == "Shard":
        return Placement(_number(attributes["dim"]))
    if kind == "_StridedShard":
        return Placement(_number(attributes["dim"]), _number(attributes["split_factor"]))
    raise FormatError(
        f"{where}: found placement {kind}, expected Shard or Replicate; a tensor whose values are "
        "yet to be reduced or that is split otherwise cannot be put together"
    )


def _check_strides(mesh: Shape, placements: Sequence[Placement], where: str) -> None:
    """Raise unless every strided shard is strided over the later shards of its axis, as FSDP's."""
    for number, one in enumerate(placements):
        later = math.prod(
            size
            for size, other in zip(mesh[number + 1 :], placements[number + 1 :], strict=True)
            if other.axis == one.axis
        )
        if one.split_factor not in (1, later):
            raise FormatError(
                f"{where}: found _StridedShard with split factor {one.split_factor}, expected "
                f"{later}, the number of parts that later axes of mesh {list(mesh)} make"
            )


def _mesh_sizes(mesh: Mapping[str, Any]) -> Shape:
    """Return the shape of a mesh, of the attributes that a `DeviceMesh` has had over time."""
    if "_layout" not in mesh:
        tensor = mesh["mesh"]  # of older torch: the ranks as a tensor
        if not isinstance(tensor, Stored):
            raise TypeError("a mesh that is no tensor")
        return tensor.shape
    layout = _attributes(mesh["_layout"])
    axes = [_attributes(axis)["shape"] for axis in layout["axes"]] if "axes" in layout else None
    shape = layout["shape"] if axes is None else axes
    sizes = shape if isinstance(shape, list | tuple) else (shape,)
    return tuple(math.prod(_numbers(_flat(size))) for size in sizes)


def _check_mesh(mesh: Mapping[str, Any], sizes: Shape, rank: Rank, where: str) -> None:
    """Raise unless the mesh, or that of which it is a part, has all ranks and this one."""
    if mesh.get("_rank") is not None:
        _check_rank(mesh["_rank"], rank, where)
    root = mesh.get("_root_mesh")
    all_sizes = sizes if root is None else _mesh_sizes(_attributes(root))
    known = "_root_mesh" in mesh  # else, of older torch, a part of a mesh does not say of which
    found = math.prod(all_sizes)
    if found != rank.world if known else not found or rank.world % found:
        raise FormatError(
            f"{where}: was saved on a mesh of {list(all_sizes)}, {found} ranks, the file's name "
            f"says {rank.world}; the files are of different runs"
        )


def _check_rank(found: Any, rank: Rank, where: str) -> None:
    if found != rank.number:
        raise FormatError(
            f"{where}: was saved by rank {found!s:.20}, the file's name says {rank.number}; give "
            "the files their own names again"
        )


def _attributes(value: Any) -> Mapping[str, Any]:
    """Return the attributes of an object, with or without ``__slots__``."""
    state = value.state if isinstance(value, Record) else value
    found: dict[str, Any] = {}
    for part in state if isinstance(state, tuple) else (state,):
        found.update(part or {})
    return found


def _flat(value: Any) -> tuple[Any, ...]:
    """Return the numbers of nested tuples in order."""
    if not isinstance(value, list | tuple):
        return (value,)
    return tuple(number for item in value for number in _flat(item))


def _numbers(values: Any) -> Shape:
    return tuple(_number(value) for value in values)


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!s:.20} where a natural number belongs")
    return value
