"""The proof of a plan: made from metadata alone, before a byte moves.

Three invariants. Every byte of every output file is written exactly once: the regions of a file
tile it. Every byte of every source tensor is read, or belongs to something dropped by name. Every
inexact step is listed.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import PurePosixPath
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptx.errors import PlanError, listing
from ckptx.protocol.contracts import SavePlan
from ckptx.protocol.messages import Begin, Dropped, End, SourceTensor
from ckptx.storage.file_plan import Crc32, FilePlan
from ckptx.tensors import lazy
from ckptx.tensors.dtypes import ITEMSIZE, is_widening
from ckptx.tensors.lazy import Box, Computed, LazyTensor, Shape, Sliced, Stored
from ckptx.tensors.operations import OPERATIONS
from ckptx.tensors.pieces import leaves

Cells: TypeAlias = NDArray[np.bool_]
_MAX_CELLS = 1 << 28
_VIEWS = {Sliced: "slice", lazy.Permuted: "permute", lazy.Split: "split", lazy.Merged: "merge"}


@dataclass(slots=True)
class Proof:
    """What a plan does, counted while it was checked. Bytes are bytes."""

    files: int = 0
    tensors: int = 0
    bytes_in: int = 0
    """Bytes of source tensors, shared bytes once; all are read or dropped."""
    bytes_out: int = 0
    dtypes: Counter[str] = field(default_factory=Counter)
    """Bytes of the target's tensors by their dtype."""
    sources: int = 0
    casts: dict[str, list[str]] = field(default_factory=dict)
    """``"float32 -> bfloat16"`` to the tensors it applies to; widening casts are exact."""
    computed: dict[str, list[str]] = field(default_factory=dict)
    """What was computed to the tensors it applies to, as ``"float8_e4m3fn * float32 -> ..."``."""
    filled: dict[str, int] = field(default_factory=dict)
    """Tensor to the number of elements that no source holds."""
    replicas: int = 0
    """Copies in the source that must equal the one that is read."""
    dropped: tuple[Dropped, ...] = ()

    @property
    def inexact(self) -> dict[str, list[str]]:
        """The computations, and the casts that can change a value."""
        casts = {
            step: names
            for step, names in self.casts.items()
            if not is_widening(*step.split(" -> "))
        }
        return self.computed | casts


def prove(plan: SavePlan, begin: Begin, end: End) -> Proof:
    """Check a plan against its source and return its totals.

    Raises:
        PlanError: an output byte is written twice or not at all, a source byte would be lost, or
            the plan holds no tensor.
    """
    proof = Proof(dropped=(*end.dropped, *plan.dropped), sources=len(begin.sources))
    used, steps = _Used(), _Steps()
    paths: set[str] = set()
    for file in plan.files:
        _check_path(file, paths)
        _check_tiling(file)
        proof.files += 1
        proof.bytes_out += file.size
        for region in file.regions:
            if isinstance(region.content, LazyTensor):
                proof.tensors += 1
                proof.dtypes[region.content.dtype] += region.content.nbytes
                _account(region.name, region.content, steps, proof, used)
    if not proof.tensors:
        raise PlanError("the plan writes no tensor: nothing was found to convert")
    for drop in proof.dropped:
        for tensor in drop.tensors:
            used.leaves.extend(leaf for leaf in leaves(tensor) if isinstance(leaf, Stored))
    proof.bytes_in = _check_sources(begin, used.stored())
    return proof


@dataclass(slots=True)
class _Used:
    """What is read: stored leaves, and boxes of computed tensors by the identity of these.

    Ranks cut one computed tensor into many boxes; together they need its inputs once.
    """

    leaves: list[Stored] = field(default_factory=list)
    boxes: dict[int, tuple[Computed, dict[Box, None]]] = field(default_factory=dict)

    def add(self, tensor: Computed, box: Box) -> None:
        """Add a box of a computed tensor."""
        self.boxes.setdefault(id(tensor), (tensor, {}))[1][box] = None

    def stored(self) -> Iterator[Stored]:
        """Yield the stored leaves of everything, further ones below computed tensors included."""
        yield from self.leaves
        for tensor, boxes in self.boxes.values():
            whole = tuple((0, size) for size in tensor.shape)
            dtype, shape = tensor.dtype, tensor.shape
            parts: Iterable[LazyTensor] = (Sliced(dtype, shape, tensor, box) for box in boxes)
            for part in [tensor] if _fill(whole, boxes) else parts:
                yield from (leaf for leaf in leaves(part) if isinstance(leaf, Stored))


