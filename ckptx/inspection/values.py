"""Show the values of one tensor of a checkpoint, or of a part of it; only these are read."""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptx.errors import PlanError, listing
from ckptx.registry.open import Checkpoint, opened
from ckptx.storage.gather import numpy_dtype, read
from ckptx.storage.open_files import Files
from ckptx.tensors.lazy import LazyTensor, Shape
from ckptx.text.wrapping import wrapped

Index: TypeAlias = tuple[int | slice, ...]
"""A number or a slice with all of start, stop and step, one for every axis."""

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
        lines = wrapped("tensor", self.name, width, _LABEL)
        lines += wrapped("dtype", self.dtype, width, _LABEL)
        lines += wrapped("shape", str(list(self.shape)), width, _LABEL)
        if self.part:
            lines += wrapped("slice", f"[{self.part}], {list(self.found)}", width, _LABEL)
        text = np.array2string(
            self.values,
            max_line_width=max(width, 20),
            threshold=sys.maxsize if self.whole else 0,
            edgeitems=_EDGE,
            separator=", ",
        )
        if not self.whole:
            text += "\n--full shows all values, --slice a part"
        return "\n".join([*lines, text])


def look_up(
    source: Checkpoint | Path,
    name: str,
    part: str | None = None,
    full: bool = False,
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
        found = tuple(len(range(*_bounds(one))) for one in index if isinstance(one, slice))
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
    """Return the one name that is meant.

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
    near = difflib.get_close_matches(name, known, 3, 0.5) or list(known)[:3]
    raise PlanError(
        f"no tensor is called {name!r}; there are {len(known):,}, as {listing(near, 3)}; "
        "'ckptx inspect --tree' lists them"
    )


def parse_slice(text: str, shape: Shape) -> Index:
    """Return what a slice in numpy's spelling means for a shape, one entry for every axis.

    Examples:
        >>> parse_slice("..., -1", (4, 6))
        (slice(0, 4, 1), 5)
        >>> parse_slice("1:3", (4, 6))
        (slice(1, 3, 1), slice(0, 6, 1))

    Raises:
        PlanError: it is no slice, has too many axes, or a number is out of range.
    """
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    if words and not words[-1]:
        words.pop()  # as in x[0,]
    if words.count("...") > 1:
        raise PlanError(f"--slice {text!r}: only one '...' is possible")
    if "..." in words:
        place = words.index("...")
        words[place : place + 1] = [":"] * (len(shape) - len(words) + 1)
    if len(words) > len(shape):
        raise PlanError(f"--slice {text!r}: has {len(words)} axes, the tensor is {list(shape)}")
    words += [":"] * (len(shape) - len(words))
    return tuple(
        _parse_axis(word, size, axis, text)
        for axis, (word, size) in enumerate(zip(words, shape, strict=True))
    )


def _parse_axis(word: str, size: int, axis: int, text: str) -> int | slice:
    if re.fullmatch(r"[+-]?\d{1,18}", word):
        number = int(word)
        if not -size <= number < size:
            raise PlanError(
                f"--slice {text!r}: {number} is out of range for axis {axis} of {size} elements"
            )
        return number % size
    match = re.fullmatch(
        r"([+-]?\d{1,18})?\s*:\s*([+-]?\d{1,18})?\s*(?::\s*([+-]?\d{1,18})?)?", word
    )
    if match is None:
        raise PlanError(f"--slice {text!r}: {word!r} is no number and no start:stop:step")
    start, stop, step = (int(part) if part else None for part in match.groups())
    if step is not None and step < 1:
        raise PlanError(f"--slice {text!r}: steps must be 1 or more")
    return slice(*slice(start, stop, step).indices(size))


def _bounds(one: slice) -> tuple[int, int, int]:
    return one.start, one.stop, one.step


def _outer(index: Index) -> tuple[int | tuple[int, ...], ...]:
    """Return the numbers along every axis that are shown of a large part.

    One more than the edges: numpy leaves it out and writes dots.
    """
    found: list[int | tuple[int, ...]] = []
    for one in index:
        if isinstance(one, int):
            found.append(one)
            continue
        numbers = range(*_bounds(one))
        short = len(numbers) <= 2 * _EDGE + 1
        ends = numbers if short else (*numbers[: _EDGE + 1], *numbers[-_EDGE:])
        found.append(tuple(ends))
    return tuple(found)


def read_index(
    tensor: LazyTensor, index: Sequence[int | slice | tuple[int, ...]], files: Files
) -> NDArray[Any]:
    """Return the elements at the crossings of numbers along the axes; few others are read."""
    numbers = [_numbers(one) for one in index]
    runs = [list(_runs(own, axis == len(numbers) - 1)) for axis, own in enumerate(numbers)]
    values = np.empty(tuple(map(len, numbers)), numpy_dtype(tensor.dtype))
    for chosen in product(*runs):
        box = tuple((run.start, run.stop) for run in chosen)
        steps = tuple(slice(None, None, run.step) for run in chosen)
        values[tuple(run.place for run in chosen)] = read(tensor, files, box)[steps]
    return values[tuple(0 if isinstance(one, int) else slice(None) for one in index)]


def _numbers(one: int | slice | tuple[int, ...]) -> Sequence[int]:
    match one:
        case int():
            return (one,)
        case slice():
            return range(*_bounds(one))
    return one


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
