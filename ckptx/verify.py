"""Compare two checkpoints of any formats, tensor by tensor, without a model.

Both sides are read to canonical tensors, or, where a family has no schema, by name. Tensors are
compared byte for byte in blocks; memory stays constant.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ckptx import manager
from ckptx.errors import PlanError
from ckptx.lazy import ITEMSIZE, LazyTensor
from ckptx.model_directory import family_named
from ckptx.reader import Files, Gather, numpy_dtype
from ckptx.saving import VOCABULARY, Model, collect, leave_unused, named_tensors

_BLOCK = 8 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor that is not the same on both sides.

    ``kind`` is ``missing`` (only in A), ``extra`` (only in B), ``reshaped``, ``recast`` or
    ``different``. ``max_abs`` is the largest absolute difference, None where values cannot be
    compared.
    """

    name: str
    kind: str
    left: str
    right: str
    elements: int = 0
    """How many elements differ."""
    max_abs: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two checkpoints have in common and what not."""

    left: str
    right: str
    compared: int
    nbytes: int
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether every tensor is the same, byte for byte."""
        return not self.differences and self.compared > 0

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "equal": self.equal,
            "left": self.left,
            "right": self.right,
            "tensors": self.compared,
            "bytes": self.nbytes,
            "counts": dict(Counter(entry.kind for entry in self.differences)),
            "differences": [
                {
                    "name": entry.name,
                    "kind": entry.kind,
                    "left": entry.left,
                    "right": entry.right,
                    "elements": entry.elements,
                    "max_abs": entry.max_abs,
                }
                for entry in self.differences
            ],
            "notes": list(self.notes),
        }

    def render(self, width: int, limit: int = 40) -> str:
        """Return the comparison as text for a terminal of ``width`` columns."""
        lines = []
        for entry in self.differences[:limit]:
            lines += _lines(entry, width)
        if len(self.differences) > limit:
            lines.append(f"... and {len(self.differences) - limit} more (--json lists all)")
        lines += [f"note: {note}" for note in self.notes]
        if self.equal:
            lines.append(f"equal: {self.compared} tensors, {self.nbytes:,} bytes")
        else:
            counts = Counter(entry.kind for entry in self.differences)
            summary = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
            lines.append(f"not equal: {summary or 'nothing to compare'} of {self.compared} tensors")
        return "\n".join(lines)


def compare(
    left: Path, right: Path, loader_a: str | None = None, loader_b: str | None = None
) -> Comparison:
    """Compare two checkpoints; loaders are detected unless named.

    Raises:
        CkptxError: one of them cannot be read, or they have no names in common.
    """
    models = [_load(left, loader_a), _load(right, loader_b)]
    notes = (*_same_use(*models), *_same_vocabulary(*models))
    tensors = _tensors(*models)
    files = [Files(model.begin.files) for model in models]
    try:
        differences = tuple(_differences(*tensors, *map(Gather, files)))
    finally:
        for opened in files:
            opened.close()
    common = set(tensors[0]) & set(tensors[1])
    size = sum(tensors[0][name].nbytes for name in common)
    return Comparison(str(left), str(right), len(common), size, differences, notes)


def _load(path: Path, loader: str | None) -> Model:
    plugin = manager.loader(loader or manager.detect(path))
    return collect(iter(plugin.load(path, {})))


def _same_use(left: Model, right: Model) -> tuple[str, ...]:
    """Leave out of both sides what takes no part in the output, where only one has it."""
    if any("vision" not in model.begin.parts for model in (left, right)):
        return ()
    if {name: set(one) for name, one in left.messages.items()} == {
        name: set(one) for name, one in right.messages.items()
    }:
        return ()
    notes = []
    for label, model in (("A", left), ("B", right)):
        unused = leave_unused(model, family_named(model.family))
        if unused:
            size = sum(one.nbytes for one in unused)
            notes.append(
                f"{label}: {len(unused)} tensors, {size:,} bytes, left out: {unused[0].reason}"
            )
    return tuple(notes)