def _fill(whole: Box, boxes: Iterable[Box]) -> bool:
    """Return whether boxes follow one another along one axis, from end to end of the whole."""
    ordered = sorted(boxes)
    across = [axis for axis, bounds in enumerate(whole) if any(b[axis] != bounds for b in ordered)]
    if len(across) != 1:
        return not across
    (axis,) = across
    position, end = whole[axis]
    for box in ordered:
        start, stop = box[axis]
        if start > position:
            return False
        position = max(position, stop)
    return position == end


def operations(tensor: LazyTensor) -> tuple[str, ...]:
    """Return the kinds of steps between the source and a tensor, outermost first, each once."""
    return _Steps().of(tensor)[0]


class _Steps:
    """The steps of tensors and their replicas; a computed tensor of many ranks is walked once."""

    def __init__(self) -> None:
        # By identity; what is computed is held, lest its identity be used again.
        self._computed: dict[int, tuple[Computed, tuple[str, ...], int]] = {}
        self._noted: dict[int, tuple[Computed, int, Sequence[list[str]]]] = {}
        self._joined: dict[tuple[str, tuple[str, ...]], tuple[str, ...]] = {}

    def noted(self, tensor: LazyTensor, proof: Proof) -> tuple[int, Sequence[list[str]]]:
        """Return the replicas of a tensor, and where a proof lists what its elements go through."""
        known = self._noted.get(id(tensor))
        if known is not None:
            return known[1:]
        taken, replicas = self.of(tensor)
        lists = []
        for step in taken:
            kind, _, what = step.partition(" ")
            if what:
                listed = proof.casts if kind == "cast" else proof.computed
                lists.append(listed.setdefault(what, []))
        if isinstance(tensor, Computed):
            self._noted[id(tensor)] = tensor, replicas, lists
        return replicas, lists

    def of(self, tensor: LazyTensor) -> tuple[tuple[str, ...], int]:
        """Return the kinds of steps, outermost first, each once, and the number of replicas."""
        match tensor:
            case Stored():
                return (), 0
            case Sliced() | lazy.Permuted() | lazy.Split() | lazy.Merged():
                return self._after(_VIEWS[type(tensor)], tensor.base)
            case lazy.Cast(base=base):
                return self._after(f"cast {base.dtype} -> {tensor.dtype}", base)
            case Computed():
                known = self._computed.get(id(tensor))
                if known is None:
                    label = f"compute {OPERATIONS[tensor.op].label(tensor)}"
                    known = tensor, *self._all(label, tensor.inputs)
                    self._computed[id(tensor)] = known
                return known[1:]
            case lazy.Tiled(tiles=tiles):
                return self._all("tile", [part for _, part in tiles])
            case lazy.Replicated(copies=copies):
                steps, _ = self._after("replicated", copies[0])
                return steps, len(copies) - 1 + sum(self.of(copy)[1] for copy in copies)
        return ("fill",), 0

    def _after(self, step: str, base: LazyTensor) -> tuple[tuple[str, ...], int]:
        steps, replicas = self.of(base)
        joined = self._joined.get((step, steps))
        if joined is None:
            joined = self._joined[step, steps] = tuple(dict.fromkeys((step, *steps)))
        return joined, replicas

    def _all(self, step: str, parts: Sequence[LazyTensor]) -> tuple[tuple[str, ...], int]:
        found = [self.of(part) for part in parts]
        every = (one for steps, _ in found for one in steps)
        return tuple(dict.fromkeys((step, *every))), sum(replicas for _, replicas in found)


def _check_path(file: FilePlan, paths: set[str]) -> None:
    path = PurePosixPath(file.path)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise PlanError(f"{file.path!r}: an output path must stay inside the target")
    if file.path in paths:
        raise PlanError(f"{file.path!r} is planned twice")
    paths.add(file.path)


