"""Mistakes that change values where they lie; `relations` judges them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Description(NamedTuple):
    """A mistake in a few words, and what to do."""

    title: str
    advice: str


VALUES: Mapping[str, Description] = {
    "dtype": Description(
        "the same values in another dtype",
        "Nothing is wrong with the weights; --ignore-dtype accepts them.",
    ),
    "rounding": Description(
        "values are rounded to another dtype",
        "Expected if one side was saved in a narrower dtype. If it should be exact, convert from "
        "the wider one again; --rtol 0.01 accepts what bfloat16 rounds.",
    ),
    "norm-off-by-one": Description(
        "norm weights are off by one",
        "One side holds zero-centred weights, which the model adds 1 to (Gemma, Megatron's "
        "--apply-layernorm-1p), the other holds plain ones. Convert again with the architecture "
        "or the flag that the model really has.",
    ),
    "zeros": Description(
        "weights that were never filled: zeros",
        "A part was not loaded, as of a rank or an expert whose file was not read. Look which "
        "tensors these are, and write that side again.",
    ),
    "constant": Description(
        "weights that were never filled: one value throughout",
        "The side with one value has what a model is initialised with, or less. Look whether the "
        "names of these tensors were found when it was loaded, and write it again.",
    ),
    "not-a-number": Description(
        "NaN or infinite values",
        "The training diverged, memory was saved uninitialised, or a cast overflowed (float16 "
        "ends at 65504). Take an earlier checkpoint, or cast to bfloat16 instead.",
    ),
}
"""By the name that a relation has."""
