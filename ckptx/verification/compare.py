"""Compare two checkpoints of any formats, tensor by tensor, without a model; say why they differ.

`ckptx.verification.pairing` brings both to common names and shapes, `ckptx.verification.difference`
compares them in blocks, and `ckptx.verification.diagnosis` tries known mistakes on what differs.
Memory stays constant.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ckptx.model.canonical_names import keys_of
from ckptx.protocol.progress import Progress
from ckptx.registry.open import Checkpoint, opened
from ckptx.storage.blocks import BlockReader
from ckptx.tensors.lazy import LazyTensor
from ckptx.text.shown import Shown
from ckptx.text.wrapping import labelled, page
from ckptx.verification.diagnosis import Finding, diagnose
from ckptx.verification.difference import Deviation, Tolerance, measure
from ckptx.verification.pairing import Name, Paired, label, pair

EXACT = Tolerance()
_WHOLE = ("missing", "extra", "reshaped")
"""Kinds of differences that concern a tensor as a whole; they are shown first."""
_LIMIT = 12  # differing tensors in the text form


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor that is not the same on both sides.

    ``kind`` is ``missing`` (only in A), ``extra`` (only in B), ``reshaped``, ``recast`` (another
    dtype) or ``different``. The largest differences are None where values cannot be compared.
    """

    name: str
    kind: str
    left: str
    right: str
    elements: int = 0
    """How many elements differ, by more than the tolerance if there is one."""
    of: int = 0
    """How many elements there are."""
    max_abs: float | None = None
    max_rel: float | None = None
    """The largest difference relative to A."""

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values; what is not finite as the string ``inf``."""
        return {
            key: "inf" if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


@dataclass(frozen=True, slots=True)
class Comparison(Shown):
    """What two checkpoints have in common and what not."""

    left: str
    right: str
    compared: int
    nbytes: int
    differences: tuple[Difference, ...]
    """Worst first."""
    notes: tuple[str, ...]
    diagnoses: tuple[Finding, ...] = ()
    tolerance: Tolerance = EXACT
    close: int = 0
    """Tensors that are not the same, and within the tolerance."""
    architectures: str = ""
    """What the models are, where they are of different architectures; then there is no
    diagnosis."""

    @property
    def equal(self) -> bool:
        """Whether every tensor is the same: byte for byte, or within the tolerance."""
        return not self.differences and self.compared > 0

    def __bool__(self) -> bool:
        """Refuse: a comparison that was made is no answer.

        Raises:
            TypeError: always.
        """
        raise TypeError("a Comparison is neither true nor false; ask for its .equal")

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "equal": self.equal,
            "left": self.left,
            "right": self.right,
            "architectures": self.architectures,
            "tensors": self.compared,
            "bytes": self.nbytes,
            "rtol": self.tolerance.rtol,
            "atol": self.tolerance.atol,
            "ignore_dtype": self.tolerance.any_dtype,
            "close": self.close,
            "counts": dict(Counter(entry.kind for entry in self.differences)),
            "differences": [entry.to_json() for entry in self.differences],
            "diagnoses": [finding.to_json() for finding in self.diagnoses],
            "notes": list(self.notes),
        }

    def render(self, width: int = 80, limit: int = _LIMIT) -> str:
        """Return the comparison as text for a terminal of ``width`` columns."""
        lines = []
        if self.architectures:
            said = f"these are models of different architectures: {self.architectures}"
            lines += [*labelled([("note", said)], page(width)), ""]
        lines += _table(self.differences[:limit], width)
        if len(self.differences) > limit:
            lines.append(f"... and {len(self.differences) - limit} more (--json lists all)")
        for finding in self.diagnoses:
            lines += ["", *labelled(finding.lines(), page(width))]
        if self.diagnoses or len(lines) > 1:
            lines.append("")
        if legend := "; ".join(_meanings([one.name for one in self.differences[:limit]])):
            lines += labelled([("names", legend)], page(width))
        lines += labelled((("note", note) for note in self.notes), page(width))
        return "\n".join([*lines, self._summary()])

    def _summary(self) -> str:
        size = f"{self.nbytes:,} bytes"
        if self.equal:
            how = f", {self.close} of them within the tolerance only" if self.close else ""
            return f"equal: {self.compared} tensors, {size}{how}"
        counts = Counter(entry.kind for entry in self.differences)
        summary = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        explained = {name for finding in self.diagnoses for name in finding.tensors}
        unexplained = len(self.differences) - len(explained)
        rest = f"; {unexplained} unexplained" if self.diagnoses and unexplained else ""
        return f"not equal: {summary or 'nothing to compare'} of {self.compared} tensors{rest}"


def compare(
    left: Checkpoint | Path,
    right: Checkpoint | Path,
    tolerance: Tolerance = EXACT,
    *,
    diagnosis: bool = True,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two checkpoints, opened or by their paths.

    With ``diagnosis`` known mistakes are tried on what differs. ``progress`` counts the bytes
    of A that are compared.

    Raises:
        CkptxError: one of them cannot be read, or they have no names in common.
    """
    with ExitStack() as stack:
        sides = [stack.enter_context(opened(one)) for one in (left, right)]
        paired = pair(*sides)
        reader = BlockReader(*(stack.enter_context(closing(side.files())) for side in sides))
        deviations = _deviations(paired, reader, tolerance, progress or Progress())
        a, b = paired.left.tensors, paired.right.tensors
        differences = {
            name: found
            for name in dict.fromkeys((*a, *b))
            if (found := _difference(name, a.get(name), b.get(name), deviations, tolerance))
        }
        wanted = diagnosis and differences and not paired.architectures
        findings = diagnose(paired, tuple(differences), reader) if wanted else ()
    close = [
        deviation.max_abs
        for name, deviation in deviations.items()
        if deviation.differing and name not in differences
    ]
    notes = list(paired.notes)
    if close:
        notes.append(
            f"{len(close)} tensors differ within the tolerance, at most by {max(close):.3g}"
        )
    return Comparison(
        str(sides[0].path),
        str(sides[1].path),
        len(a.keys() & b.keys()),
        sum(tensor.nbytes for name, tensor in a.items() if name in b),
        tuple(sorted(differences.values(), key=_rank)),
        tuple(notes),
        findings,
        tolerance,
        len(close),
        paired.architectures,
    )