def _check_tiling(file: FilePlan) -> None:
    position = 0
    for offset, wanted, content, name in file.regions:
        size = len(content) if isinstance(content, bytes) else _size(file, content)
        if size != wanted:
            raise PlanError(f"{file.path}: {name!r} holds {size} bytes, its region {wanted}")
        if offset != position:
            raise PlanError(
                f"{file.path}: {name!r} starts at byte {offset}, expected "
                f"{position}: every byte must be written exactly once"
            )
        position += size
    if position != file.size:
        raise PlanError(f"{file.path}: regions end at byte {position}, the file at {file.size}")


def _size(file: FilePlan, content: LazyTensor | Crc32) -> int:
    """Return the bytes that a tensor or a checksum takes in a file."""
    if not isinstance(content, Crc32):
        return content.nbytes
    number = content.region
    summed = file.regions[number].content if 0 <= number < len(file.regions) else None
    if not isinstance(summed, LazyTensor):
        raise PlanError(f"{file.path}: a checksum of region {number}, which is no tensor")
    return 4


def _account(name: str, tensor: LazyTensor, steps: _Steps, proof: Proof, used: _Used) -> None:
    """Note the leaves of an output tensor, its casts, computations, fills and replicas."""
    if isinstance(tensor, Stored) and 0 not in tensor.strides:
        used.leaves.append(tensor)
        return
    read = tensor
    while isinstance(read, lazy.Split | lazy.Merged | lazy.Permuted):
        read = read.base  # what is read stays the same
    through, rest = tensor, leaves(tensor, computed=False)
    match read:
        case Sliced(base=Computed() as base, box=box):
            # A rank's share of an expert: most of what a giant has.
            used.add(base, box)
            through, rest = base, iter(())
    replicas, lists = steps.noted(through, proof)
    proof.replicas += replicas
    for listed in lists:
        listed.append(name)
    for leaf in rest:
        match leaf:
            case Sliced(base=Computed() as base, box=box):
                used.add(base, box)
            case Stored(strides=strides):
                used.leaves.append(leaf)
                if 0 in strides:
                    proof.filled[name] = proof.filled.get(name, 0) + leaf.numel
            case _:
                proof.filled[name] = proof.filled.get(name, 0) + leaf.numel


@dataclass(slots=True)
class _Runs:
    """The bytes of a stored tensor: ``run`` bytes at every step of nested ``(count, stride)``."""

    start: int
    run: int
    steps: tuple[tuple[int, int], ...]

    @property
    def stop(self) -> int:
        return self.start + self.run + sum((count - 1) * stride for count, stride in self.steps)


def _runs(leaf: Stored) -> _Runs:
    return _Runs(leaf.offset, *_spread(leaf.dtype, leaf.shape, leaf.strides))