def _same_vocabulary(left: Model, right: Model) -> tuple[str, ...]:
    """Cut the padding of both sides; the true size is what either of them says."""
    if left.passthrough is not None or right.passthrough is not None:
        return ()
    sizes = {model.spec.vocab_size for model in (left, right)} - {None}
    if len(sizes) != 1:
        return ()
    (rows,) = sizes
    notes = []
    for label, model in (("A", left), ("B", right)):
        for message, tensors in model.messages.items():
            cut = dict(tensors)
            for key, tensor in tensors.items():
                if (message, key) in VOCABULARY and rows is not None and tensor.shape[0] > rows:
                    cut[key] = tensor.narrow(0, 0, rows)
                    padding = tensor.shape[0] - rows
                    notes.append(f"{label}: {message}: {key}: {padding} rows of padding left out")
            model.messages[message] = cut
    return tuple(notes)


def _tensors(left: Model, right: Model) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """Return both sides under names that they share."""
    if left.passthrough is None and right.passthrough is None:
        return _canonical(left), _canonical(right)
    return _named(left), _named(right)


def _canonical(model: Model) -> dict[str, LazyTensor]:
    return {
        f"{message}: {key}": tensor
        for message, tensors in model.messages.items()
        for key, tensor in tensors.items()
    }


def _named(model: Model) -> dict[str, LazyTensor]:
    if model.passthrough is not None:
        if not model.begin.layout.startswith("hf"):
            raise PlanError(
                f"{model.begin.root}: tensors are named as {model.begin.layout} and no schema "
                "knows their model; only the same names can be compared"
            )
        return dict(model.passthrough)
    return named_tensors(model, family_named(model.family).layout("hf"))[0]


def _differences(
    left: Mapping[str, LazyTensor],
    right: Mapping[str, LazyTensor],
    left_gather: Gather,
    right_gather: Gather,
) -> Iterator[Difference]:
    for name, tensor in left.items():
        if name not in right:
            yield Difference(name, "missing", _described(tensor), "-")
            continue
        other = right[name]
        here, there = _described(tensor), _described(other)
        if tensor.shape != other.shape:
            yield Difference(name, "reshaped", here, there)
            continue
        elements, max_abs = _measure(tensor, other, left_gather, right_gather)
        if tensor.dtype != other.dtype:
            yield Difference(name, "recast", here, there, elements, max_abs)
        elif elements:
            yield Difference(name, "different", here, there, elements, max_abs)
    for name, tensor in right.items():
        if name not in left:
            yield Difference(name, "extra", "-", _described(tensor))


def _measure(
    left: LazyTensor, right: LazyTensor, left_gather: Gather, right_gather: Gather
) -> tuple[int, float | None]:
    """Return how many elements differ, and by how much at most."""
    step = _BLOCK // max(ITEMSIZE[left.dtype], ITEMSIZE[right.dtype])
    count, largest = 0, 0.0
    for start in range(0, left.numel, step):
        stop = min(left.numel, start + step)
        values = []
        for tensor, gather in ((left, left_gather), (right, right_gather)):
            buffer = np.empty((stop - start) * ITEMSIZE[tensor.dtype], np.uint8)
            gather.add_range(tensor, start, stop, buffer)
            gather.run()
            values.append((buffer, tensor.dtype))
        (here, here_dtype), (there, there_dtype) = values
        if here_dtype == there_dtype and np.array_equal(here, there):
            continue
        first, second = here.view(numpy_dtype(here_dtype)), there.view(numpy_dtype(there_dtype))
        if here_dtype == there_dtype:
            # Bits, not values: a NaN equals itself and 0.0 is not -0.0.
            width = ITEMSIZE[here_dtype]
            unequal = (here.reshape(-1, width) != there.reshape(-1, width)).any(axis=1)
            first, second = first[unequal], second[unequal]
            count += len(first)
        wide = np.complex128 if "complex" in here_dtype + there_dtype else np.float64
        distance = np.abs(first.astype(wide) - second.astype(wide))
        if here_dtype != there_dtype:
            count += int(np.count_nonzero(distance))
        largest = max(largest, float(np.nan_to_num(distance, nan=math.inf).max(initial=0.0)))
    return count, largest


def _described(tensor: LazyTensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _lines(entry: Difference, width: int) -> list[str]:
    detail = entry.left if entry.left == entry.right else f"{entry.left} / {entry.right}"
    if entry.elements:
        detail += f", {entry.elements:,} elements differ"
    if entry.elements and entry.max_abs is not None:
        detail += f", at most by {entry.max_abs:.3g}"
    line = f"{entry.kind:<9} {entry.name}  {detail}"
    return [line] if len(line) <= width else [f"{entry.kind:<9} {entry.name}", f"{'':10}{detail}"]
