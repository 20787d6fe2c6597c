"""Transforms: reversible rearrangements between canonical tensors and those of a layout.

No schema author writes an inverse: what packs a layout's tensor unpacks it, too. ``tp`` scales the
head counts of a model to those of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias

from ckptx.errors import SchemaError
from ckptx.model.spec import ModelSpec
from ckptx.tensors.joins import concat, deinterleave, interleave, rejoin, stack, unstacked
from ckptx.tensors.lazy import LazyTensor, Shape

Tensor: TypeAlias = LazyTensor


class Transform(Protocol):
    """A reversible rearrangement between canonical tensors and those of a layout.

    ``tp`` is the number of ranks the tensors are cut over; it scales the model's head counts.
    """

    def pack(self, canonical: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        """Return the layout's tensors."""

    def unpack(self, packed: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        """Return the canonical tensors."""

    def origins(self, shapes: Sequence[Shape]) -> list[tuple[int, Shape]]:
        """Return where each canonical tensor lies: the packed tensor's number and an origin in it.

        Raises:
            SchemaError: the transform does not lay its tensors side by side.
        """


class Rearranged:
    """What does not lay canonical tensors side by side in its own; ``apart`` says why."""

    apart: ClassVar[str]

    def origins(self, shapes: Sequence[Shape]) -> list[tuple[int, Shape]]:
        """Raise a SchemaError: no canonical tensor lies as it is in one of the layout."""
        raise SchemaError(self.apart)


class _Same:
    """The layout holds the canonical tensors as they are."""

    def pack(self, canonical: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        return list(canonical)

    def unpack(self, packed: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        return list(packed)

    def origins(self, shapes: Sequence[Shape]) -> list[tuple[int, Shape]]:
        return [(number, (0,) * len(shape)) for number, shape in enumerate(shapes)]


@dataclass(frozen=True, slots=True)
class _Glu:
    """Gate and up projection in one tensor, all gate rows first; rows lie along ``axis``."""

    axis: int = 0

    def pack(self, canonical: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        return [concat(canonical, self.axis)]

    def unpack(self, packed: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        (fused,) = packed
        half, odd = divmod(fused.shape[self.axis], 2)
        if odd:
            raise SchemaError(f"a gated weight of {fused.shape[self.axis]} rows has no two halves")
        return deinterleave(fused, [half, half], groups=1, axis=self.axis)

    def origins(self, shapes: Sequence[Shape]) -> list[tuple[int, Shape]]:
        gate, up = shapes
        second = tuple(gate[axis] if axis == self.axis else 0 for axis in range(len(up)))
        return [(0, (0,) * len(gate)), (0, second)]


@dataclass(frozen=True, slots=True)
class _Each(Rearranged):
    """One set of tensors per expert; canonical tensors have the experts on their first axis.

    Packed tensors run expert by expert, ``width`` for each, as names with ``{expert}`` do.
    """

    apart = "experts of their own do not lie side by side in one tensor"

    transform: Transform
    width: int

    def pack(self, canonical: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        packed: list[Tensor] = []
        for own in zip(*map(unstacked, canonical), strict=True):
            packed += self.transform.pack([tensor.squeeze() for tensor in own], spec, tp)
        return packed

    def unpack(self, packed: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        parts = [
            self.transform.unpack(packed[start : start + self.width], spec, tp)
            for start in range(0, len(packed), self.width)
        ]
        return [stack(tensors) for tensors in zip(*parts, strict=True)]


@dataclass(frozen=True, slots=True)
class _Grouped(Rearranged):
    """All experts in one matrix, transposed: ``weight1``, ``weight2`` of Megatron's GroupedMLP.

    Memory holds one [in, out] matrix per expert after another. ``weight1`` is shaped as if they lay
    side by side, [in, experts * out], ``weight2`` as they do lie, [experts * in, out].

    Source: NVIDIA/Megatron-LM megatron/core/transformer/moe/experts.py, GroupedMLP @ core_v0.12.3.
    """

    apart = "grouped experts do not lie side by side as they are"

    transform: Transform
    side_by_side: bool

    def pack(self, canonical: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        packed = self.transform.pack(canonical, spec, tp)
        joined = []
        for tensor in packed:
            experts, rows, _ = tensor.shape
            turned = tensor.permute((0, 2, 1)).merge(0)
            joined.append(turned.merge(0).split(0, experts * rows) if self.side_by_side else turned)
        return joined

    def unpack(self, packed: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        (tensor,) = packed
        rows = (spec.moe_ffn_hidden_size or 0) // tp  # of one expert in this shard
        if self.side_by_side:
            columns = rows * (2 if spec.gated else 1)
            tensor = tensor.merge(0).split(0, columns)
            experts = tensor.shape[0] // spec.hidden_size
            turned = tensor.split(0, tensor.shape[0] // experts)
        else:
            turned = tensor.split(0, rows)
        return self.transform.unpack([turned.permute((0, 2, 1))], spec, tp)


class _Qkv(Rearranged):
    """Query, key and value apart; canonical is fused, query group by query group.

    Source: NVIDIA/Megatron-LM megatron/core/transformer/attention.py, SelfAttention @ core_v0.16.1.
    """

    apart = "separate query, key and value do not lie side by side in one tensor"

    def pack(self, canonical: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        (fused,) = canonical
        return deinterleave(fused, self._rows(spec, tp), spec.num_query_groups // tp)

    def unpack(self, packed: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        names = ("query", "key", "value")
        for name, part, rows in zip(names, packed, self._rows(spec, tp), strict=True):
            if part.shape[0] != rows:
                raise SchemaError(
                    f"the {name} has {part.shape[0]} rows, the config says {rows}; the config does "
                    "not belong to these weights"
                )
        return [interleave(packed, spec.num_query_groups // tp)]

    def _rows(self, spec: ModelSpec, tp: int) -> list[int]:
        if spec.num_query_groups % tp:
            raise SchemaError(f"{spec.num_query_groups} query groups do not divide over {tp} ranks")
        key = spec.num_query_groups // tp * spec.kv_channels
        return [spec.num_attention_heads // tp * spec.kv_channels, key, key]


class _FusedQkv(_Qkv):
    """Query, key and value in one tensor: all heads of query, then of key, then of value.

    Source: huggingface/transformers src/transformers/models/{gpt2,phi3}/modeling_*.py @ v5.23.0.
    """

    apart = "query, key and value one after another are not in Megatron's order"

    def pack(self, canonical: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        return [rejoin(super().pack(canonical, spec, tp))]

    def unpack(self, packed: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        (fused,) = packed
        rows = self._rows(spec, tp)
        if fused.shape[0] != sum(rows):
            raise SchemaError(
                f"query, key and value have {fused.shape[0]} rows, the config says {sum(rows)}"
            )
        return super().unpack(deinterleave(fused, rows, groups=1), spec, tp)


@dataclass(frozen=True, slots=True)
class Transposed(Rearranged):
    """What ``transform`` packs, each matrix stored as [in, out]: GPT-2's ``Conv1D``."""

    apart = "a transposed tensor does not hold the canonical one as it is"

    transform: Transform

    def pack(self, canonical: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        """Return the layout's tensors, transposed."""
        return [self._turned(tensor) for tensor in self.transform.pack(canonical, spec, tp)]

    def unpack(self, packed: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        """Return the canonical tensors of transposed ones."""
        return self.transform.unpack([self._turned(tensor) for tensor in packed], spec, tp)

    def _turned(self, tensor: Tensor) -> Tensor:
        if len(tensor.shape) != 2:
            raise SchemaError(f"found {list(tensor.shape)} where a matrix is expected")
        return tensor.permute((1, 0))


class _RotaryPairs(Rearranged):
    """Query, key and value apart; those that rotate have another order of rows in every head.

    Canonical heads rotate row ``i`` with row ``i + d / 2``; here neighbours rotate together, so a
    head of ``d`` rows runs 0, d/2, 1, d/2 + 1, ...

    Source: meta-llama/llama llama/model.py, apply_rotary_emb @ main; huggingface/transformers
    src/transformers/models/llama/modeling_llama.py, rotate_half @ v5.23.0.
    """

    apart = "the rows of a rotary head do not lie side by side"

    def pack(self, canonical: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        query, key, value = canonical
        return [*(_turned(part, spec, spec.kv_channels // 2) for part in (query, key)), value]

    def unpack(self, packed: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        query, key, value = packed
        return [*(_turned(part, spec, 2) for part in (query, key)), value]


def _turned(part: Tensor, spec: ModelSpec, inner: int) -> Tensor:
    """Return heads seen as [d / inner, inner] rows with these two axes exchanged."""
    if spec.kv_channels % 2 or spec.rotary_percent != 1.0:
        raise SchemaError(
            f"heads of {spec.kv_channels} rows of which {spec.rotary_percent:g} rotate: only whole "
            "heads of even size have rotary pairs"
        )
    return _exchanged(part, spec.kv_channels, inner)


def _exchanged(tensor: Tensor, outer: int, inner: int) -> Tensor:
    """Return rows seen as [-1, outer / inner, inner] with the last two axes exchanged."""
    heads = tensor.split(0, outer).split(1, inner)
    rest = range(3, len(heads.shape))
    return heads.permute((0, 2, 1, *rest)).merge(1).merge(0)


class _InnermostQkv(Rearranged):
    """Query, key and value in turn, row by row: [heads, head size, 3]; canonical has whole heads.

    There are as many keys as queries: this order is older than query groups.
    """

    apart = "rows of query, key and value in turn do not lie side by side"

    def pack(self, canonical: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        return [self._turned(canonical, spec, spec.kv_channels)]

    def unpack(self, packed: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        return [self._turned(packed, spec, 3)]

    def _turned(self, tensors: Sequence[Tensor], spec: ModelSpec, inner: int) -> Tensor:
        (fused,), rows = tensors, 3 * spec.kv_channels
        if fused.shape[0] % rows:
            raise SchemaError(
                f"{fused.shape[0]} rows are no whole heads of query, key and value, {rows} rows "
                "each"
            )
        return _exchanged(fused, rows, inner)


@dataclass(frozen=True, slots=True)
class _Bare(Rearranged):
    """The layout leaves out so many axes of length 1 in front of each canonical tensor."""

    apart = "a tensor with fewer axes does not hold the canonical one as it is"

    axes: int

    def pack(self, canonical: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        packed = list(canonical)
        for _ in range(self.axes):
            packed = [tensor.squeeze() for tensor in packed]
        return packed

    def unpack(self, packed: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        canonical = list(packed)
        for _ in range(self.axes):
            canonical = [tensor.unsqueeze() for tensor in canonical]
        return canonical


@dataclass(frozen=True, slots=True)
class _Chain(Rearranged):
    """One transform after the other: the second rearranges what the first has packed."""

    apart = "tensors that were rearranged twice do not lie side by side"

    first: Transform
    second: Transform

    def pack(self, canonical: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        return self.second.pack(self.first.pack(canonical, spec, tp), spec, tp)

    def unpack(self, packed: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        return self.first.unpack(self.second.unpack(packed, spec, tp), spec, tp)


IDENTITY: Transform = _Same()
GLU: Transform = _Glu()
EXPERT_GLU: Transform = _Glu(axis=1)
"""Gate and up projections of experts in one tensor, [experts, rows, columns]."""
QKV: Transform = _Qkv()
FUSED_QKV: Transform = _FusedQkv()
INNERMOST_QKV: Transform = _InnermostQkv()
ROTARY_PAIRS: Transform = _RotaryPairs()


def drop_unit_axes(axes: int) -> Transform:
    """Return the transform that leaves out ``axes`` axes of length 1 in front."""
    return _Bare(axes)


def compose(first: Transform, second: Transform) -> Transform:
    """Return the transform that packs with ``first`` and then with ``second``."""
    return _Chain(first, second)


GROUPED_FC1: Transform = _Grouped(EXPERT_GLU, side_by_side=True)
"""``weight1`` of Megatron's GroupedMLP, gated."""
GROUPED_FC2: Transform = _Grouped(IDENTITY, side_by_side=False)
"""``weight2`` of Megatron's GroupedMLP."""


def per_expert(transform: Transform = IDENTITY, width: int = 1) -> Transform:
    """Return the transform of experts with tensors of their own, under names with ``{expert}``.

    ``width`` is the number of names that each expert has.
    """
    return _Each(transform, width)
