"""Mistakes in the order of layers, experts and tensor-parallel ranks, and in whole names.

Which layer of A a layer of B is, digests of samples tell; that it is, the comparison of all of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import TypeAlias

import numpy as np

from ckptx.model.canonical_names import Key, keys_of
from ckptx.tensors.joins import concat, unstacked
from ckptx.tensors.lazy import LazyTensor, Shape
from ckptx.verification.diagnosis.evidence import Evidence, Read, TensorPair, common_dtype
from ckptx.verification.diagnosis.mistakes import Hypothesis, Variant, on_one
from ckptx.verification.pairing import Name, label

Order: TypeAlias = dict[int, int]
"""For a number in B, the number in A of the same thing."""
Digests: TypeAlias = dict[str, dict[int, bytes | None]]
"""By what is numbered (the key of a tensor), a digest for every number."""

_NUMBER = re.compile(r"(?<![^ .])(\d+)(?![^ .])")
_MOST_RANKS = 64
_FEW = 8  # ranks of which any order is believed, beyond which it must be one that has a name


def find_order(a: Digests, b: Digests) -> Order:
    """Return which of A every number of B is, as far as digests tell one."""
    found: Order = {}
    for number in sorted({number for digests in b.values() for number in digests}):
        candidates: set[int] | None = None
        for what, digests in b.items():
            wanted = digests.get(number)
            alike = {n for n, digest in a.get(what, {}).items() if wanted and digest == wanted}
            if alike:
                candidates = alike if candidates is None else candidates & alike
        if candidates:
            found[number] = number if number in candidates else min(candidates)
    return found


def order_named(order: Order, what: str) -> str:
    """Return an order in words.

    Examples:
        >>> order_named({0: 1, 1: 2, 2: 3, 3: 0}, "layer")
        'layer i of B is layer i + 1 of A, the last ones come first'
        >>> order_named({0: 1, 1: 0}, "expert")
        'expert 0 of B is expert 1 of A, 1 is 0'
    """
    moved = {i: j for i, j in sorted(order.items()) if i != j}
    size = max([*order, *order.values()]) + 1
    listed = [order.get(i, i) for i in range(size)]
    if known := _known_order(listed, what):
        return known
    shifts = {j - i for i, j in moved.items()}
    if len(shifts) == 1:
        (shift,) = shifts
        first, last = min(moved), max(moved)
        where = "" if len(moved) == size else f", for i from {first} to {last}"
        return f"{what} i of B is {what} i {'+' if shift > 0 else '-'} {abs(shift)} of A{where}"
    pairs = [f"{i} is {j}" for i, j in moved.items()]
    head = pairs[0].replace(" is ", f" of B is {what} ")
    more = f" and so on ({len(pairs)} in all)" if len(pairs) > 6 else ""
    return f"{what} " + ", ".join([f"{head} of A", *pairs[1:6]]) + more


def _known_order(listed: list[int], what: str) -> str:
    """Return an order in words if it is one that converters are known to make."""
    size = len(listed)
    strings = sorted(range(size), key=str)
    for side, order in (("B", strings), ("A", sorted(range(size), key=strings.__getitem__))):
        if size > 10 and listed == order:
            example = ", ".join(map(str, strings[:4]))
            return f"{what}s of {side} are in the order of strings ({example}, ...)"
    if size > 2 and listed == [*range(size)][::-1]:
        return f"{what}s are in the reverse order"
    if size > 2 and listed[0] and listed == [*range(listed[0], size), *range(listed[0])]:
        if listed[0] <= size // 2:
            return f"{what} i of B is {what} i + {listed[0]} of A, the last ones come first"
        behind = size - listed[0]
        return f"{what} i of B is {what} i - {behind} of A, the first ones come last"
    numbers = np.arange(size)
    for groups in range(2, size // 2 + 1):
        for block in range(1, size // groups + 1):
            if size % (groups * block) or groups * block == size:
                continue
            dealt = numbers.reshape(-1, groups, block).swapaxes(0, 1).flatten()
            if listed == dealt.tolist():
                of = f"blocks of {block} " if block > 1 else ""
                return f"{of}{what}s are grouped by {groups} on one side, dealt out on the other"
    return ""


def numbered(name: Name, place: int = 0) -> tuple[Name, int] | None:
    """Return a name without one of its numbers, and that number; None without one.

    Examples:
        >>> numbered(("transformer layer 3", "qkv weight"))
        (('transformer layer {}', 'qkv weight'), 3)
        >>> numbered(("", "layers.3.experts.7.w1"), 1)
        (('', 'layers.3.experts.{}.w1'), 7)
    """
    message, key = name
    text = message or key
    if (match := next(islice(_NUMBER.finditer(text), place, None), None)) is None:
        return None
    text = f"{text[: match.start()]}{{}}{text[match.end() :]}"
    return ((text, key) if message else ("", text)), int(match[1])


def renumbered(template: Name, number: int) -> Name:
    """Return a name with a number in its place."""
    message, key = (text.replace("{}", str(number)) for text in template)
    return message, key


def group(template: Name) -> str:
    """Return what is numbered together: the layers of a tower, the experts of a layer."""
    message, key = template
    return message or key.partition("{}")[0]


def _numbers_exchanged(evidence: Evidence, place: int) -> dict[str, Order]:
    """Return how numbers at a place of names seem to be exchanged: of layers, or of experts.

    Only experts that are tensors of their own have a second number; these have no message.
    """
    differing = [numbered(name, place) for name in evidence.differing if not (place and name[0])]
    templates = {found[0] for found in differing if found}
    digests: dict[str, tuple[Digests, Digests]] = {}
    for name in evidence.sides[0].tensors:
        found = numbered(name, place)
        if found is None or found[0] not in templates:
            continue
        template, number = found
        both = digests.setdefault(group(template), ({}, {}))
        for side, digest in zip(both, evidence.digests(name), strict=True):
            side.setdefault(label(template), {})[number] = digest
    return {numbers: find_order(*both) for numbers, both in digests.items()}


def _expert_orders(evidence: Evidence) -> dict[str, Order]:
    """Return how the experts of every layer seem to be exchanged."""
    found: dict[str, tuple[Digests, Digests]] = {}
    for name in evidence.differing:
        pair = evidence.pair(name)
        if pair is None or pair.a != pair.b or not _holds_experts(pair):
            continue
        a, b = (side.tensors[name] for side in evidence.sides)
        if (dtype := common_dtype(a.dtype, b.dtype)) is None:
            continue
        for side, tensor in enumerate((a, b)):
            heads = evidence.sampler.heads(side, unstacked(tensor), dtype)
            found.setdefault(name[0], ({}, {}))[side][name[1]] = dict(enumerate(heads))
    return {message: find_order(*both) for message, both in found.items()}


def _renumbered(pair: TensorPair, place: int, what: str) -> Iterator[Variant]:
    """Yield the order that was found among what has numbers at a place of its name."""
    orders = pair.evidence.once(_numbers_exchanged, place)
    found = numbered(pair.name, place)
    order = orders.get(group(found[0])) if found else None
    if order and any(i != j for i, j in order.items()):
        yield Variant(order_named(order, what), partial(_read_renumbered, orders, place))


def _read_renumbered(
    orders: Mapping[str, Order], place: int, read: Read, name: Name
) -> LazyTensor | None:
    found = numbered(name, place)
    other = orders.get(group(found[0]), {}).get(found[1]) if found else None
    return None if found is None or other is None else read(renumbered(found[0], other))


LAYER_ORDER = Hypothesis(
    "layer-order",
    "layers are numbered differently",
    "Stages of a pipeline, or files, were put together in the wrong order: often names sorted "
    "as strings, or virtual pipeline chunks taken stage by stage. Convert again from the "
    "original; the model computes nonsense as it is.",
    lambda pair: _renumbered(pair, 0, "layer"),
)


def _experts(pair: TensorPair) -> Iterator[Variant]:
    """Yield the order found among the experts of a layer, stacked or tensors of their own."""
    order = pair.evidence.once(_expert_orders).get(pair.name[0], {})
    size = pair.a[0] if pair.a else 0
    whole = sorted(order) == sorted(order.values()) == list(range(size))
    moved = any(i != j for i, j in order.items())
    if whole and moved and _holds_experts(pair):
        listed = [order[number] for number in range(size)]
        yield Variant(order_named(order, "expert"), on_one(partial(_permuted, listed, 0)))
    yield from _renumbered(pair, 1, "expert")


def _holds_experts(pair: TensorPair) -> bool:
    """Return whether the first axis of a canonical tensor is that of the experts."""
    key = _canonical_key(pair)
    return key is not None and key.shape[0] == "experts"


def _canonical_key(pair: TensorPair) -> Key | None:
    message, name = pair.name
    return keys_of(message, pair.spec).get(name) if message and pair.spec else None


EXPERT_ORDER = Hypothesis(
    "expert-order",
    "experts are in another order",
    "Names or files were sorted as strings, or ranks' experts were numbered in turn. Convert "
    "again from the original. If the rows of the router are in the same order, both models "
    "compute the same.",
    _experts,
)


def _ranks(pair: TensorPair) -> Iterator[Variant]:
    """Yield the order that samples of equal parts tell."""
    if pair.a != pair.b or not pair.a:
        return
    a, b = (read(pair.name) for read in pair.evidence.reads)
    if a is None or b is None or (dtype := common_dtype(a.dtype, b.dtype)) is None:
        return
    for axis in _axes(pair):
        for ranks in _finest(pair.a[axis]):
            heads = [
                pair.evidence.sampler.heads(
                    side, [tensor.chunk(axis, ranks, n) for n in range(ranks)], dtype
                )
                for side, tensor in enumerate((a, b))
            ]
            order = find_order(*({"": dict(enumerate(digests))} for digests in heads))
            if sorted(order) != sorted(order.values()) or len(order) < ranks:
                continue
            listed = _believed([order[n] for n in range(ranks)])
            if not listed or listed == list(range(len(listed))):
                continue
            numbers = order_named(dict(enumerate(listed)), "rank")
            words = f"of {len(listed)} ranks, cut along axis {axis}: {numbers}"
            yield Variant(words, on_one(partial(_permuted, listed, axis)))
            break


def _axes(pair: TensorPair) -> Sequence[int]:
    if (key := _canonical_key(pair)) is None:
        return range(min(2, len(pair.a)))
    return () if key.tp is None else (key.tp,)


def _finest(size: int) -> Iterator[int]:
    """Yield numbers of parts to look at: the most that are a power of two, then odd clusters."""
    power = _MOST_RANKS
    while power > 1 and size % power:
        power //= 2
    yield from (ranks for ranks in (power, 48, 24, 12) if ranks > 1 and size % ranks == 0)


def _believed(listed: list[int]) -> list[int]:
    """Return an order of small parts as that of the ranks it is, none if it is no likely one.

    Neighbours that stay together are one rank's, unless only apart they are in order of strings.
    """
    while "strings" not in _known_order(listed, "rank"):
        together = len(listed) % 2 == 0 and all(
            listed[n] % 2 == 0 and listed[n + 1] == listed[n] + 1 for n in range(0, len(listed), 2)
        )
        if not together:
            return listed if len(listed) <= _FEW else []
        listed = [number // 2 for number in listed[::2]]
    return listed


def _permuted(listed: Sequence[int], axis: int, tensor: LazyTensor) -> LazyTensor:
    """Return the equal parts of a tensor along an axis in another order."""
    return concat([tensor.chunk(axis, len(listed), number) for number in listed], axis)


RANK_ORDER = Hypothesis(
    "rank-order",
    "tensor-parallel ranks were joined in the wrong order",
    "Files of ranks were sorted as strings (0, 1, 10, 2), or given in another order. Join them "
    "by number: convert again from the ranks' files.",
    _ranks,
)

_Misplaced: TypeAlias = tuple[Mapping[tuple[Shape, bytes], Name], Mapping[Name, bytes | None]]


def _misplaced(evidence: Evidence) -> _Misplaced:
    """Return the tensors of A by shape and digest, and the digests of those of B that differ."""
    differing = frozenset(evidence.differing)
    known: dict[tuple[Shape, bytes], Name] = {}
    wanted: dict[Name, bytes | None] = {}
    shapes = {t.shape for name in evidence.differing if (t := evidence.sides[1].tensors.get(name))}
    for name, tensor in evidence.sides[0].tensors.items():
        a, b = evidence.digests(name)
        if a is not None and tensor.shape in shapes:
            known.setdefault((tensor.shape, a), name)
        if name in differing:
            wanted[name] = b
    return known, wanted


def _elsewhere(pair: TensorPair) -> Iterator[Variant]:
    """Yield the name that the tensor has in A, if there is one."""
    known, wanted = pair.evidence.once(_misplaced)
    digest = wanted.get(pair.name)
    other = known.get((pair.b, digest)) if digest is not None else None
    if other is not None and other != pair.name:

        def make(read: Read, name: Name) -> LazyTensor | None:
            return read(other) if name == pair.name else None

        yield Variant(f"{label(pair.name)} of B is {label(other)} of A", make)


MISPLACED = Hypothesis(
    "another-tensor",
    "tensors hold what the other side has under another name",
    "Names were mixed up, or one tensor was written over another. Look at the names below in "
    "the converter that wrote one of the sides, and convert again.",
    _elsewhere,
)