def _deviations(
    paired: Paired, reader: BlockReader, tolerance: Tolerance, progress: Progress
) -> dict[Name, Deviation]:
    """Return how far the tensors are apart that have one shape on both sides."""
    a, b = paired.left.tensors, paired.right.tensors
    pairs = {name: (a[name], b[name]) for name in a if name in b and a[name].shape == b[name].shape}
    with closing(progress):
        progress.begin(sum(tensor.nbytes for tensor, _ in pairs.values()))
        apart = measure(reader, list(pairs.values()), tolerance, progress.advance)
    return dict(zip(pairs, apart, strict=True))


def _difference(
    name: Name,
    left: LazyTensor | None,
    right: LazyTensor | None,
    deviations: Mapping[Name, Deviation],
    tolerance: Tolerance,
) -> Difference | None:
    found = Difference(
        label(name),
        "extra" if left is None else "missing" if right is None else "reshaped",
        f"{left.dtype} {list(left.shape)}" if left else "-",
        f"{right.dtype} {list(right.shape)}" if right else "-",
    )
    if left is None or right is None or left.shape != right.shape:
        return found
    deviation, recast = deviations[name], left.dtype != right.dtype
    if not deviation.beyond and not (recast and not tolerance.any_dtype):
        return None
    return replace(
        found,
        kind="recast" if recast else "different",
        elements=deviation.beyond,
        of=left.numel,
        max_abs=deviation.max_abs,
        max_rel=deviation.max_rel,
    )


def _meanings(labels: Sequence[str]) -> Iterator[str]:
    """Yield what the keys among ``labels`` mean, each once: not everyone knows Megatron's names."""
    parts = (text.partition(": ") for text in labels)
    for key, message in {key: message for message, _, key in parts}.items():
        known = keys_of(message).get(key)
        if known is not None and not known.meaning.startswith("its "):
            yield f"{key} is the {known.meaning}"


def _rank(entry: Difference) -> tuple[int, float, int]:
    whole = _WHOLE.index(entry.kind) if entry.kind in _WHOLE else len(_WHOLE)
    return whole, -(entry.max_abs or 0.0), -entry.elements


_COLUMNS = ("differ", "", "max abs", "max rel")


def _table(entries: Sequence[Difference], width: int) -> Iterator[str]:
    """Yield a table of differences; where it is too wide, two lines for each."""
    if not entries:
        return
    cells = [_COLUMNS, *map(_cells, entries)]
    sizes = [max(map(len, column)) for column in zip(*cells, strict=True)]
    head, *numbers = (
        "  ".join(f"{cell:>{size}}" for cell, size in zip(row, sizes, strict=True)) for row in cells
    )
    names = [f"{entry.kind:<9} {entry.name}" for entry in entries]
    types = [e.left if e.left == e.right else f"{e.left} / {e.right}" for e in entries]
    column = max(map(len, names))
    if column + len(head) + max(map(len, types)) + 4 <= width:
        yield f"{'':<{column}}  {head}".rstrip()
        for name, row, type_ in zip(names, numbers, types, strict=True):
            yield f"{name:<{column}}  {row}  {type_}".rstrip()
        return
    for name, values, entry, type_ in zip(names, cells[1:], entries, types, strict=True):
        yield name
        yield f"{'':10}{type_}"
        if entry.max_abs is not None:
            differ, share, most, relative = values
            detail = f"{differ} differ ({share}), max abs {most}, max rel {relative}"
            yield from labelled([("", detail)], page(width))


def _cells(entry: Difference) -> tuple[str, ...]:
    if entry.max_abs is None or entry.max_rel is None:
        return ("",) * len(_COLUMNS)
    return (
        f"{entry.elements:,}",
        _share(entry.elements, entry.of),
        f"{entry.max_abs:.3g}",
        f"{entry.max_rel:.3g}",
    )


def _share(part: int, whole: int) -> str:
    """Return a part in percent, all and nothing only where they are.

    Examples:
        >>> _share(1, 1000), _share(999, 1000), _share(5, 5)
        ('<1%', '99%', '100%')
    """
    percent = 100 * part // whole if whole else 0
    return "<1%" if part and not percent else f"{percent}%"
