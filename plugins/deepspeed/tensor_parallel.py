r"""From the shards of AutoTP's ranks to whole tensors.

AutoTP splits the rows of a matrix, or its columns, or rows of each of several matrices in one; what
it does not split every rank has. The model states say where every piece of a shard lies:

    affine_map.params["^lm_head\\.weight$"].ranks[1].pieces[0]
        shape [11, 8]   source [96, [8, 1]]   dest [0, [8, 1]]      offset and strides, in elements
                        in the whole          in the shard

States of before this map have lists of patterns: rows, columns, or copies. Without those as well,
the shapes of the base model tell.

Source: deepspeedai/DeepSpeed deepspeed/checkpoint/affine.py, deepspeed/module_inject/layers.py
collect_autotp_universal_checkpoint_info @ v0.19.8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ckptx.errors import FormatError, PlanError
from ckptx.tensors.joins import concat, tile
from ckptx.tensors.lazy import Filled, LazyTensor, Shape, contiguous_strides, replicated

_INFO = "universal_checkpoint_info"
_COLUMNS = "parameter_with_row_parallelism_patterns"
_COPIES = "tp_replicated_parameter_patterns"
_SEVERAL = "parameter_with_sub_params"
_UNSUPPORTED = "autotp_unsupported_parameter_patterns"


class Join:
    """Joins the shards of one checkpoint; ``shapes`` are those of the base model, as far as known.

    Raises:
        FormatError: the model states are of a version that is not known.
    """

    def __init__(
        self, model: Mapping[str, Any], place: object, shapes: Mapping[str, Shape]
    ) -> None:
        self.info = _mapping(model.get(_INFO))
        self.place = place
        self.shapes = shapes
        self.shared = _mapping(model.get("shared_params"))
        affine = _mapping(self.info.get("affine_map"))
        if affine.get("version", 1) != 1:
            raise FormatError(
                f"{place}: affine_map of version {affine['version']}; known is version 1"
            )
        self.maps = _mapping(affine.get("params"))
        self.buffers = set(model.get("buffer_names") or ())

    def whole(self, name: str, shards: Sequence[LazyTensor]) -> LazyTensor:
        """Return the tensor whose shards the ranks hold; every element of each is placed.

        Raises:
            FormatError: nothing says how it was split, or the shards do not fit together.
        """
        try:
            return self._whole(self.shared.get(name, name), shards)
        except (PlanError, LookupError, TypeError, ValueError, AttributeError, re.error) as error:
            found = ", ".join(str(list(shard.shape)) for shard in shards)
            raise FormatError(
                f"{self.place}: {name!r}: shards of {found} do not make one tensor: {error}"
            ) from error

    def _whole(self, name: str, shards: Sequence[LazyTensor]) -> LazyTensor:
        pattern = f"^{re.escape(name)}$"  # DeepSpeed writes no other
        if pattern in self.maps:
            return _placed(self.maps[pattern], shards)
        if name in self.buffers:
            return replicated(shards)
        if _matching(self.info.get(_UNSUPPORTED), name):
            raise PlanError("DeepSpeed itself says that it cannot tell how it was split")
        if _COPIES in self.info and not self.maps:
            return self._by_patterns(name, shards)
        if name in self.shapes:
            return _of_shape(self.shapes[name], shards)
        raise PlanError(
            "the model states do not say how it was split; give --hf-base with the weights of "
            "the model, whose shapes tell"
        )

    def _by_patterns(self, name: str, shards: Sequence[LazyTensor]) -> LazyTensor:
        several = self.info.get(_SEVERAL) or ()
        if any(_matching(entry["patterns"], name) for entry in several):
            raise PlanError("several parts in one, and no affine_map says where each lies")
        if _matching(self.info[_COPIES], name):
            return replicated(shards)
        columns = _matching(self.info.get(_COLUMNS), name)
        whole = concat(shards, 1 if columns else 0)
        wanted = self.shapes.get(name, whole.shape)
        if wanted != whole.shape:
            raise PlanError(f"joined they are {list(whole.shape)}, the base has {list(wanted)}")
        return whole


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _matching(patterns: Any, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _placed(affine: Mapping[str, Any], shards: Sequence[LazyTensor]) -> LazyTensor:
    """Return the whole of an affine map: each piece where it says, and no element without one."""
    whole = tuple(affine["logical_shape"])
    ranks = affine["ranks"]
    if len(ranks) != len(shards):
        raise PlanError(f"the map is of {len(ranks)} ranks")
    boxes: dict[tuple[Shape, Shape], list[LazyTensor]] = {}
    for rank, shard in enumerate(shards):
        said = ranks[rank] if rank in ranks else ranks[str(rank)]
        if tuple(said["shard_shape"]) != shard.shape:
            raise PlanError(f"the map says {list(said['shard_shape'])} for rank {rank}")
        covered = []
        for piece in said["pieces"]:
            if piece.get("scale", 1.0) != 1.0:
                raise PlanError(f"rank {rank} holds it times {piece['scale']}, which is not undone")
            shape = tuple(piece["shape"])
            if 0 in shape:
                continue
            start = _origin(piece["dest"], shape, shard.shape)
            part = shard
            for axis, (low, size) in enumerate(zip(start, shape, strict=True)):
                part = part.narrow(axis, low, low + size)
            covered.append((start, Filled(shard.dtype, shape)))
            boxes.setdefault((_origin(piece["source"], shape, whole), shape), []).append(part)
        if shard.numel:
            tile(shard.shape, covered)  # nothing of a shard is left out or used twice
    return tile(whole, [(origin, replicated(copies)) for (origin, _), copies in boxes.items()])


def _origin(place: Sequence[Any], shape: Shape, around: Shape) -> Shape:
    """Return where a box starts in a row-major tensor, from its offset and strides there."""
    offset, strides = place
    rows = contiguous_strides(around)
    if len(shape) != len(around) or any(
        size > 1 and found != stride
        for size, found, stride in zip(shape, strides, rows, strict=True)
    ):
        raise PlanError(f"strides of {list(strides)} are not those of a box in {list(around)}")
    origin = []
    for stride in rows:
        origin.append(offset // stride)
        offset %= stride
    return tuple(origin)


def _of_shape(shape: Shape, shards: Sequence[LazyTensor]) -> LazyTensor:
    """Return the shards as a tensor of a shape, where that tells along which axis they lie."""
    if all(shard.shape == shape for shard in shards):
        return replicated(shards)
    first = shards[0].shape
    axes = [axis for axis, size in enumerate(shape) if size != first[axis]]
    if len(axes) != 1:
        raise PlanError(f"the base has {list(shape)}, which no one axis makes of them")
    whole = concat(shards, axes[0])
    if whole.shape != shape:
        raise PlanError(f"joined they are {list(whole.shape)}, the base has {list(shape)}")
    return whole
