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
from ckptx.verification.diagnosis.evidence import PARTS, TensorPair, fused_of, parts_of, rows_of
from ckptx.verification.diagnosis.mistakes import Hypothesis, Variant, on_one
from ckptx.verification.pairing import Name

FUSED = ("qkv weight", "qkv bias")
_Change = Callable[[LazyTensor], LazyTensor]


def fits(pair: TensorPair) -> bool:
    """Return whether a tensor is a fused attention of the model's dimensions, on both sides."""
    spec = pair.spec
    return (
        spec is not None
        and pair.name[1] in FUSED
        and not spec.multi_latent_attention
        and pair.a == pair.b
        and pair.a[0] == spec.qkv_rows
    )


@dataclass(frozen=True, slots=True)
class _Order:
    """An order of the rows of a fused tensor."""

    words: str
    pack: Callable[[Sequence[LazyTensor]], LazyTensor]
    unpack: Callable[[LazyTensor], list[LazyTensor]]


def _in_groups(words: str, groups: int, rows: list[int]) -> _Order:
    return _Order(
        words,
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


def _misread(pair: TensorPair) -> Iterator[Variant]:
    """Yield every pair of orders."""
    spec = pair.spec
    if spec is None or not fits(pair):
        return

    def change(lies: _Order, read_as: _Order) -> _Change:
        return lambda fused: fused_of(read_as.unpack(lies.pack(parts_of(fused, spec))), spec)

    for lies, read_as in permutations(_orders(spec), 2):
        words = f"rows that lie {lies.words} were read as {read_as.words}"
        yield Variant(words, on_one(change(lies, read_as)))


QKV_ORDER = Hypothesis(
    "qkv-order",
    "the rows of query, key and value are in the wrong order",
    "One of the two was written, or read, with another order of the fused attention weight. "
    "Convert it again from its original with the right format (Megatron's checkpoint_version, "
    "the right number of query groups); do not use it as it is: attention mixes heads.",
    _misread,
)


def _moved(pair: TensorPair) -> Iterator[Variant]:
    """Yield every exchange of parts of one size."""
    spec = pair.spec
    if spec is None or not fits(pair):
        return

    def change(order: Sequence[int]) -> _Change:
        return lambda fused: fused_of([parts_of(fused, spec)[place] for place in order], spec)

    rows = rows_of(spec)
    for order in permutations(range(3)):
        if order != (0, 1, 2) and [rows[place] for place in order] == rows:
            moved = ", ".join(
                f"the {PARTS[place]} of A is the {PARTS[number]} of B"
                for number, place in enumerate(order)
                if place != number
            )
            yield Variant(moved, on_one(change(order)))


QKV_EXCHANGED = Hypothesis(
    "qkv-exchanged",
    "query, key and value are exchanged",
    "Look where the converter names query, key and value: two of them have each other's name. "
    "Convert again.",
    _moved,
)


def _dealt(pair: TensorPair) -> Iterator[Variant]:
    """Yield heads dealt out in turn, and taken up in turn."""
    spec = pair.spec
    if spec is None or not fits(pair):
        return
    heads = spec.num_attention_heads // spec.num_query_groups
    if 1 in (heads, spec.num_query_groups):
        return

    def change(inner: int) -> _Change:
        def deal(fused: LazyTensor) -> LazyTensor:
            query, key, value = parts_of(fused, spec)
            return fused_of([exchanged(query, spec.kv_channels, inner), key, value], spec)

        return deal

    yield Variant("heads that were dealt out in turn were read as groups", on_one(change(heads)))
    groups = on_one(change(spec.num_query_groups))
    yield Variant("groups were read as heads dealt out in turn", groups)


QUERY_GROUPS = Hypothesis(
    "query-groups",
    "query heads are dealt to the query groups in the wrong order",
    "Query head h belongs to group h // (heads / groups). One side has dealt them out in turn, "
    "or was read so. Convert it again from its original.",
    _dealt,
)


def exchanged(tensor: LazyTensor, unit: int, inner: int) -> LazyTensor:
    """Return rows seen as [-1, inner, unit] with the first two axes exchanged."""
    blocks = tensor.split(0, unit).split(0, inner)
    rest = range(2, len(blocks.shape))
    return blocks.permute((1, 0, *rest)).merge(0).merge(0)


def _turned(pair: TensorPair) -> Iterator[Variant]:
    """Yield both directions, of query and key together and each alone."""
    spec = pair.spec
    if spec is None or pair.a != pair.b:
        return
    for pairs in (True, False):
        way = (
            "halves of A are neighbouring rows of B"
            if pairs
            else "neighbouring rows of A are halves of B"
        )
        if fits(pair):
            for which in ((0, 1), (0,), (1,)):
                words = " and ".join(PARTS[number] for number in which)
                yield Variant(f"{words}: {way}", on_one(_turn_in_fused(which, spec, pairs)))
        elif (place := _rotating(pair.name, spec)) is not None:
            yield Variant(way, on_one(_turn(*place, pairs)))


def _turn_in_fused(which: Sequence[int], spec: ModelSpec, pairs: bool) -> _Change:
    rotating = int(spec.kv_channels * spec.rotary_percent)
    turn = _turn(spec.kv_channels, 0, rotating, pairs)

    def change(fused: LazyTensor) -> LazyTensor:
        parts = parts_of(fused, spec)
        return fused_of([turn(part) if n in which else part for n, part in enumerate(parts)], spec)

    return change


def _turn(head: int, start: int, stop: int, pairs: bool) -> _Change:
    def change(part: LazyTensor) -> LazyTensor:
        heads = part.split(0, head)
        turning = heads.narrow(1, start, stop)
        inner = (stop - start) // 2 if pairs else 2
        split = turning.split(1, inner)
        rest = range(3, len(split.shape))
        turned = split.permute((0, 2, 1, *rest)).merge(1)
        rows = [heads.narrow(1, 0, start), turned, heads.narrow(1, stop, head)]
        return concat([part for part in rows if part.numel], 1).merge(0)

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


ROTARY_ORDER = Hypothesis(
    "rotary-order",
    "rotary embedding: the two halves of every head lie interleaved on one side",
    "Hugging Face and Megatron rotate the first half of a head with the second, Meta's files "
    "and GPT-J neighbouring rows. One side was not permuted, or permuted twice. Convert again "
    "and name the format that the source really has (--from meta, --from hf).",
    _turned,
)
