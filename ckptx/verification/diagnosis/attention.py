"""Mistakes in the rows of query, key and value.

Canonical is Megatron Core's order, query group by query group: the queries of a group, its key, its
value. Others are all queries, then keys, then values, as in GPT-2, Phi-3 and checkpoint_version 0
of Megatron; the same for every tensor-parallel rank by itself; and, of version 1, query, key and
value in turn, row by row.

Source: NVIDIA/Megatron-LM megatron/training/checkpointing.py, fix_query_key_value_ordering
@ core_v0.12.3; huggingface/transformers models/phi3/modeling_phi3.py @ v5.23.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

from ckptx.model.spec import ModelSpec
from ckptx.tensors.joins import concat, deinterleave, interleave
from ckptx.tensors.lazy import LazyTensor
from ckptx.verification.diagnosis.mistakes import Hypothesis, Read, TensorPair, Variant, on_one
from ckptx.verification.pairing import Name

PARTS = ("query", "key", "value")
FUSED = ("qkv weight", "qkv bias")


def part_names(name: Name) -> list[Name]:
    """Return names for query, key and value within a fused tensor."""
    message, key = name
    return [(message, f"{key}/{part}") for part in PARTS]


def rows_of(spec: ModelSpec) -> list[int]:
    """Return the rows of query, key and value."""
    key = spec.num_query_groups * spec.kv_channels
    return [spec.num_attention_heads * spec.kv_channels, key, key]


def fits(subject: TensorPair) -> bool:
    """Return whether a tensor is a fused attention of the model's dimensions, on both sides."""
    spec = subject.spec
    return (
        spec is not None
        and subject.name[1] in FUSED
        and not spec.multi_latent_attention
        and subject.a == subject.b
        and subject.a[0] == spec.qkv_rows
    )


def parts_of(fused: LazyTensor, spec: ModelSpec) -> list[LazyTensor]:
    """Return query, key and value of a fused tensor in canonical order."""
    return deinterleave(fused, rows_of(spec), spec.num_query_groups)


def fused_of(parts: Sequence[LazyTensor], spec: ModelSpec) -> LazyTensor:
    """Return query, key and value as one tensor in canonical order."""
    return interleave(parts, spec.num_query_groups)


@dataclass(frozen=True, slots=True)
class _Order:
    """An order of the rows of a fused tensor."""

    said: str
    pack: Callable[[Sequence[LazyTensor]], LazyTensor]
    unpack: Callable[[LazyTensor], list[LazyTensor]]


def _in_groups(said: str, groups: int, rows: list[int]) -> _Order:
    return _Order(
        said,
        lambda parts: interleave(parts, groups),
        lambda fused: deinterleave(fused, rows, groups),
    )


def _orders(spec: ModelSpec) -> list[_Order]:
    rows, groups = rows_of(spec), spec.num_query_groups
    plural = "query group by query group" if rows[0] != rows[1] else "head by head"
    version = ", checkpoint_version 0" if rows[0] == rows[1] else ""
    found = [
        _in_groups(f"{plural} (Megatron)", groups, rows),
        _in_groups(f"all queries, all keys, all values ([Q; K; V]{version})", 1, rows),
    ]
    if rows[0] == rows[1]:
        in_turn = "query, key and value in turn, row by row (checkpoint_version 1)"
        found.append(_in_groups(in_turn, rows[0], rows))
    found += [
        _in_groups(f"[Q; K; V] for each of {ranks} tensor-parallel ranks", ranks, rows)
        for ranks in range(2, min(groups, 65))
        if groups % ranks == 0
    ]
    return found


class QkvOrder:
    """The rows of query, key and value lie in one order and were read as another."""

    name = "qkv-order"
    title = "the rows of query, key and value are in the wrong order"
    advice = (
        "One of the two was written, or read, with another order of the fused attention weight. "
        "Convert it again from its original with the right format (Megatron's checkpoint_version, "
        "the right number of query groups); do not use it as it is: attention mixes heads."
    )

    def forms(self, subject: TensorPair) -> Iterator[Variant]:
        """Return every pair of orders."""
        if not fits(subject) or (spec := subject.spec) is None:
            return
        orders = _orders(spec)
        for lies in orders:
            for read_as in orders:
                if lies is not read_as:
                    yield Variant(
                        self.name,
                        f"rows that lie {lies.said} were read as {read_as.said}",
                        on_one(self._change(lies, read_as, spec)),
                    )

    def _change(
        self, lies: _Order, read_as: _Order, spec: ModelSpec
    ) -> Callable[[LazyTensor], LazyTensor]:
        return lambda fused: fused_of(read_as.unpack(lies.pack(parts_of(fused, spec))), spec)


class QkvExchanged:
    """Query, key and value stand for one another."""

    name = "qkv-exchanged"
    title = "query, key and value are exchanged"
    advice = (
        "Look where the converter names query, key and value: two of them have each other's name. "
        "Convert again."
    )

    def forms(self, subject: TensorPair) -> Iterator[Variant]:
        """Return every exchange of parts of one size."""
        if not fits(subject) or (spec := subject.spec) is None:
            return
        rows = rows_of(spec)
        for order in permutations(range(3)):
            if order != (0, 1, 2) and [rows[place] for place in order] == rows:
                moved = ", ".join(
                    f"the {PARTS[place]} of A is the {PARTS[number]} of B"
                    for number, place in enumerate(order)
                    if place != number
                )
                yield Variant(self.name, moved, on_one(self._change(order, spec)))

    def _change(self, order: Sequence[int], spec: ModelSpec) -> Callable[[LazyTensor], LazyTensor]:
        def change(fused: LazyTensor) -> LazyTensor:
            parts = parts_of(fused, spec)
            return fused_of([parts[place] for place in order], spec)

        return change


