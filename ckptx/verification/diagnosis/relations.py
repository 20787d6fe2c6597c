"""How the values of two tensors may be related, element by element.

A relation is judged on every element of a block: `SAME` is equality of bits, the others are what
dtypes, conventions and missing weights do to values without moving them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptx.tensors.dtypes import is_widening, numpy_dtype
from ckptx.verification.diagnosis.mistakes import Hypothesis
from ckptx.verification.difference import same_bits

Array: TypeAlias = NDArray[Any]
Mask: TypeAlias = NDArray[np.bool_]
Check: TypeAlias = Callable[[Array, Array], bool]
"""Whether a relation holds for all elements of a block of one side and the same of the other."""

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
    """A way in which values of one side follow from those of the other.

    ``mistake`` is the stable name of what has happened to the values, empty if nothing has;
    ``detail`` completes "the values ...", ``rounding`` a remark "within ...". ``check`` is given
    the block of B first if ``b_first``.
    """

    mistake: str
    detail: str
    check: Check
    rounding: str = ""
    b_first: bool = False

    def holds(self, a: Array, b: Array) -> bool:
        """Return whether it holds for all elements of a block of A and the same of B."""
        return self.check(b, a) if self.b_first else self.check(a, b)


SAME = Relation("", "", lambda a, b: bool(same_bits(a, b).all()))
"""Every bit is the same."""


def between(first: str, second: str) -> Iterator[Relation]:
    """Yield the relations of equal weights that have these dtypes in A and in B, strictest first.

    Rounding to nearest is what torch does; truncation drops the low half of float32, as some
    converters to bfloat16 do.
    """
    if first == second:
        yield SAME
        if first in ("float32", "float64"):
            for narrow, side in product(("bfloat16", "float16"), "BA"):
                detail = f"of {side} went through {narrow}"
                check = partial(_went_through, numpy_dtype(narrow))
                yield Relation("rounding", detail, check, narrow, b_first=side == "A")
    elif is_widening(second, first):
        yield from _from_wide_to_narrow(first, second, "A", "B")
    elif is_widening(first, second):
        yield from _from_wide_to_narrow(second, first, "B", "A")
    else:
        yield Relation("dtype", f"are the same, held as {first} and as {second}", _equal_values)
        if {first, second} <= _HALF_ULP.keys():
            detail = f"are {first} and {second} of the same numbers"
            check = partial(_both_rounded, first, second)
            yield Relation("rounding", detail, check, f"{first} and {second}")


def _from_wide_to_narrow(wide: str, narrow: str, source: str, target: str) -> Iterator[Relation]:
    """Yield how values that side ``source`` has in a wide dtype become narrow in ``target``."""
    of, b_first = f"of {target} are those of {source}", source == "B"
    same = f"are the same, held as {narrow} and as {wide}"
    yield Relation("dtype", same, _widened, b_first=b_first)
    yield Relation("rounding", f"{of} rounded to {narrow}", _rounded, narrow, b_first)
    if (wide, narrow) == ("float32", "bfloat16"):
        detail = f"{of} cut off to bfloat16, not rounded to nearest"
        yield Relation("rounding", detail, _truncated, narrow, b_first)


def are_weights(*dtypes: str) -> bool:
    """Return whether tensors of these dtypes may be weights; integers hold indices and flags."""
    return all(dtype.startswith(("float", "bfloat", "complex")) for dtype in dtypes)


def of_values(*, norm: bool) -> Iterator[Relation]:
    """Yield what may have happened to values that lie where they belong."""
    if norm:
        yield from shifted_by_one()
    for side, other in ("BA", "AB"):
        detail = f"are zeros in {side} where {other} has values"
        yield Relation("zeros", detail, partial(_only_where, _zero), b_first=side == "B")
    for side in "BA":
        detail = f"are NaN or infinite in {side} only"
        yield Relation("not-a-number", detail, partial(_only_where, _odd), b_first=side == "B")


def shifted_by_one() -> Iterator[Relation]:
    """Yield what zero-centred norms do: one side holds the weight less one."""
    step = "the dtype, as that step rounds"
    for less, more in ("BA", "AB"):
        detail = f"of {less} are those of {more} less one"
        yield Relation("norm-off-by-one", detail, _one_more, step, b_first=more == "B")


def constant(value: float, side: str) -> Relation:
    """Return that a side holds one value throughout, as a weight does that was never trained."""
    return Relation(
        "constant",
        f"are all {value:g} in {side}",
        lambda values, _: bool((values == value).all()),
        b_first=side == "B",
    )


def _alike(first: Array, second: Array) -> bool:
    """Return whether two arrays are equal, bit by bit, or both not a number."""
    same = same_bits(first, second)
    return bool(same.all()) or bool((same | (np.isnan(first) & np.isnan(second))).all())


def _widened(wide: Array, narrow: Array) -> bool:
    return _alike(wide, narrow.astype(wide.dtype))


def _rounded(wide: Array, narrow: Array) -> bool:
    return _alike(_cast(wide, narrow.dtype), narrow)


def _truncated(wide: Array, narrow: Array) -> bool:
    return bool(((wide.view(np.uint32) >> 16) == narrow.view(np.uint16)).all())


def _went_through(dtype: np.dtype[Any], kept: Array, rounded: Array) -> bool:
    return _alike(_cast(kept, dtype).astype(kept.dtype), rounded)


def _equal_values(a: Array, b: Array) -> bool:
    if a.dtype.kind in "iub" and b.dtype.kind in "iub":
        return bool((a == b).all())
    return bool((a.astype(np.float64) == b.astype(np.float64)).all())


def _both_rounded(first: str, second: str, a: Array, b: Array) -> bool:
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    bound = sum(
        _HALF_ULP[dtype] * np.abs(wide) + _SMALLEST[dtype]
        for dtype, wide in ((first, wide_a), (second, wide_b))
    )
    with np.errstate(invalid="ignore"):
        return bool((np.abs(wide_a - wide_b) <= bound).all())


def _one_more(more: Array, less: Array) -> bool:
    wide_more, wide_less = more.astype(np.float64), less.astype(np.float64)
    return _alike((wide_more - 1).astype(less.dtype), less) or _alike(
        (wide_less + 1).astype(more.dtype), more
    )


def _zero(values: Array) -> Mask:
    zero: Mask = values == 0
    return zero


def _odd(values: Array) -> Mask:
    return ~np.isfinite(values)


def _only_where(what: Callable[[Array], Mask], one: Array, other: Array) -> bool:
    """Return whether two arrays differ only where the first is something and the second not."""
    if one.dtype == other.dtype:
        same = same_bits(one, other)
    else:
        same = one.astype(np.float64) == other.astype(np.float64)
    return bool((same | (what(one) & ~what(other))).all())


def _cast(values: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return values.astype(dtype)
