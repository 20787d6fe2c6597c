"""Show the values of one tensor of a checkpoint, or of a part of it; only these are read."""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptx.errors import PlanError, listing
from ckptx.registry.open import Checkpoint, opened
from ckptx.storage.gather import read
from ckptx.storage.open_files import Files
from ckptx.tensors.dtypes import numpy_dtype
from ckptx.tensors.lazy import LazyTensor, Shape
from ckptx.text.wrapping import labelled

Index: TypeAlias = Sequence[int | Sequence[int]]
"""A number, or rising numbers, for every axis."""

_EDGE = 3  # elements shown at either end of a long axis
_SHORT = 200  # elements that are shown without asking
_MOST = 1 << 24  # elements that are ever shown at once
_STEP = 64  # elements between two wanted ones that are rather read than skipped
_LABEL = 12  # columns


@dataclass(frozen=True, slots=True)
class Values:
    """The values of a tensor's part: all of them, or the outer ones of a large part."""

    name: str
    dtype: str
    shape: Shape
    part: str
    """The slice as the user wrote it."""
    found: Shape
    """The shape of the part."""
    values: NDArray[Any]
    """All of the part, or the outer ones; bfloat16 and float8 as float32, which is exact."""
    whole: bool

    def to_json(self) -> dict[str, Any]:
        """Return the values as nested lists; None where they are too many and not asked for."""
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "slice": self.part,
            "slice_shape": list(self.found),
            "values": _plain(self.values.tolist()) if self.whole else None,
        }

    def render(self, width: int) -> str:
        """Return the values as numpy shows them."""
        pairs = [("tensor", self.name), ("dtype", self.dtype), ("shape", str(list(self.shape)))]
        if self.part:
            pairs.append(("slice", f"[{self.part}], {list(self.found)}"))
        text = np.array2string(
            self.values,
            max_line_width=max(width, 20),
            threshold=sys.maxsize if self.whole else 0,
            edgeitems=_EDGE,
            separator=", ",
        )
        if not self.whole:
            text += "\n--full shows all values, --slice a part"
        return "\n".join([*labelled(pairs, width, _LABEL), text])


def look_up(
    source: Checkpoint | Path, name: str, part: str | None = None, full: bool = False
) -> Values:
    """Return the values of the one tensor that ``name`` means: a name, or a glob of one.

    ``source`` is an open checkpoint, or the path of one.

    Raises:
        CkptxError: the checkpoint cannot be read, no tensor or several are so named, or the slice
            does not fit.
    """
    with opened(source) as checkpoint:
        known = dict(checkpoint.tensors("stored")[1])
        known |= checkpoint.tensors()[1]  # whole tensors win where a name is both
        name = resolve(name, known)
        tensor = known[name]
        index = parse_slice(part or "", tensor.shape)
        found = tuple(len(numbers) for numbers in index if isinstance(numbers, range))
        count = math.prod(found)
        whole = full or count <= _SHORT
        if whole and count > _MOST:
            raise PlanError(
                f"{name}: {count:,} values are too many to show at once; take a part with --slice"
            )
        with closing(checkpoint.files()) as files:
            values = read_index(tensor, index if whole else _outer(index), files)
    return Values(name, tensor.dtype, tensor.shape, part or "", found, _exact(values), whole)


