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
from functools import partial
from itertools import permutations
from operator import itemgetter
from typing import TypeAlias

from ckptx.model.spec import ModelSpec
from ckptx.tensors.joins import concat, deinterleave, interleave
from ckptx.tensors.lazy import LazyTensor
from ckptx.verification.diagnosis.evidence import PARTS, TensorPair, fused_of, parts_of, rows_of
from ckptx.verification.diagnosis.mistakes import Hypothesis, Variant, on_one
from ckptx.verification.pairing import Name

FUSED = ("qkv weight", "qkv bias")
Parts: TypeAlias = Sequence[LazyTensor]
"""Query, key and value."""
Form: TypeAlias = tuple[str, Callable[[Parts], Parts]]
"""What happened to them, in words, and what makes it happen."""


def fits(pair: TensorPair) -> bool:
    """Return whether a tensor is a fused attention of the model's dimensions, on both sides."""
    spec = pair.spec
    if spec is None or spec.multi_latent_attention or pair.name[1] not in FUSED:
        return False
    return pair.a == pair.b and pair.a[0] == spec.qkv_rows


def _in_fused(
    forms: Callable[[ModelSpec], Iterator[Form]],
) -> Callable[[TensorPair], Iterator[Variant]]:
    """Return the variants that forms of a mistake are in a fused tensor."""

    def variants(pair: TensorPair) -> Iterator[Variant]:
        spec = pair.spec
        if spec is not None and fits(pair):
            for words, change in forms(spec):
                yield Variant(words, on_one(partial(_changed, spec, change)))

    return variants


def _changed(spec: ModelSpec, change: Callable[[Parts], Parts], fused: LazyTensor) -> LazyTensor:
    return fused_of(change(parts_of(fused, spec)), spec)


def _orders(spec: ModelSpec) -> Iterator[tuple[str, int]]:
    """Yield the orders that rows may have: in words, and the number of groups they lie in."""
    groups = spec.num_query_groups
    rows, key_rows, _ = rows_of(spec)
    equal = rows == key_rows
    yield f"{'head by head' if equal else 'query group by query group'} (Megatron)", groups
    version = ", checkpoint_version 0" if equal else ""
    yield f"all queries, all keys, all values ([Q; K; V]{version})", 1
    if equal:
        yield "query, key and value in turn, row by row (checkpoint_version 1)", rows
    for ranks in range(2, min(groups, 65)):
        if groups % ranks == 0:
            yield f"[Q; K; V] for each of {ranks} tensor-parallel ranks", ranks


def _misread(spec: ModelSpec) -> Iterator[Form]:
    """Yield every pair of orders."""
    for (stored, groups), (taken_for, other_groups) in permutations(_orders(spec), 2):
        words = f"rows that lie {stored} were read as {taken_for}"
        yield words, partial(_regrouped, rows_of(spec), groups, other_groups)


def _regrouped(rows: Sequence[int], groups: int, other_groups: int, parts: Parts) -> Parts:
    return deinterleave(interleave(parts, groups), rows, other_groups)


QKV_ORDER = Hypothesis(
    "qkv-order",
    "the rows of query, key and value are in the wrong order",
    "One of the two was written, or read, with another order of the fused attention weight. "
    "Convert it again from its original with the right format (Megatron's checkpoint_version, "
    "the right number of query groups); do not use it as it is: attention mixes heads.",
    _in_fused(_misread),
)


def _moved(spec: ModelSpec) -> Iterator[Form]:
    """Yield every exchange of parts of one size."""
    rows = rows_of(spec)
    for order in permutations(range(3)):
        if order != (0, 1, 2) and [rows[place] for place in order] == rows:
            moved = ", ".join(
                f"the {PARTS[place]} of A is the {PARTS[number]} of B"
                for number, place in enumerate(order)
                if place != number
            )
            yield moved, itemgetter(*order)


QKV_EXCHANGED = Hypothesis(
    "qkv-exchanged",
    "query, key and value are exchanged",
    "Look where the converter names query, key and value: two of them have each other's name. "
    "Convert again.",
    _in_fused(_moved),
)


def _dealt(spec: ModelSpec) -> Iterator[Form]:
    """Yield heads dealt out in turn, and taken up in turn."""
    groups = spec.num_query_groups
    heads = spec.num_attention_heads // groups
    if 1 not in (heads, groups):
        of_heads, of_groups = (
            partial(_dealt_queries, spec.kv_channels, n) for n in (heads, groups)
        )
        yield "heads that were dealt out in turn were read as groups", of_heads
        yield "groups were read as heads dealt out in turn", of_groups


def _dealt_queries(channels: int, inner: int, parts: Parts) -> Parts:
    query, key, value = parts
    return [_exchanged(query.split(0, channels), 0, inner).merge(0), key, value]


QUERY_GROUPS = Hypothesis(
    "query-groups",
    "query heads are dealt to the query groups in the wrong order",
    "Query head h belongs to group h // (heads / groups). One side has dealt them out in turn, "
    "or was read so. Convert it again from its original.",
    _in_fused(_dealt),
)


def _exchanged(tensor: LazyTensor, axis: int, inner: int) -> LazyTensor:
    """Return an axis of [outer * inner] seen as [outer, inner], in the order of [inner, outer]."""
    blocks = tensor.split(axis, inner)
    axes = list(range(len(blocks.shape)))
    axes[axis : axis + 2] = axis + 1, axis
    return blocks.permute(tuple(axes)).merge(axis)


def _turned(pair: TensorPair) -> Iterator[Variant]:
    """Yield both directions, of query and key together and each alone."""
    spec = pair.spec
    if spec is None or pair.a != pair.b:
        return
    rotating = int(spec.kv_channels * spec.rotary_percent)
    for way, neighbours in (
        ("halves of A are neighbouring rows of B", False),
        ("neighbouring rows of A are halves of B", True),
    ):
        if fits(pair):
            turn = partial(_turn, spec.kv_channels, 0, rotating, neighbours)
            for which in ((0, 1), (0,), (1,)):
                words = " and ".join(PARTS[number] for number in which)
                change = partial(_changed, spec, partial(_turn_some, which, turn))
                yield Variant(f"{words}: {way}", on_one(change))
        elif (place := _rotating(pair.name, spec)) is not None:
            yield Variant(way, on_one(partial(_turn, *place, neighbours)))


def _turn_some(
    which: Sequence[int], turn: Callable[[LazyTensor], LazyTensor], parts: Parts
) -> Parts:
    return [turn(part) if number in which else part for number, part in enumerate(parts)]


def _turn(head: int, start: int, stop: int, neighbours: bool, part: LazyTensor) -> LazyTensor:
    """Return rows ``start`` to ``stop`` of every head with neighbours as halves, or the reverse."""
    heads = part.split(0, head)
    inner = 2 if neighbours else (stop - start) // 2
    turned = _exchanged(heads.narrow(1, start, stop), 1, inner)
    rows = [heads.narrow(1, 0, start), turned, heads.narrow(1, stop, head)]
    return concat([part for part in rows if part.numel], 1).merge(0)


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