class QueryGroups:
    """Query heads are dealt to query groups in the wrong way."""

    name = "query-groups"
    title = "query heads are dealt to the query groups in the wrong order"
    advice = (
        "Query head h belongs to group h // (heads / groups). One side has dealt them out in turn, "
        "or was read so. Convert it again from its original."
    )

    def forms(self, subject: TensorPair) -> Iterator[Variant]:
        """Return heads dealt out in turn, and taken up in turn."""
        if not fits(subject) or (spec := subject.spec) is None:
            return
        each = spec.num_attention_heads // spec.num_query_groups
        if 1 in (each, spec.num_query_groups):
            return
        for said, inner in (
            ("heads that were dealt out in turn were read as groups", each),
            ("groups were read as heads dealt out in turn", spec.num_query_groups),
        ):
            yield Variant(self.name, said, on_one(self._change(inner, spec)))

    def _change(self, inner: int, spec: ModelSpec) -> Callable[[LazyTensor], LazyTensor]:
        def change(fused: LazyTensor) -> LazyTensor:
            query, key, value = parts_of(fused, spec)
            return fused_of([exchanged(query, spec.kv_channels, inner), key, value], spec)

        return change


def exchanged(tensor: LazyTensor, unit: int, inner: int) -> LazyTensor:
    """Return rows seen as [-1, inner, unit] with the first two axes exchanged."""
    blocks = tensor.split(0, unit).split(0, inner)
    rest = range(2, len(blocks.shape))
    return blocks.permute((1, 0, *rest)).merge(0).merge(0)


class RotaryOrder:
    """The rows of heads that rotate: half by half, or pair by pair."""

    name = "rotary-order"
    title = "rotary embedding: the two halves of every head lie interleaved on one side"
    advice = (
        "Hugging Face and Megatron rotate the first half of a head with the second, Meta's files "
        "and GPT-J neighbouring rows. One side was not permuted, or permuted twice. Convert again "
        "and name the format that the source really has (--from meta, --from hf)."
    )

    def forms(self, subject: TensorPair) -> Iterator[Variant]:
        """Return both directions, of query and key together and each alone."""
        spec = subject.spec
        if spec is None or subject.a != subject.b:
            return
        for pairs in (True, False):
            way = (
                "halves of A are neighbouring rows of B"
                if pairs
                else "neighbouring rows of A are halves of B"
            )
            if fits(subject):
                for which in ((0, 1), (0,), (1,)):
                    said = " and ".join(PARTS[number] for number in which)
                    change = self._in_fused(which, spec, pairs)
                    yield Variant(self.name, f"{said}: {way}", on_one(change))
            elif (place := _rotating(subject.name, spec)) is not None:
                yield Variant(self.name, way, on_one(self._turned(*place, pairs)))

    def _in_fused(
        self, which: Sequence[int], spec: ModelSpec, pairs: bool
    ) -> Callable[[LazyTensor], LazyTensor]:
        rotating = int(spec.kv_channels * spec.rotary_percent)
        turned = self._turned(spec.kv_channels, 0, rotating, pairs)

        def change(fused: LazyTensor) -> LazyTensor:
            parts = parts_of(fused, spec)
            return fused_of(
                [turned(part) if n in which else part for n, part in enumerate(parts)], spec
            )

        return change

    def _turned(
        self, head: int, start: int, stop: int, pairs: bool
    ) -> Callable[[LazyTensor], LazyTensor]:
        def change(part: LazyTensor) -> LazyTensor:
            heads = part.split(0, head)
            turning = heads.narrow(1, start, stop)
            inner = (stop - start) // 2 if pairs else 2
            split = turning.split(1, inner)
            rest = range(3, len(split.shape))
            turned = split.permute((0, 2, 1, *rest)).merge(1)
            kept = [heads.narrow(1, 0, start), turned, heads.narrow(1, stop, head)]
            return concat([one for one in kept if one.numel], 1).merge(0)

        return change


def _rotating(name: Name, spec: ModelSpec) -> tuple[int, int, int] | None:
    """Return the size of heads and which of their rows rotate, in a tensor that is not fused."""
    key = name[1]
    if key in ("q norm weight", "k norm weight"):
        return spec.kv_channels, 0, int(spec.kv_channels * spec.rotary_percent)
    if not spec.multi_latent_attention:
        return None
    head = spec.qk_head_dim + spec.qk_pos_emb_head_dim
    if key in ("q up weight", "q projection weight"):
        return head, spec.qk_head_dim, head
    if key == "kv down weight":
        whole = spec.kv_lora_rank + spec.qk_pos_emb_head_dim
        return whole, spec.kv_lora_rank, whole
    return None


def reader_of_parts(read: Read, spec: ModelSpec | None) -> Read:
    """Return a reader that also knows query, key and value within fused tensors."""

    def read_part(name: Name) -> LazyTensor | None:
        message, key = name
        whole, slash, part = key.partition("/")
        if not slash or part not in PARTS or spec is None:
            return read(name)
        fused = read((message, whole))
        return None if fused is None else parts_of(fused, spec)[PARTS.index(part)]

    return read_part


MISTAKES: Sequence[Hypothesis] = (
    QkvExchanged(),
    RotaryOrder(),
    QkvOrder(),
    QueryGroups(),
)