def resolve(name: str, known: Mapping[str, LazyTensor]) -> str:
    """Return the full name of a tensor.

    What one rank calls a tensor is known with the rank before it (``"mp_rank_01:0:..."``); the name
    alone will do where one rank has it.

    Raises:
        PlanError: none is, or several are.
    """
    if name in known:
        return name
    matches = [one for one in known if one.endswith((f":{name}", f": {name}"))]
    matches = matches or [one for one in known if fnmatch.fnmatchcase(one, name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise PlanError(
            f"{name!r} means {len(matches):,} tensors: {listing(matches)}; name one of them"
        )
    raise PlanError(f"{unknown(name, known)}; 'ckptx inspect --tree' lists them")


def unknown(name: str, known: Collection[str]) -> str:
    """Return that no tensor has a name, and which ones are near it."""
    near = difflib.get_close_matches(name, known, 3, 0.5) or list(known)[:3]
    return f"no tensor is called {name!r}; there are {len(known):,}, as {listing(near, 3)}"


def parse_slice(text: str, shape: Shape) -> list[int | range]:
    """Return what a slice in numpy's spelling means for a shape, one entry for every axis.

    Examples:
        >>> parse_slice("..., -1", (4, 6))
        [range(0, 4), 5]
        >>> parse_slice("1:3", (4, 6))
        [range(1, 3), range(0, 6)]

    Raises:
        PlanError: it is no slice, has too many axes, or a number is out of range.
    """
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    if words and not words[-1]:
        words.pop()  # as in x[0,]
    try:
        return numbers_along([_parse_axis(word, text) for word in words], shape)
    except IndexError as error:
        raise PlanError(f"--slice {text!r}: {error}") from error


def _parse_axis(word: str, text: str) -> int | slice | EllipsisType:
    if word == "...":
        return ...
    if re.fullmatch(r"[+-]?\d{1,18}", word):
        return int(word)
    match = re.fullmatch(
        r"([+-]?\d{1,18})?\s*:\s*([+-]?\d{1,18})?\s*(?::\s*([+-]?\d{1,18})?)?", word
    )
    if match is None:
        raise PlanError(f"--slice {text!r}: {word!r} is no number and no start:stop:step")
    start, stop, step = (int(part) if part else None for part in match.groups())
    if step is not None and step < 1:
        raise PlanError(f"--slice {text!r}: steps must be 1 or more")
    return slice(start, stop, step)


def numbers_along(index: Sequence[Any], shape: Shape) -> list[int | range]:
    """Return what an index of numpy means for a shape: a number, or a range, for every axis.

    Raises:
        IndexError: it has too many axes, or a number is out of range.
        TypeError: an entry is neither a whole number, a slice nor ``...``.
    """
    dots = [place for place, one in enumerate(index) if one is Ellipsis]
    if len(dots) > 1:
        raise IndexError("only one '...' is possible")
    given = len(index) - len(dots)
    if given > len(shape):
        raise IndexError(f"has {given} axes, the tensor is {list(shape)}")
    place = dots[0] if dots else given
    whole = [slice(None)] * (len(shape) - given)
    found: list[int | range] = []
    full = (*index[:place], *whole, *index[place + 1 :])
    for axis, (one, size) in enumerate(zip(full, shape, strict=True)):
        if not isinstance(one, slice):
            if not hasattr(one, "__index__") or isinstance(one, bool):
                raise TypeError(
                    f"a tensor is indexed by whole numbers, slices and '...', not {one!r}"
                )
            if not -size <= one.__index__() < size:
                raise IndexError(f"{one} is out of range for axis {axis} of {size} elements")
        found.append(range(size)[one])
    return found


def _outer(index: Index) -> Index:
    """Return the numbers along every axis that are shown of a large part.

    One more than the edges: numpy leaves it out and writes dots.
    """
    return [
        one
        if isinstance(one, int) or len(one) <= 2 * _EDGE + 1
        else (*one[: _EDGE + 1], *one[-_EDGE:])
        for one in index
    ]


def read_index(tensor: LazyTensor, index: Index, files: Files) -> NDArray[Any]:
    """Return the elements at the crossings of numbers along the axes; few others are read."""
    numbers = [(one,) if isinstance(one, int) else one for one in index]
    runs = [list(_runs(own, axis == len(numbers) - 1)) for axis, own in enumerate(numbers)]
    values = np.empty(tuple(map(len, numbers)), numpy_dtype(tensor.dtype))
    for chosen in product(*runs):
        box = tuple((run.start, run.stop) for run in chosen)
        steps = tuple(slice(None, None, run.step) for run in chosen)
        values[tuple(run.place for run in chosen)] = read(tensor, files, box)[steps]
    return values[tuple(0 if isinstance(one, int) else slice(None) for one in index)]


class _Run(NamedTuple):
    """Elements ``start`` to ``stop`` in steps along an axis, and their place among the wanted."""

    start: int
    stop: int
    step: int
    place: slice


def _runs(numbers: Sequence[int], innermost: bool) -> Iterator[_Run]:
    """Yield rising numbers as runs; only short steps along the innermost axis are read over."""
    first = 0
    while first < len(numbers):
        last = first
        step = numbers[first + 1] - numbers[first] if first + 1 < len(numbers) else 1
        if step == 1 or (innermost and step <= _STEP):
            while (
                last + 1 < len(numbers)
                and numbers[last + 1] - numbers[last] == step
                and numbers[last + 1] - numbers[first] < _MOST
            ):
                last += 1
        yield _Run(numbers[first], numbers[last] + 1, step, slice(first, last + 1))
        first = last + 1


def _exact(values: NDArray[Any]) -> NDArray[Any]:
    """Return the values in a dtype that Python knows."""
    if values.dtype.isbuiltin == 1:
        return values
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return values.astype(np.float32)


def _plain(values: Any) -> Any:
    """Return nested lists that JSON can hold: what is no number as a string, as JavaScript's."""
    if isinstance(values, list):
        return [_plain(value) for value in values]
    if isinstance(values, complex):
        return [_plain(values.real), _plain(values.imag)]
    if isinstance(values, float) and not math.isfinite(values):
        return "NaN" if math.isnan(values) else "Infinity" if values > 0 else "-Infinity"
    return values
