"""The dtypes of tensors: sizes, usual spellings, what widens into what."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from ckptx.errors import PlanError

if TYPE_CHECKING:  # planning computes nothing, and needs no numpy
    import numpy as np

DTYPES = ("float32", "bfloat16", "float16")
"""The dtypes that a model can be cast to."""

SPELLINGS = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
    **{name: name for name in ("bfloat16", "float16", "float32")},
}
"""Those dtypes by every name that options take."""

FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
FLOATS = {"float64", *DTYPES, *FLOAT8}


def dtype_name(name: str) -> str:
    """Return a dtype by its usual spellings (``bf16``, ``torch.bfloat16``).

    Raises:
        PlanError: it is none that a model can be cast to.
    """
    if (known := SPELLINGS.get(name.removeprefix("torch."))) is None:
        raise PlanError(f"cannot convert to dtype {name!r}; known: {', '.join(DTYPES)}")
    return known


ITEMSIZE = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
    "complex64": 8,
}
"""Bytes per element of every dtype, by its torch name."""


_WIDENING = {
    "float16": {"float32", "float64"},
    "bfloat16": {"float32", "float64"},
    "float32": {"float64"},
    "float64": set(),
    "float8_e4m3fn": {"float16", "bfloat16", "float32", "float64"},
    "float8_e5m2": {"float16", "bfloat16", "float32", "float64"},
}


_CAST_TARGETS = {"float64", "float32", "float16", "bfloat16"}


@cache
def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """Return the numpy dtype that computes with a ckptx dtype."""
    import ml_dtypes
    import numpy as np

    return np.dtype(getattr(ml_dtypes, dtype, None) or dtype)


def is_widening(source: str, target: str) -> bool:
    """Return whether every value of ``source`` is exact in ``target``.

    Examples:
        >>> is_widening("bfloat16", "float32"), is_widening("float32", "bfloat16")
        (True, False)
    """
    return source == target or target in _WIDENING.get(source, ())
