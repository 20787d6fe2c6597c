"""What a conversion did, and what one would do: as JSON and as text.

The JSON is complete and its keys are stable. The text fits any width and shows long lists in part.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ckptx.errors import first_few
from ckptx.model.family import unknown_keys_said
from ckptx.text.shown import Shown
from ckptx.text.sizes import size_text
from ckptx.text.wrapping import labelled

if TYPE_CHECKING:
    from ckptx.conversion.proof import Proof
    from ckptx.protocol.contracts import SavePlan
    from ckptx.protocol.messages import Begin, End

_SHOWN = 5  # entries of a list in the text form
_FILES = 100  # output files of a plan in the text form
_DIGEST = 23  # characters of the digest in the text form; JSON and manifest have it all


@dataclass(frozen=True, slots=True)
class Facts:
    """What a proved plan does to the tensors. Sizes are in bytes."""

    source_format: str
    source_layout: str
    families: Mapping[str, str]
    """Model part to family."""
    files: int
    tensors: int
    source_tensors: int
    bytes_in: int
    bytes_out: int
    dtypes: Mapping[str, int]
    """Bytes of the target's tensors by their dtype, most first."""
    inexact: Mapping[str, Sequence[str]]
    """Step (``"float32 -> bfloat16"``) to the tensors it changes."""
    widened: Mapping[str, Sequence[str]]
    """Exact casts, likewise."""
    filled: Mapping[str, int]
    """Tensor to its elements that no source holds."""
    replicas: int
    """Copies in the source that must equal the one that is read."""
    dropped: Sequence[Mapping[str, Any]]
    """What is not converted: ``name``, ``reason``, ``bytes``."""
    notes: Sequence[str]
    stages: Sequence[str]
    details: Mapping[str, Any]
    load_hint: str

    @classmethod
    def of(cls, begin: Begin, end: End, plan: SavePlan, proof: Proof) -> Facts:
        """Return the facts of a proved plan."""
        inexact = proof.inexact
        return cls(
            source_format=begin.format,
            source_layout=begin.layout,
            families={part: spec.family for part, spec in begin.parts.items()},
            files=proof.files,
            tensors=proof.tensors,
            source_tensors=proof.sources,
            bytes_in=proof.bytes_in,
            bytes_out=proof.bytes_out,
            dtypes=dict(proof.dtypes.most_common()),
            inexact=inexact,
            widened={step: names for step, names in proof.casts.items() if step not in inexact},
            filled=dict(proof.filled),
            replicas=proof.replicas,
            dropped=[drop.to_json() for drop in proof.dropped],
            notes=tuple(dict.fromkeys((*end.notes, *unknown_keys_said(begin.parts), *plan.notes))),
            stages=tuple(plan.stages),
            details=dict(plan.details),
            load_hint=plan.load_hint,
        )

    def at(self, target: Path, step_flag: str | None = None) -> Facts:
        """Return the facts with the target's path in the load hint.

        Args:
            target: the path that the user named.
            step_flag: the plan's, where a pointer is left as it is: without a flag the result
                does not load then, and there is no hint.
        """
        if step_flag == "" and "{step}" in self.load_hint:
            return replace(self, load_hint="")
        place = str(target)
        if '"{target}' not in self.load_hint:  # a command line, not Python
            place = shlex.quote(place)
        hint = self.load_hint.replace("{step}", step_flag or "").replace("{target}", place)
        return replace(self, load_hint=hint)


@dataclass(frozen=True, slots=True)
class _Conversion(Shown):
    """A conversion that was, or would be, done."""

    loader: str
    saver: str
    target: str
    facts: Facts

    @property
    def inexact(self) -> Mapping[str, Sequence[str]]:
        """Step (``"float32 -> bfloat16"``) to the tensors it changes."""
        return self.facts.inexact

    @property
    def dropped(self) -> Sequence[Mapping[str, Any]]:
        """What is not converted: ``name``, ``reason``, ``bytes``."""
        return self.facts.dropped

    @property
    def notes(self) -> Sequence[str]:
        """Remarks of loader and saver."""
        return self.facts.notes

    def _common(self) -> dict[str, Any]:
        places = {"loader": self.loader, "saver": self.saver, "target": self.target}
        return {**places, **asdict(self.facts)}


class Verdict(Protocol):
    """What came of comparing a target with its source."""

    @property
    def equal(self) -> bool:
        """Whether they are the same."""

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""

    def render(self, width: int = 80) -> str:
        """Return the comparison as text; its last line sums it up."""


