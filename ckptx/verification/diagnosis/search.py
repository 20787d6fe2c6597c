"""Search for the mistakes that explain the differences of two checkpoints."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any, NamedTuple, TypeAlias

from numpy.typing import NDArray

from ckptx.errors import PlanError, first_few
from ckptx.protocol.model import VOCAB_TENSORS
from ckptx.storage.blocks import BlockReader, equal
from ckptx.tensors.lazy import LazyTensor
from ckptx.verification.diagnosis import attention, matrices, orders, partners, relations
from ckptx.verification.diagnosis.evidence import Evidence, TensorPair, part_names, starts
from ckptx.verification.diagnosis.mistakes import Hypothesis, Variant
from ckptx.verification.diagnosis.relations import SAME, Relation
from ckptx.verification.pairing import Name, Paired, label

TRIED: Sequence[Hypothesis] = (
    partners.GATE_UP,
    partners.TIED_HEAD,
    attention.QKV_EXCHANGED,
    attention.ROTARY_ORDER,
    attention.QKV_ORDER,
    attention.QUERY_GROUPS,
    matrices.TRANSPOSED,
    matrices.WRONG_AXIS,
    orders.LAYER_ORDER,
    orders.EXPERT_ORDER,
    partners.GATE_UP_RANKS,
    orders.RANK_ORDER,
)
"""The mistakes that are tried on a tensor, the likely ones first."""
_NAMED_ONLY = (orders.MISPLACED, partners.HEAD_TIED, partners.PADDING, *relations.VALUES)
KNOWN: Mapping[str, Hypothesis] = {one.name: one for one in (*TRIED, *_NAMED_ONLY)}
"""Every mistake by its stable name."""

_PATIENCE = 2  # tensors of a kind for which pairs of mistakes are tried
_FAILURES = 6  # tensors of a kind without an explanation, after which only known ones are tried
_SHOWN_DETAILS = 6
_TOGETHER, _ALONE = 1 / 2, 1 / 8  # of the elements of what differs, for findings to convince
_SHOWN = 3  # tensors in the text form

Forms: TypeAlias = tuple[Variant, ...]
"""Forms of mistakes that were made one after the other."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One explanation, and the tensors that it holds for, without exception."""

    mistakes: tuple[str, ...]
    """Stable names, ``"gate-up-exchanged"``; several where they were made at once."""
    title: str
    details: tuple[str, ...]
    """What happened, in words that follow the data: which rows, which order."""
    advice: str
    tensors: tuple[str, ...]
    of: int
    """The number of tensors that differ in all, missing ones included."""
    rounding: str = ""
    """What the values were rounded to; empty where every bit is explained."""

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "mistakes": list(self.mistakes),
            "title": self.title,
            "details": list(self.details),
            "advice": self.advice,
            "explains": list(self.tensors),
            "of": self.of,
            "exact": not self.rounding,
            "rounding": self.rounding,
        }

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield labels and texts for people."""
        how = f"within the rounding to {self.rounding}" if self.rounding else "to the last bit"
        count = f"{len(self.tensors)} of {self.of} differing tensors, {how}"
        yield "diagnosis", self.title
        yield "explains", f"{count}: {first_few(self.tensors, _SHOWN)}"
        yield from (("data", detail) for detail in self.details)
        yield "advice", self.advice


@dataclass(frozen=True, slots=True)
class _Explanation:
    """Forms of mistakes, and what happened to the values besides."""

    forms: Forms
    relation: Relation
    backwards: bool
    """Whether A was made of B."""
    padding: str

    @property
    def mistakes(self) -> Iterator[str]:
        """The stable names of what happened."""
        yield from (form.mistake for form in self.forms)
        if self.padding:
            yield partners.PADDING.name
        if self.relation.mistake:
            yield self.relation.mistake

    @property
    def details(self) -> Iterator[str]:
        """What happened, in words."""
        swap = str.maketrans("AB", "BA")
        for form in self.forms:
            words = form.detail.split(" ")
            if self.backwards:
                words = [word.translate(swap) if word in ("A", "B") else word for word in words]
            yield " ".join(words)
        if self.padding:
            yield self.padding
        if self.relation.detail:
            yield f"the values {self.relation.detail}"


class _Candidate(NamedTuple):
    """What A and B hold under a name, which is the same if certain mistakes were made."""

    sides: tuple[LazyTensor, LazyTensor]
    backwards: bool = False
    padding: str = ""


def diagnose(paired: Paired, differing: Sequence[Name], reader: BlockReader) -> tuple[Finding, ...]:
    """Return the mistakes that explain tensors which differ, those that explain most first.

    Args:
        paired: the two checkpoints under common names.
        differing: the names of tensors that differ, or that only one side has.
        reader: reads both.
    """
    evidence = Evidence(paired, differing, reader)
    return tuple(_convincing(_Search(evidence).run(), evidence))


def _convincing(findings: list[Finding], evidence: Evidence) -> Iterator[Finding]:
    """Yield the findings that explain enough to be the reason, and no coincidence.

    Small vectors are alike in many models, and parts of any two models may be. Together they must
    explain half of the elements of what differs, or one of them a good part, matrices included
    where matrices differ.
    """
    sizes, matrices = {}, set()
    for name in evidence.differing:
        pair = [one for side in evidence.sides if (one := side.tensors.get(name)) is not None]
        sizes[label(name)] = max(one.numel for one in pair)
        if max(len(one.shape) for one in pair) > 1:
            matrices.add(label(name))
    whole = sum(sizes.values())
    explained = {name for finding in findings for name in finding.tensors}
    enough = sum(sizes[name] for name in explained) >= whole * _TOGETHER
    for finding in findings:
        part = sum(sizes[name] for name in finding.tensors)
        with_matrices = not matrices or bool(matrices.intersection(finding.tensors))
        if enough or (with_matrices and part >= whole * _ALONE):
            yield finding


class _Search:
    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.hits: Counter[tuple[tuple[tuple[str, str], ...], str]] = Counter()
        """Explanations by the mistakes and words of their forms, and the words of the relation."""
        self.failures: Counter[str] = Counter()

    def run(self) -> list[Finding]:
        """Explain tensor after tensor and join what has one explanation."""
        explained: dict[Name, tuple[_Explanation, ...]] = {}
        for name in self.evidence.differing:
            whole = self._explain_whole(name)
            found = (whole,) if whole else self._explain_parts(name)
            if found:
                explained[name] = found
        self._drop_halves(explained)
        findings = [*self._findings(explained), *self._missing_heads()]
        return sorted(findings, key=lambda one: -len(one.tensors))

    def _explain_whole(self, name: Name, *, pairs: bool = True) -> _Explanation | None:
        if (pair := self.evidence.pair(name)) is None:
            return None
        kind = re.sub(r"\d+", "#", label(name))
        found = self._among(pair, self._choices(pair, self.failures[kind], pairs))
        if found is None:
            self.failures[kind] += 1
        else:
            forms = tuple((form.mistake, form.detail) for form in found.forms)
            self.hits[forms, found.relation.detail] += 1
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
            if a.dtype == b.dtype and self._confirmed(_Candidate((a, b)), SAME):
                continue
            if (explanation := self._explain_whole(part, pairs=False)) is None:
                return ()
            found.append(explanation)
        return tuple(found)

    def _choices(self, pair: TensorPair, failures: int, pairs: bool) -> Iterator[Forms]:
        """Yield what may have happened, the likely first: what has explained other tensors."""
        ordered = [keys for (keys, _), _ in self.hits.most_common() if keys]
        for keys in dict.fromkeys(ordered):
            forms = [_form(pair, *key) for key in keys]
            if None not in forms:
                yield tuple(form for form in forms if form is not None)
        yield ()
        if failures < _FAILURES:
            patient = failures < _PATIENCE
            tried = [one for one in TRIED if patient or one is not orders.RANK_ORDER]  # reads much
            single = [form for hypothesis in tried for form in hypothesis.variants(pair)]
            yield from ((form,) for form in single)
            if pairs and patient:
                for first, second in permutations(single, 2):
                    if first.mistake != second.mistake:
                        yield first, second
        yield from ((form,) for form in orders.MISPLACED.variants(pair))

    def _among(self, pair: TensorPair, choices: Iterable[Forms]) -> _Explanation | None:
        for forms in choices:
            for candidate in self._candidates(pair, forms):
                relation = self._relation(pair.name, candidate, bool(forms))
                if relation and (forms or relation is not SAME or candidate.padding):
                    return _Explanation(forms, relation, candidate.backwards, candidate.padding)
        return None

    def _candidates(self, pair: TensorPair, forms: Forms) -> Iterator[_Candidate]:
        """Yield what B would be, and where a mistake loses data, what A would be."""
        lossy = any(form.mistake == partners.TIED_HEAD.name for form in forms)
        for backwards in (False, True) if lossy else (False,):
            read, read_other = self.evidence.reads[:: -1 if backwards else 1]
            found = read_other(pair.name)
            for form in forms:
                read = partial(form.make, read)
            try:
                made = read(pair.name)
            except PlanError:  # sizes that do not divide
                continue
            if made is None or found is None:
                continue
            a, b, padding = _same_rows(pair.name, *((found, made) if backwards else (made, found)))
            if a.shape == b.shape and a.numel:
                yield _Candidate((a, b), backwards, padding)

    def _relation(self, name: Name, candidate: _Candidate, changed: bool) -> Relation | None:
        """Return how the values of a candidate are related, if it is in a known way."""
        choices = list(self._relations(name, candidate, changed))
        for start in starts(candidate.sides[0].numel):
            a, b = (
                self.evidence.sampler.run(n, one, start) for n, one in enumerate(candidate.sides)
            )
            choices = [one for one in choices if one.holds(a, b)]
            if not choices:
                return None
        return next((one for one in choices if self._confirmed(candidate, one)), None)

    def _relations(self, name: Name, candidate: _Candidate, changed: bool) -> Iterator[Relation]:
        dtypes = [tensor.dtype for tensor in candidate.sides]
        norm = "norm" in label(name)
        yield from relations.between(*dtypes)
        if norm and changed:
            yield from relations.shifted_by_one()
        if changed or not relations.are_weights(*dtypes):
            return
        yield from relations.of_values(norm=norm)
        for number, tensor in enumerate(candidate.sides):
            if tensor.numel > 1:
                value = self.evidence.sampler.run(number, tensor, 0)[0]
                yield relations.constant(float(value.real), "AB"[number])

    def _confirmed(self, candidate: _Candidate, relation: Relation) -> bool:
        holds = True

        def visit(_number: int, _start: int, blocks: Sequence[NDArray[Any]]) -> bool:
            nonlocal holds
            holds = holds and relation.holds(*blocks)
            return holds

        self.evidence.reader.each([candidate.sides], visit, (0, 1))
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
            if (pair := self.evidence.pair(name)) is None:
                continue
            moved = ((form,) for form in orders.MISPLACED.variants(pair))
            if (other := self._among(pair, moved)) is not None:
                explained[name] = (other,)

    def _findings(self, explained: Mapping[Name, tuple[_Explanation, ...]]) -> Iterator[Finding]:
        groups: dict[tuple[str, ...], dict[Name, tuple[_Explanation, ...]]] = {}
        for name, found in explained.items():
            mistakes = {mistake for one in found for mistake in one.mistakes}
            groups.setdefault(tuple(sorted(mistakes)), {})[name] = found
        for names, members in groups.items():
            hypotheses = [KNOWN[mistake] for mistake in names]
            every = [one for found in members.values() for one in found]
            details = list(dict.fromkeys(detail for one in every for detail in one.details))
            if (more := len(details) - _SHOWN_DETAILS) > 0:
                details[_SHOWN_DETAILS:] = [f"and {more} more of the kind"]
            yield Finding(
                names,
                "; and ".join(one.title for one in hypotheses),
                tuple(details),
                " ".join(one.advice for one in hypotheses),
                tuple(map(label, members)),
                len(self.evidence.differing),
                next((o.relation.rounding for o in every if o.relation.rounding), ""),
            )

    def _missing_heads(self) -> Iterator[Finding]:
        """Yield that a side without an output layer ties it to the embedding."""
        output, finding = partners.OUTPUT, partners.HEAD_TIED
        for has, lacks in permutations(self.evidence.sides):
            head, embedding = (has.tensors.get(one) for one in (output, partners.EMBEDDING))
            spec = lacks.parts.get("language")
            if head is None or output in lacks.tensors or spec is None or not spec.tied:
                continue
            copied = embedding is not None and equal(head, embedding, has.files)
            lacking, having = "BA" if has is self.evidence.sides[0] else "AB"
            what = "equals its embedding, so both compute the same"
            detail = (
                f"{lacking} has no output layer, its embedding is used; that of {having} "
                f"{what if copied else 'is another, and is lost'}"
            )
            kept = "Nothing is lost: tie_word_embeddings may be true on both sides."
            yield Finding(
                (finding.name,),
                finding.title,
                (detail,),
                kept if copied else finding.advice,
                (label(output),),
                len(self.evidence.differing),
            )


def _form(pair: TensorPair, mistake: str, detail: str) -> Variant | None:
    """Return the form of a mistake that has these words, if a tensor may have it."""
    variants = KNOWN[mistake].variants(pair)
    return next((variant for variant in variants if variant.detail == detail), None)


def _is_half(
    name: Name, explanation: _Explanation, explained: Mapping[Name, tuple[_Explanation, ...]]
) -> bool:
    """Return whether the partner of an exchange has another explanation, or none."""
    for form in explanation.forms:
        if (partner := form.partner(name)) is None:
            continue
        others = (other for one in explained.get(partner, ()) for other in one.forms)
        if form.mistake not in {other.mistake for other in others}:
            return True
    return False


def _same_rows(name: Name, a: LazyTensor, b: LazyTensor) -> tuple[LazyTensor, LazyTensor, str]:
    """Return two tensors without the rows that only one of them has, if it is a vocabulary."""
    if name not in VOCAB_TENSORS or not a.shape or a.shape[1:] != b.shape[1:] or a.shape == b.shape:
        return a, b, ""
    rows, most = sorted((a.shape[0], b.shape[0]))
    longer = "AB"[b.shape[0] == most]
    padding = f"{longer} has {most - rows} rows more, behind the {rows} that both have"
    return a.narrow(0, 0, rows), b.narrow(0, 0, rows), padding
