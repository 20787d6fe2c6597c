"""Search for the mistakes that explain the differences of two checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

from numpy.typing import NDArray

from ckptx.errors import PlanError
from ckptx.protocol.model import VOCAB_TENSORS
from ckptx.storage.blocks import BlockReader, equal
from ckptx.tensors.lazy import LazyTensor
from ckptx.verification.diagnosis import (
    attention,
    feed_forward,
    matrices,
    orders,
    relations,
    vocabulary,
)
from ckptx.verification.diagnosis.evidence import Evidence, TensorPair, part_names, starts
from ckptx.verification.diagnosis.finding import Finding
from ckptx.verification.diagnosis.mistakes import Hypothesis, Make, Variant, chained
from ckptx.verification.diagnosis.relations import SAME, Relation
from ckptx.verification.pairing import Name, Paired, label

TRIED: Sequence[Hypothesis] = (
    feed_forward.GATE_UP,
    vocabulary.TIED_HEAD,
    attention.QKV_EXCHANGED,
    attention.ROTARY_ORDER,
    attention.QKV_ORDER,
    attention.QUERY_GROUPS,
    matrices.TRANSPOSED,
    matrices.WRONG_AXIS,
    orders.LAYER_ORDER,
    orders.EXPERT_ORDER,
    feed_forward.GATE_UP_RANKS,
    orders.RANK_ORDER,
)
"""The mistakes that are tried on a tensor, the likely ones first."""
_TOLD = (*TRIED, orders.MISPLACED, vocabulary.HEAD_TIED, vocabulary.PADDING, *relations.VALUES)
KNOWN: Mapping[str, Hypothesis] = {hypothesis.name: hypothesis for hypothesis in _TOLD}
"""Every mistake by its stable name."""

_PATIENCE = 2  # tensors of a kind for which pairs of mistakes are tried
_FAILURES = 6  # tensors of a kind without an explanation, after which only known ones are tried

_Key: TypeAlias = tuple[str, str]  # a form's mistake and words


@dataclass(frozen=True, slots=True)
class _Explanation:
    """Forms of mistakes, one after the other, and what happened to the values besides."""

    forms: tuple[Variant, ...]
    relation: Relation
    backwards: bool = False
    """Whether A was made of B."""
    padding: str = ""

    @property
    def key(self) -> tuple[_Key, ...]:
        return tuple((form.mistake, form.detail) for form in self.forms)


@dataclass(slots=True)
class _Candidate:
    """What one side would be if certain mistakes had been made of the other."""

    forms: tuple[Variant, ...]
    expected: LazyTensor
    found: LazyTensor
    backwards: bool = False


def diagnose(paired: Paired, differing: Sequence[Name], reader: BlockReader) -> tuple[Finding, ...]:
    """Return the mistakes that explain tensors which differ, those that explain most first.

    Args:
        paired: the two checkpoints under common names.
        differing: the names of tensors that differ, or that only one side has.
        reader: reads both.
    """
    return tuple(_Search(Evidence(paired, differing, reader)).run())


class _Search:
    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.hits: dict[tuple[tuple[_Key, ...], str], int] = {}
        self.failures: dict[str, int] = {}

    def run(self) -> list[Finding]:
        """Explain tensor after tensor and join what has one explanation."""
        explained: dict[Name, tuple[_Explanation, ...]] = {}
        for name in self.evidence.differing:
            found = self._explain(name)
            if found:
                explained[name] = found
        self._drop_halves(explained)
        findings = [*self._findings(explained), *self._missing_heads()]
        return sorted(findings, key=lambda one: -len(one.tensors))

    def _explain(self, name: Name) -> tuple[_Explanation, ...]:
        found = self._explain_whole(name)
        if found is not None:
            return (found,)
        return self._explain_parts(name)

    def _explain_whole(self, name: Name, *, pairs: bool = True) -> _Explanation | None:
        pair = self.evidence.pair(name)
        if pair is None:
            return None
        kind = re.sub(r"\d+", "#", label(name))
        fresh = self.failures.get(kind, 0) < _FAILURES
        found = self._among(pair, self._known(pair)) or self._among(pair, [()])
        if found is None and fresh:
            patient = self.failures.get(kind, 0) < _PATIENCE
            forms = list(self._forms(pair, samples=patient))
            found = self._among(pair, ((form,) for form in forms))
            if found is None and pairs and patient:
                found = self._among(pair, _pairs(forms))
        if found is None:
            found = self._among(pair, ((form,) for form in orders.MISPLACED.variants(pair)))
        if found is None:
            self.failures[kind] = self.failures.get(kind, 0) + 1
        if found is not None:
            hit = (found.key, found.relation.detail)
            self.hits[hit] = self.hits.get(hit, 0) + 1
        return found

    def _explain_parts(self, name: Name) -> tuple[_Explanation, ...]:
        """Explain query, key and value one by one; all that differ must have an explanation."""
        pair = self.evidence.pair(name)
        if pair is None or not attention.fits(pair):
            return ()
        found = []
        for part in part_names(name):
            a, b = (read(part) for read in self.evidence.reads)
            if a is None or b is None:
                return ()
            if a.dtype == b.dtype and self._confirmed(_Candidate((), a, b), SAME):
                continue
            explanation = self._explain_whole(part, pairs=False)
            if explanation is None:
                return ()
            found.append(explanation)
        return tuple(found)

    def _forms(self, pair: TensorPair, *, samples: bool) -> Iterator[Variant]:
        """Yield all forms of all mistakes, those that need samples of the tensor on demand."""
        for hypothesis in TRIED:
            if samples or hypothesis is not orders.RANK_ORDER:
                yield from hypothesis.variants(pair)

    def _known(self, pair: TensorPair) -> Iterator[tuple[Variant, ...]]:
        """Yield what has explained other tensors, the most frequent first."""
        ordered = sorted(self.hits, key=lambda hit: -self.hits[hit])
        for keys in dict.fromkeys(keys for keys, _ in ordered if keys):
            forms = [self._form(pair, key) for key in keys]
            if None not in forms:
                yield tuple(form for form in forms if form is not None)

    def _form(self, pair: TensorPair, key: _Key) -> Variant | None:
        if key[0] not in {hypothesis.name for hypothesis in TRIED}:
            return None
        variants = KNOWN[key[0]].variants(pair)
        return next((variant for variant in variants if variant.detail == key[1]), None)

    def _among(
        self, pair: TensorPair, choices: Iterable[tuple[Variant, ...]]
    ) -> _Explanation | None:
        for forms in choices:
            for candidate, padding in self._candidates(pair, forms):
                relation = self._relation(pair.name, candidate)
                if relation is not None and (forms or relation is not SAME or padding):
                    return _Explanation(forms, relation, candidate.backwards, padding)
        return None

    def _candidates(
        self, pair: TensorPair, forms: tuple[Variant, ...]
    ) -> Iterator[tuple[_Candidate, str]]:
        """Yield what B would be, and where a mistake loses data, what A would be."""
        lossy = any(form.mistake == vocabulary.TIED_HEAD.name for form in forms)
        for side in (0, 1) if lossy else (0,):
            make: Make = lambda read, name: read(name)  # noqa: E731 - replaced where there are forms
            if forms:
                make = forms[0].make if len(forms) == 1 else chained(*forms)
            try:
                expected = make(self.evidence.reads[side], pair.name)
            except PlanError:  # sizes that do not divide
                continue
            found = self.evidence.reads[1 - side](pair.name)
            if expected is None or found is None:
                continue
            expected, found, padding = _same_rows(pair.name, expected, found, side)
            if expected.shape == found.shape and expected.numel:
                yield _Candidate(forms, expected, found, backwards=bool(side)), padding

    def _relation(self, name: Name, candidate: _Candidate) -> Relation | None:
        """Return how the values of a candidate hang together, if it is a known way."""
        tensors = (candidate.expected, candidate.found)
        places = (1, 0) if candidate.backwards else (0, 1)
        choices = list(self._relations(name, candidate))
        for start in starts(candidate.found.numel):
            expected, found = (
                self.evidence.sampler.run(side, tensor, start)
                for side, tensor in zip(places, tensors, strict=True)
            )
            choices = [one for one in choices if _holds(one, expected, found, candidate.backwards)]
            if not choices:
                return None
        return next((one for one in choices if self._confirmed(candidate, one)), None)

    def _relations(self, name: Name, candidate: _Candidate) -> Iterator[Relation]:
        first, second = candidate.expected.dtype, candidate.found.dtype
        if candidate.backwards:
            first, second = second, first
        norm = "norm" in label(name)
        yield from relations.between(first, second)
        if norm and candidate.forms:
            yield from relations.shifted_by_one()
        if not relations.are_weights(first, second):
            return
        if not candidate.forms:
            yield from relations.of_values(norm=norm)
        if not candidate.forms and candidate.found.numel > 1:
            for side, tensor in enumerate((candidate.expected, candidate.found)):
                value = self.evidence.sampler.run(side, tensor, 0)[0]
                yield relations.constant(float(value.real), b=bool(side))

    def _confirmed(self, candidate: _Candidate, relation: Relation) -> bool:
        holds = True

        def visit(_number: int, _start: int, blocks: Sequence[NDArray[Any]]) -> bool:
            nonlocal holds
            holds = holds and _holds(relation, blocks[0], blocks[1], candidate.backwards)
            return holds

        places = (1, 0) if candidate.backwards else (0, 1)
        self.evidence.reader.each([(candidate.expected, candidate.found)], visit, places)
        return holds

    def _drop_halves(self, explained: dict[Name, tuple[_Explanation, ...]]) -> None:
        """Forget exchanges of which only one half is there: then something else has happened."""
        halves = [
            name
            for name, found in explained.items()
            if any(_is_half(name, one, explained) for one in found)
        ]
        for name in halves:
            del explained[name]
            pair = self.evidence.pair(name)
            forms = orders.MISPLACED.variants(pair) if pair else ()
            other = self._among(pair, ((form,) for form in forms)) if pair else None
            if other is not None:
                explained[name] = (other,)

    def _findings(self, explained: Mapping[Name, tuple[_Explanation, ...]]) -> Iterator[Finding]:
        groups: dict[tuple[str, ...], list[tuple[Name, tuple[_Explanation, ...]]]] = {}
        for name, found in explained.items():
            groups.setdefault(_names(found), []).append((name, found))
        for mistakes, members in groups.items():
            hypotheses = [KNOWN[mistake] for mistake in mistakes]
            told = (detail for _, found in members for one in found for detail in _details(one))
            details = list(dict.fromkeys(told))
            if len(details) > _SHOWN_DETAILS:
                more = len(details) - _SHOWN_DETAILS
                details = [*details[:_SHOWN_DETAILS], f"and {more} more of the kind"]
            yield Finding(
                mistakes=mistakes,
                title="; and ".join(one.title for one in hypotheses),
                details=tuple(details),
                advice=" ".join(one.advice for one in hypotheses),
                tensors=tuple(label(name) for name, _ in members),
                of=len(self.evidence.differing),
                rounding=next(
                    (o.relation.rounding for _, f in members for o in f if o.relation.rounding), ""
                ),
            )

    def _missing_heads(self) -> Iterator[Finding]:
        """Yield that a side without an output layer ties it to the embedding."""
        output = vocabulary.OUTPUT
        for side, other in ((0, 1), (1, 0)):
            head = self.evidence.sides[side].tensors.get(output)
            spec = self.evidence.sides[other].parts.get("language")
            lacks = output not in self.evidence.sides[other].tensors
            if head is None or not lacks or spec is None or not spec.tied:
                continue
            embedding = self.evidence.sides[side].tensors.get(vocabulary.EMBEDDING)
            copies = False
            if embedding is not None and embedding.shape == head.shape:
                copies = equal(head, embedding, self.evidence.sides[side].files)
            has, ties = "AB"[side], "AB"[other]
            detail = (
                f"{ties} has no output layer, its embedding is used; that of {has} equals its "
                "embedding, so both compute the same"
                if copies
                else f"{ties} has no output layer, its embedding is used; that of {has} is "
                "another, and is lost"
            )
            advice = (
                "Nothing is lost: tie_word_embeddings may be true on both sides."
                if copies
                else vocabulary.HEAD_TIED.advice
            )
            yield Finding(
                (vocabulary.HEAD_TIED.name,),
                vocabulary.HEAD_TIED.title,
                (detail,),
                advice,
                (label(output),),
                len(self.evidence.differing),
            )


_SHOWN_DETAILS = 6


def _is_half(
    name: Name, explanation: _Explanation, explained: Mapping[Name, tuple[_Explanation, ...]]
) -> bool:
    """Return whether the partner of an exchange has another explanation, or none."""
    for form in explanation.forms:
        partner = form.partner(name)
        if partner is None:
            continue
        others = (other for one in explained.get(partner, ()) for other in one.forms)
        if form.mistake not in {other.mistake for other in others}:
            return True
    return False


def _pairs(forms: Iterable[Variant]) -> Iterator[tuple[Variant, ...]]:
    """Yield two mistakes at once, in either order; never one twice."""
    listed = list(forms)
    for first, second in product(listed, listed):
        if first.mistake != second.mistake:
            yield first, second


def _holds(
    relation: Relation, expected: NDArray[Any], found: NDArray[Any], backwards: bool
) -> bool:
    a, b = (found, expected) if backwards else (expected, found)
    return relation.holds(a, b)


def _same_rows(
    name: Name, expected: LazyTensor, found: LazyTensor, side: int
) -> tuple[LazyTensor, LazyTensor, str]:
    """Return two tensors without the rows that only one of them has, if it is a vocabulary."""
    here, there = expected.shape, found.shape
    if name not in VOCAB_TENSORS or not here or here[1:] != there[1:] or here[0] == there[0]:
        return expected, found, ""
    rows = min(here[0], there[0])
    longer = "AB"[(there[0] > here[0]) ^ bool(side)]
    more = abs(here[0] - there[0])
    padding = f"{longer} has {more} rows more, behind the {rows} that both have"
    return expected.narrow(0, 0, rows), found.narrow(0, 0, rows), padding


def _names(found: Sequence[_Explanation]) -> tuple[str, ...]:
    """Return the mistakes of a tensor, each once."""
    names: dict[str, None] = {}
    for one in found:
        names.update(dict.fromkeys(form.mistake for form in one.forms))
        if one.padding:
            names[vocabulary.PADDING.name] = None
        if one.relation.mistake:
            names[one.relation.mistake] = None
    return tuple(sorted(names))


def _details(one: _Explanation) -> Iterator[str]:
    swap = str.maketrans("AB", "BA")
    for form in one.forms:
        words = form.detail.split(" ")
        if one.backwards:
            words = [word.translate(swap) if word in ("A", "B") else word for word in words]
        yield " ".join(words)
    if one.padding:
        yield one.padding
    if one.relation.detail:
        yield f"the values {one.relation.detail}"