@lru_cache(maxsize=65536)
def _spread(dtype: str, shape: Shape, strides: Shape) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Return the run and the steps of leaves that lie like this; a few kinds are a whole model."""
    size = ITEMSIZE[dtype]
    # Axes may lie in any order in the file.
    axes = sorted(
        (stride * size, count)
        for stride, count in zip(strides, shape, strict=True)
        if count != 1 and stride
    )
    run = 0 if 0 in shape else size
    while axes and axes[0][0] == run:
        run *= axes.pop(0)[1]
    return run, tuple((count, stride) for stride, count in axes)


def _check_sources(begin: Begin, used: Iterable[Stored]) -> int:
    """Check that every source byte is used; return how many there are, shared bytes once."""
    spans = _spans(begin.sources)
    starts = [(span.file, span.start) for span in spans]
    known = dict(zip(starts, spans, strict=True))
    for leaf in dict.fromkeys(used):
        if 0 in leaf.shape:
            continue
        runs = _runs(leaf)
        place = leaf.file, leaf.offset
        span = known.get(place)  # most tensors are read from their start
        if span is None and (index := bisect.bisect_right(starts, place)):
            span = spans[index - 1]
        if span is None or span.file != leaf.file or runs.stop > span.stop:
            raise _undeclared(begin, leaf.file, runs)
        span.used.append(runs)
    for span in spans:
        if any(runs.steps for runs in span.declared):
            _check_declared(begin, span)
    lost = [name for span in spans for name in _lost(span)]
    if lost:
        raise PlanError(
            f"{len(lost)} source tensors would be lost, in part or whole, without a reason: "
            f"{listing(lost)}"
        )
    return sum(_volume(span) for span in spans)


def _undeclared(begin: Begin, file: int, runs: _Runs) -> PlanError:
    return PlanError(
        f"{begin.files[file]}: bytes {runs.start} to {runs.stop} are read, but no source tensor "
        "lies there: the loader did not declare it"
    )


def _check_declared(begin: Begin, span: _Span) -> None:
    """Check that nothing is read from between the runs of strided source tensors."""
    if all(runs in span.declared for runs in span.used):
        return
    cells, unit = _paint(span, span.declared), _unit(span)
    for runs in span.used:
        if not _cells(cells, span, runs, unit).all():
            raise _undeclared(begin, span.file, runs)


@dataclass(slots=True)
class _Span:
    """Neighbouring source tensors that share bytes; usually one tensor."""

    file: int
    start: int
    stop: int
    sources: list[tuple[str, _Runs]]
    used: list[_Runs] = field(default_factory=list)

    @property
    def declared(self) -> Iterator[_Runs]:
        return (runs for _, runs in self.sources)


def _spans(sources: Iterable[SourceTensor]) -> list[_Span]:
    extents = []
    for source in sources:
        extent = source.extent
        for leaf in (extent,) if isinstance(extent, Stored) else leaves(extent):
            if isinstance(leaf, Stored) and 0 not in leaf.shape:
                runs = _runs(leaf)
                extents.append((leaf.file, runs.start, runs.stop, source.name, runs))
    extents.sort(key=lambda extent: extent[:4])
    spans: list[_Span] = []
    for file, start, stop, name, runs in extents:
        if spans and spans[-1].file == file and start < spans[-1].stop:
            spans[-1].sources.append((name, runs))
            spans[-1].stop = max(stop, spans[-1].stop)
        else:
            spans.append(_Span(file, start, stop, [(name, runs)]))
    return spans


def _lost(span: _Span) -> list[str]:
    """Return the names of the span's tensors that are not used in full."""
    if len(span.sources) == 1 and span.sources[0][1] in span.used:
        return []
    if not any(runs.steps for runs in (*span.declared, *span.used)):
        covered = _union(span.used)
        return [name for name, source in span.sources if not _inside(source, covered)]
    cells = _paint(span, span.used)
    unit = _unit(span)
    return [name for name, source in span.sources if not _cells(cells, span, source, unit).all()]


def _volume(span: _Span) -> int:
    if len(span.sources) == 1:
        runs = span.sources[0][1]
        return runs.run * math.prod(count for count, _ in runs.steps)
    if not any(runs.steps for runs in span.declared):
        return sum(stop - start for start, stop in _union(span.declared))
    return int(_paint(span, span.declared).sum()) * _unit(span)


def _union(runs: Iterable[_Runs]) -> list[tuple[int, int]]:
    intervals: list[tuple[int, int]] = []
    for start, stop in sorted((r.start, r.stop) for r in runs):
        if intervals and start <= intervals[-1][1]:
            intervals[-1] = (intervals[-1][0], max(stop, intervals[-1][1]))
        else:
            intervals.append((start, stop))
    return intervals


def _inside(runs: _Runs, intervals: list[tuple[int, int]]) -> bool:
    index = bisect.bisect_right(intervals, (runs.start, math.inf)) - 1
    return index >= 0 and intervals[index][0] <= runs.start and runs.stop <= intervals[index][1]


def _unit(span: _Span) -> int:
    """Return the largest step, in bytes, that every run of the span starts and ends on."""
    numbers = [span.stop - span.start]
    for runs in (*span.declared, *span.used):
        numbers += [runs.start - span.start, runs.run, *(stride for _, stride in runs.steps)]
    return math.gcd(*numbers)


def _paint(span: _Span, painted: Iterable[_Runs]) -> Cells:
    unit = _unit(span)
    count = (span.stop - span.start) // unit
    if count > _MAX_CELLS:
        raise PlanError(
            f"{listing(name for name, _ in span.sources)}: read in pieces too fine to prove that "
            "nothing is lost"
        )
    cells = np.zeros(count, np.bool_)
    for runs in painted:
        _cells(cells, span, runs, unit)[...] = True
    return cells


def _cells(cells: Cells, span: _Span, runs: _Runs, unit: int) -> Cells:
    shape = (*(count for count, _ in runs.steps), runs.run // unit)
    strides = (*(stride // unit for _, stride in runs.steps), 1)
    return np.ndarray(shape, np.bool_, cells.data, (runs.start - span.start) // unit, strides)