@dataclass(frozen=True, slots=True)
class Report(_Conversion):
    """A finished conversion."""

    seconds: float
    digest: str
    """Digest of all tensors of the target; empty if a Megatron-style module wrote them."""
    resumed: int = 0
    """Bytes that an interrupted run had written, and that were not written again."""
    verification: Verdict | None = None
    """Where ``--verify`` asked for it."""

    @property
    def rate(self) -> float:
        """Output in GB (10^9 bytes) per second of wall time."""
        return self.facts.bytes_out / 1e9 / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the whole report; every key but ``verification`` is always there."""
        verdict = self.verification
        return {
            **self._common(),
            "seconds": round(self.seconds, 3),
            "gb_per_second": round(self.rate, 3),
            "digest": self.digest,
            "resumed": self.resumed,
            **({"verification": verdict.to_json()} if verdict is not None else {}),
        }

    def render(self, width: int = 80) -> str:
        """Return the report as text of at most ``width`` columns, but for what is to be copied."""
        # Of models of a few megabytes the speed says nothing.
        speed = f" ({self.rate:.2f} GB/s)" if self.rate >= 0.01 else ""
        head = f"{self.loader} -> {self.saver} in {self.seconds:.1f} s{speed}"
        pairs = [("converted", head), ("target", self.target), *_facts_lines(self.facts)]
        if self.resumed:
            text = f"{size_text(self.resumed)} were on disk from a run before, and are whole"
            pairs.append(("resumed", text))
        if self.digest:
            pairs.append(("digest", self.digest[:_DIGEST]))
        lines = list(labelled(pairs, width))
        if self.facts.load_hint:
            lines += ["load with", self.facts.load_hint]
        if self.verification is not None:
            said = "A, the source as it was to be converted, and B, the target:"
            lines += [*labelled([("verified", said)], width), self.verification.render(width)]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Plan(_Conversion):
    """A conversion that was planned and proved, and not executed. Sizes are in bytes."""

    files: Sequence[Mapping[str, Any]]
    """Each output file: ``path``, ``bytes``, ``tensors``."""
    pointers: Sequence[str]
    """Small files beside the target, written last."""
    peak_memory: int
    """The most memory that the conversion takes, all processes together: the bound of its buffers,
    and what this plan took."""
    spool: int
    """Disk that tensors without a source file take while the conversion runs."""
    refused: str = ""
    """Why the conversion would not start now: the target exists, the disk is too small."""
    tensors: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    """Each output tensor: ``file``, ``name``, ``dtype``, ``shape``, ``operations``."""

    @property
    def disk(self) -> int:
        """Disk needed, the spool included."""
        return self.facts.bytes_out + self.spool

    def to_json(self) -> dict[str, Any]:
        """Return the whole plan; every key is always there."""
        return {
            **self._common(),
            "outputs": list(self.files),
            "pointers": list(self.pointers),
            "peak_memory": self.peak_memory,
            "spool": self.spool,
            "disk": self.disk,
            "refused": self.refused,
            "output_tensors": list(self.tensors),
        }

    def render(self, width: int = 80) -> str:
        """Return the plan as text of at most ``width`` columns; of many files, the first."""
        needed = f"{size_text(self.disk)} of disk, at most {size_text(self.peak_memory)} of memory"
        pairs = [
            ("plan", f"{self.loader} -> {self.saver}, nothing is written"),
            ("target", self.target),
            *_facts_lines(self.facts),
            ("needs", needed),
        ]
        if self.refused:
            pairs.append(("refused", f"convert would stop here: {self.refused}"))
        pairs += [("stage", stage) for stage in self.facts.stages]
        for file in self.files[:_FILES]:
            text = f"{file['path']}  {size_text(file['bytes'])}, {file['tensors']} tensors"
            pairs.append(("file", text))
        if len(self.files) > _FILES:
            pairs.append(("file", f"and {len(self.files) - _FILES:,} more, which --json lists"))
        pairs += [("file", name) for name in self.pointers]
        return "\n".join(labelled(pairs, width))


def _facts_lines(facts: Facts) -> Iterator[tuple[str, str]]:
    """Yield labels and texts."""
    family = ", ".join(sorted(set(facts.families.values()) - {""})) or "no known family, by name"
    source = f"{facts.source_format}, layout {facts.source_layout}: {family}"
    yield "source", source
    count = f"{facts.tensors} in {facts.files} file{'s' * (facts.files != 1)}"
    yield "tensors", f"{count}, from {facts.source_tensors}"
    yield "bytes", f"{size_text(facts.bytes_in)} in, {size_text(facts.bytes_out)} out"
    if facts.dtypes:
        main, *others = facts.dtypes.items()
        rest = [f"{dtype} ({size_text(size)})" for dtype, size in others]
        yield "dtype", ", ".join([main[0], *rest])
    for step, names in facts.inexact.items():
        yield "inexact", f"{step}: {first_few(names, _SHOWN)}"
    if not facts.inexact:
        besides = " but what is filled" if facts.filled else ""
        yield "inexact", f"none: every value{besides} is the source's"
    for step, names in facts.widened.items():
        yield "widened", f"{step} (exact): {first_few(names, _SHOWN)}"
    if facts.filled:
        elements = [f"{name} ({count:,} elements)" for name, count in facts.filled.items()]
        yield "filled", first_few(elements, _SHOWN)
    if facts.replicas:
        yield "replicas", f"{facts.replicas} copies compared with the one read"
    reasons: dict[str, list[Mapping[str, Any]]] = {}
    for drop in facts.dropped:
        reasons.setdefault(drop["reason"], []).append(drop)
    for reason, drops in reasons.items():
        size = sum(drop["bytes"] for drop in drops)  # none where nothing of it is a tensor
        names = first_few([drop["name"] for drop in drops], _SHOWN)
        yield "dropped", f"{names}{f' ({size_text(size)})' if size else ''}: {reason}"
    yield from (("note", note) for note in facts.notes)
