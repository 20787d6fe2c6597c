"""How the values of two tensors may hang together, element by element.

A relation is judged on every element of a block: `Same` is equality of bits, the others are what
dtypes, conventions and missing weights do to values without moving them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptx.storage.gather import numpy_dtype
from ckptx.tensors.dtypes import is_widening
from ckptx.verification.diagnosis.mistakes import Hypothesis
from ckptx.verification.difference import same_bits

Array: TypeAlias = NDArray[Any]
Holds: TypeAlias = Callable[[Array, Array], bool]
"""Whether a relation holds for all elements of a block of A and the same of B."""

_HALF_ULP = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
"""The relative error of rounding to nearest."""
_SMALLEST = {"bfloat16": 2.0**-134, "float16": 2.0**-25, "float32": 2.0**-150}
"""The absolute one below the normal range: half of the least subnormal number."""


VALUES = (
    Hypothesis(
        "dtype",
        "the same values in another dtype",
        "Nothing is wrong with the weights; --ignore-dtype accepts them.",
    ),
    Hypothesis(
        "rounding",
        "values are rounded to another dtype",
        "Expected if one side was saved in a narrower dtype. If it should be exact, convert from "
        "the wider one again; --rtol 0.01 accepts what bfloat16 rounds.",
    ),
    Hypothesis(
        "norm-off-by-one",
        "norm weights are off by one",
        "One side holds zero-centred weights, which the model adds 1 to (Gemma, Megatron's "
        "--apply-layernorm-1p), the other holds plain ones. Convert again with the architecture "
        "or the flag that the model really has.",
    ),
    Hypothesis(
        "zeros",
        "weights that were never filled: zeros",
        "A part was not loaded, as of a rank or an expert whose file was not read. Look which "
        "tensors these are, and write that side again.",
    ),
    Hypothesis(
        "constant",
        "weights that were never filled: one value throughout",
        "The side with one value has what a model is initialised with, or less. Look whether the "
        "names of these tensors were found when it was loaded, and write it again.",
    ),
    Hypothesis(
        "not-a-number",
        "NaN or infinite values",
        "The training diverged, memory was saved uninitialised, or a cast overflowed (float16 "
        "ends at 65504). Take an earlier checkpoint, or cast to bfloat16 instead.",
    ),
)
"""Mistakes that change values where they lie, by the names that relations have."""


@dataclass(frozen=True, slots=True)
class Relation:
    """A way in which values of B follow from those of A.

    ``mistake`` is the stable name of what has happened to the values, empty if nothing has;
    ``detail`` completes "the values ...", ``rounding`` a remark "within ...".
    """

    mistake: str
    detail: str
    holds: Holds
    rounding: str = ""


def _alike(first: Array, second: Array) -> bool:
    """Return whether two arrays are equal, bit by bit, or both not a number."""
    same = same_bits(first, second)
    return bool(same.all()) or bool((same | (np.isnan(first) & np.isnan(second))).all())


SAME = Relation("", "", lambda a, b: bool(same_bits(a, b).all()))
"""Every bit is the same."""


def between(first: str, second: str) -> Iterator[Relation]:
    """Yield the relations of equal weights that have these dtypes in A and in B, strictest first.

    Rounding to nearest is what torch does; truncation drops the low half of float32, as some
    converters to bfloat16 do.
    """
    if first == second:
        yield SAME
        for narrow in ("bfloat16", "float16"):
            if first in ("float32", "float64"):
                yield _through(narrow, b=True)
                yield _through(narrow, b=False)
        return
    if is_widening(first, second) or is_widening(second, first):
        wide, narrow = (second, first) if is_widening(first, second) else (first, second)
        yield _widened(narrow, wide, a_is_wide=wide == first)
        yield _rounded(narrow, a_is_wide=wide == first)
        if (wide, narrow) == ("float32", "bfloat16"):
            yield _truncated(a_is_wide=wide == first)
        return
    yield Relation("dtype", f"are the same, held as {first} and as {second}", _equal_values)
    if {first, second} <= _HALF_ULP.keys():
        yield _both_rounded(first, second)


def are_weights(*dtypes: str) -> bool:
    """Return whether tensors of these dtypes may be weights; integers hold indices and flags."""
    return all(dtype.startswith(("float", "bfloat", "complex")) for dtype in dtypes)


def of_values(*, norm: bool) -> Iterator[Relation]:
    """Yield what may have happened to values that lie where they belong."""
    if norm:
        yield from shifted_by_one()
    yield Relation("zeros", "are zeros in B where A has values", _only_where(_zero, b=True))
    yield Relation("zeros", "are zeros in A where B has values", _only_where(_zero, b=False))
    yield Relation("not-a-number", "are NaN or infinite in B only", _only_where(_odd, b=True))
    yield Relation("not-a-number", "are NaN or infinite in A only", _only_where(_odd, b=False))


def shifted_by_one() -> Iterator[Relation]:
    """Yield what zero-centred norms do: one side holds the weight less one."""
    step = "the dtype, as that step rounds"
    for less, more in ("BA", "AB"):
        detail = f"of {less} are those of {more} less one"
        yield Relation("norm-off-by-one", detail, _minus_one(b_is_less=less == "B"), step)


def constant(value: float, *, b: bool) -> Relation:
    """Return that one side holds one value throughout, as a weight does that was never trained."""

    def holds(first: Array, second: Array) -> bool:
        return bool(((second if b else first) == value).all())

    return Relation("constant", f"are all {value:g} in {'AB'[b]}", holds)


def _widened(narrow: str, wide: str, *, a_is_wide: bool) -> Relation:
    def holds(a: Array, b: Array) -> bool:
        big, small = (a, b) if a_is_wide else (b, a)
        return _alike(big, small.astype(big.dtype))

    return Relation("dtype", f"are the same, held as {narrow} and as {wide}", holds)


def _rounded(narrow: str, *, a_is_wide: bool) -> Relation:
    def holds(a: Array, b: Array) -> bool:
        big, small = (a, b) if a_is_wide else (b, a)
        return _alike(_cast(big, narrow), small)

    side, other = ("B", "A") if a_is_wide else ("A", "B")
    return Relation(
        "rounding", f"of {side} are those of {other} rounded to {narrow}", holds, narrow
    )


def _equal_values(a: Array, b: Array) -> bool:
    if a.dtype.kind in "iub" and b.dtype.kind in "iub":
        return bool((a == b).all())
    return bool((a.astype(np.float64) == b.astype(np.float64)).all())


def _truncated(*, a_is_wide: bool) -> Relation:
    def holds(a: Array, b: Array) -> bool:
        big, small = (a, b) if a_is_wide else (b, a)
        return bool(((big.view(np.uint32) >> 16) == small.view(np.uint16)).all())

    side, other = ("B", "A") if a_is_wide else ("A", "B")
    detail = f"of {side} are those of {other} cut off to bfloat16, not rounded to nearest"
    return Relation("rounding", detail, holds, "bfloat16")


def _through(narrow: str, *, b: bool) -> Relation:
    def holds(first: Array, second: Array) -> bool:
        kept, rounded = (first, second) if b else (second, first)
        return _alike(_cast(kept, narrow).astype(kept.dtype), rounded)

    return Relation("rounding", f"of {'AB'[b]} went through {narrow}", holds, narrow)


def _both_rounded(first: str, second: str) -> Relation:
    def holds(a: Array, b: Array) -> bool:
        wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
        bound = sum(
            _HALF_ULP[dtype] * np.abs(wide) + _SMALLEST[dtype]
            for dtype, wide in ((first, wide_a), (second, wide_b))
        )
        with np.errstate(invalid="ignore"):
            return bool((np.abs(wide_a - wide_b) <= bound).all())

    return Relation(
        "rounding",
        f"are {first} and {second} of the same numbers",
        holds,
        f"{first} and {second}",
    )


def _minus_one(*, b_is_less: bool) -> Holds:
    def holds(a: Array, b: Array) -> bool:
        more, less = (a, b) if b_is_less else (b, a)
        wide_more, wide_less = more.astype(np.float64), less.astype(np.float64)
        return _alike((wide_more - 1).astype(less.dtype), less) or _alike(
            (wide_less + 1).astype(more.dtype), more
        )

    return holds


def _zero(values: Array) -> NDArray[np.bool_]:
    zero: NDArray[np.bool_] = values == 0
    return zero


def _odd(values: Array) -> NDArray[np.bool_]:
    finite: NDArray[np.bool_] = np.isfinite(values)
    return ~finite


def _only_where(what: Callable[[Array], NDArray[np.bool_]], *, b: bool) -> Holds:
    """Return whether two arrays differ only where one of them is something, and the other not."""

    def holds(first: Array, second: Array) -> bool:
        one, other = (second, first) if b else (first, second)
        if first.dtype == second.dtype:
            same = same_bits(first, second)
        else:
            same = first.astype(np.float64) == second.astype(np.float64)
        return bool((same | (what(one) & ~what(other))).all())

    return holds


def _cast(values: Array, dtype: str) -> Array:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        cast: Array = values.astype(numpy_dtype(dtype))
    return cast
