"""All mistakes that are tried on two checkpoints, and the words for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from ckptx.tensors.joins import unstacked
from ckptx.tensors.lazy import Shape
from ckptx.verification.diagnosis import attention, feed_forward, matrices, orders, vocabulary
from ckptx.verification.diagnosis.elsewhere import MisplacedTensors
from ckptx.verification.diagnosis.evidence import Evidence
from ckptx.verification.diagnosis.mistakes import Hypothesis
from ckptx.verification.diagnosis.samples import common_dtype
from ckptx.verification.diagnosis.values import VALUES, Description
from ckptx.verification.pairing import Name, label


class _Named(Protocol):
    name: str
    title: str
    advice: str


_KNOWN: Sequence[_Named] = (
    feed_forward.GateUp(),
    feed_forward.GateUpRanks(),
    *attention.MISTAKES,
    matrices.Transposed(),
    matrices.WrongAxis(),
    orders.LayerOrder(),
    orders.ExpertOrder(),
    vocabulary.TiedHead(),
    vocabulary.HeadTied(),
    vocabulary.Padding(),
    MisplacedTensors(),
)

WORDS: Mapping[str, Description] = {
    **{one.name: Description(one.title, one.advice) for one in _KNOWN},
    orders.RankOrder.name: Description(orders.RankOrder.title, orders.RankOrder.advice),
    **VALUES,
}
"""What every mistake is called, and what to do about it, by its stable name."""


class Hypotheses:
    """The mistakes that may have been made, the likely ones first.

    ``ranks`` takes samples of each tensor; ``elsewhere`` is for what nothing else explains.
    """

    def __init__(self, evidence: Evidence) -> None:
        named = [name for name in evidence.differing if not name[0]]
        experts = _orders(evidence, 1, named)
        self.elsewhere = _elsewhere(evidence)
        self.ranks = orders.RankOrder(evidence.sampler, evidence.reads)
        self.mistakes: Sequence[Hypothesis] = (
            feed_forward.GateUp(),
            vocabulary.TiedHead(),
            *attention.MISTAKES,
            matrices.Transposed(),
            matrices.WrongAxis(),
            orders.LayerOrder(_orders(evidence, 0)),
            orders.ExpertOrder(_expert_orders(evidence)),
            orders.NamedExpertOrder(experts, place=1, what="expert"),
            feed_forward.GateUpRanks(),
            self.ranks,
        )


def _orders(
    evidence: Evidence, place: int, among: Sequence[Name] | None = None
) -> dict[str, orders.Order]:
    """Return how numbers of layers, or of experts, seem to be exchanged."""
    groups: dict[str, set[Name]] = {}
    for name in evidence.differing if among is None else among:
        found = orders.numbered(name, place)
        if found is not None:
            groups.setdefault(orders.group(found[0]), set()).add(found[0])
    result = {}
    for group, templates in groups.items():
        digests: list[dict[str, dict[int, bytes | None]]] = [{}, {}]
        for name in evidence.sides[0].tensors:
            found = orders.numbered(name, place)
            if found is None or found[0] not in templates:
                continue
            for side, digest in enumerate(evidence.digests(name)):
                digests[side].setdefault(label(found[0]), {})[found[1]] = digest
        result[group] = orders.find_order(*digests)
    return result


def _expert_orders(evidence: Evidence) -> dict[str, orders.Order]:
    """Return how the experts of every layer seem to be exchanged."""
    found: dict[str, list[dict[str, dict[int, bytes | None]]]] = {}
    for name in evidence.differing:
        subject = evidence.subject(name)
        if subject is None or subject.a != subject.b or not orders.holds_experts(subject):
            continue
        a, b = (side.tensors[name] for side in evidence.sides)
        dtype = common_dtype(a.dtype, b.dtype)
        if dtype is None:
            continue
        for side, tensor in enumerate((a, b)):
            heads = evidence.sampler.heads(side, unstacked(tensor), dtype)
            found.setdefault(name[0], [{}, {}])[side][name[1]] = dict(enumerate(heads))
    return {message: orders.find_order(*both) for message, both in found.items()}


def _elsewhere(evidence: Evidence) -> MisplacedTensors:
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
    return MisplacedTensors(known, wanted)
