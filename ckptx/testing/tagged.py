"""Weights that tell where they belong: every element encodes its tensor and its coordinate.

Equal or symmetric weights hide much: a transposed square matrix, gate and up swapped, a rank's
slice off by one, layers in the order ``0, 1, 10, 2``. Tags are bit patterns and not values, so that
no dtype rounds them, and bytes are what is compared:

    element i = low bits of (i * odd(name) + offset(name) + block(i) * odd'(name))

No two of any 2^bits neighbours are equal, and no two tensors have the same sequence. As floats the
patterns include infinities and NaNs, which a placement of bytes must not notice.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptx.tensors.dtypes import ITEMSIZE, numpy_dtype

_SHOWN = 3


def tagged(name: str, dtype: str, shape: Sequence[int]) -> NDArray[Any]:
    """Return the tags of a tensor as an array of its dtype (ml_dtypes for bfloat16 and float8).

    Examples:
        >>> tagged("a", "int16", (2, 2)).tolist() == tagged("a", "int16", (2, 2)).tolist()
        True
        >>> tagged("a", "int16", (2, 2)).tolist() == tagged("b", "int16", (2, 2)).tolist()
        False
    """
    size = ITEMSIZE[dtype]
    seed = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=24).digest(), np.uint64)
    index = np.arange(math.prod(shape), dtype=np.uint64)
    tags = index * (seed[0] | np.uint64(1)) + seed[1]
    if size < 8:
        tags += (index >> np.uint64(8 * size)) * (seed[2] | np.uint64(1))
    if dtype == "bool":  # other bytes than 0 and 1 are no truth values
        tags = (tags * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(63)
    patterns: NDArray[Any] = tags.astype(f"u{size}")
    return patterns.view(numpy_dtype(dtype)).reshape(tuple(shape))


def bits(array: NDArray[Any]) -> NDArray[Any]:
    """Return the elements of an array as unsigned integers."""
    return np.ascontiguousarray(array).reshape(-1).view(f"u{array.itemsize}").reshape(array.shape)


def assert_same(
    found: NDArray[Any],
    expected: NDArray[Any],
    name: str,
    among: Mapping[str, NDArray[Any]] | None = None,
) -> None:
    """Fail unless two arrays agree in dtype, shape and every bit.

    The message says where the first wrong element belongs, as far as it is one of ``among``.
    """
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        raise AssertionError(
            f"{name}: found {found.dtype} {list(found.shape)}, "
            f"expected {expected.dtype} {list(expected.shape)}"
        )
    wrong = np.argwhere(bits(found) != bits(expected))
    if len(wrong):
        place = tuple(map(int, wrong[0]))
        origins = _places(found[place], {name: expected, **(among or {})})
        raise AssertionError(
            f"{name}: {len(wrong)} of {found.size} elements differ, the first at {list(place)}; "
            f"what is there belongs to {' or '.join(origins[:_SHOWN]) or 'no tensor of the model'}"
        )


def _places(element: Any, among: Mapping[str, NDArray[Any]]) -> list[str]:
    """Return where an element occurs."""
    wanted = bits(np.asarray(element))
    return [
        f"{name}{list(map(int, place))}"
        for name, array in among.items()
        if array.dtype == element.dtype
        for place in np.argwhere(bits(array) == wanted)
    ]
