"""Low-rank updates of a matrix: what LoRA and DoRA adapters hold, as computed tensors.

    LoRA   W + (B @ A) * s                          W [out, in], B [out, r], A [r, in], s [1]
    DoRA   m / |V| * V, with V = W + (B @ A) * s    m [out], |V| the 2-norm of every row

Everything is float32 and rounded once, to the dtype of the result.

A sum has to have an order, and an element must not depend on the box that is asked for, on the
number of threads or on the processor. So the order is part of the format here: one fused
multiply-add after another, from the first rank to the last; beyond `BLOCK` ranks the sums of blocks
are added. Matrix kernels promise no order. Most take this one with an inner dimension this short,
so a result is often torch's bit for bit, and always within what rounding in another order allows.

NumPy's own kernel is asked for squares of a fixed size, after a trial has shown that it takes this
order on this machine; where it does not, the order is spelled out.

Source: huggingface/peft src/peft/tuners/lora/layer.py, Linear.get_delta_weight and merge,
ParamWrapper.get_delta_weight; variants.py, DoraLinearVariant.merge_unsafe; dora.py,
DoraLinearLayer.get_weight_norm @ v0.21.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from ckptx.errors import SchemaError
from ckptx.tensors.dtypes import DTYPES, numpy_dtype
from ckptx.tensors.lazy import Box, Computed, Filled, LazyTensor

if TYPE_CHECKING:  # planning computes nothing, and needs no numpy
    import numpy as np
    from numpy.typing import NDArray

BLOCK = 256
"""Ranks that one chain of multiply-adds runs over; sums of further ones are added to it."""
_TILE = 64  # rows and columns of the squares that the matrix kernel is asked for


class LowRank:
    """The operation ``W + (B @ A) * s``."""

    def __init__(self, *, rounded: bool = False) -> None:
        self.rounded = rounded
        """Whether the update is rounded to the dtype of the result before it is added."""

    def label(self, tensor: Computed) -> str:
        """Return the step in the words of a cast."""
        return f"{tensor.inputs[0].dtype} + LoRA {tensor.inputs[1].dtype} -> {tensor.dtype}"

    def needs(self, tensor: Computed, box: Box) -> Sequence[Box]:
        """Return the same box of W, the rows of B, the columns of A, and the scale."""
        rows, columns = box
        ranks = (0, tensor.inputs[2].shape[0])
        return [box, (rows, ranks), (ranks, columns), ((0, 1),)]

    def evaluate(
        self, tensor: Computed, box: Box, inputs: Sequence[NDArray[Any]]
    ) -> NDArray[np.float32]:
        """Return the sum."""
        import numpy as np

        weight, left, right, scale = inputs
        update = product(left, right)
        update *= scale
        if self.rounded and tensor.dtype != "float32":
            update = update.astype(numpy_dtype(tensor.dtype)).astype(np.float32)
        update += weight.astype(np.float32)
        return update


class Dora:
    """The operation ``m / |V| * V``. A box needs whole rows, whose norms it takes.

    A norm is the root of a sum in float64. torch sums in float32, in an order that depends on the
    processor, so a result may differ from torch's by some units in the last place of float32.
    """

    def label(self, tensor: Computed) -> str:
        """Return the step in the words of a cast."""
        return f"{tensor.inputs[0].dtype} + DoRA {tensor.inputs[1].dtype} -> {tensor.dtype}"

    def needs(self, tensor: Computed, box: Box) -> Sequence[Box]:
        """Return the rows of W, B and m, all of A, and the scale."""
        rows, _ = box
        ranks, columns = ((0, size) for size in tensor.inputs[2].shape)
        return [(rows, columns), (rows, ranks), (ranks, columns), ((0, 1),), (rows,)]

    def evaluate(
        self, tensor: Computed, box: Box, inputs: Sequence[NDArray[Any]]
    ) -> NDArray[np.float32]:
        """Return the scaled rows."""
        import numpy as np

        weight, left, right, scale, magnitude = inputs
        rows = product(left, right)
        rows *= scale
        rows += weight.astype(np.float32)
        norms = np.sqrt(np.add.reduce(np.square(rows, dtype=np.float64), axis=1))
        factors = magnitude.astype(np.float32) / norms.astype(np.float32)
        start, stop = box[1]
        scaled: NDArray[np.float32] = rows[:, start:stop] * factors[:, None]
        return scaled


def updated(
    weight: LazyTensor,
    left: LazyTensor,
    right: LazyTensor,
    scale: float,
    dtype: str,
    *,
    magnitude: LazyTensor | None = None,
    rounded: bool = False,
) -> Computed:
    """Return ``weight + (left @ right) * scale`` in ``dtype``, scaled to ``magnitude`` if given.

    Raises:
        SchemaError: the shapes do not belong together, or a dtype is none to compute with.
    """
    inputs = [weight, left, right]
    inputs += [] if magnitude is None else [magnitude]
    other = next((one.dtype for one in inputs if one.dtype not in DTYPES), None)
    if other is not None:
        raise SchemaError(f"expected {', '.join(DTYPES)}, found {other}")
    check_ranks(left, right)
    wanted = (left.shape[0], right.shape[1])
    if weight.shape != wanted:
        raise SchemaError(
            f"the update is {list(wanted)}, the weight is {list(weight.shape)}: the adapter is of "
            "another base model"
        )
    factor = Filled("float32", (1,), scale)
    if magnitude is None:
        op = "lora, update rounded" if rounded else "lora"
        return Computed(dtype, weight.shape, op, (weight, left, right, factor))
    if magnitude.shape != weight.shape[:1]:
        raise SchemaError(
            f"the magnitude is {list(magnitude.shape)}, the weight has {weight.shape[0]} rows"
        )
    return Computed(dtype, weight.shape, "dora", (weight, left, right, factor, magnitude))


def check_ranks(left: LazyTensor, right: LazyTensor) -> None:
    """Raise a `SchemaError` unless two matrices can be multiplied."""
    if left.shape[1:] != right.shape[:1]:
        raise SchemaError(
            f"B {list(left.shape)} has rank {left.shape[-1]}, A {list(right.shape)} has rank "
            f"{right.shape[0]}: they are not of one adapter"
        )


def product(left: NDArray[Any], right: NDArray[Any]) -> NDArray[np.float32]:
    """Return ``left @ right``, every element a chain of multiply-adds; see the module."""
    import numpy as np

    left, right = left.astype(np.float32), right.astype(np.float32)
    ranks = right.shape[0]
    total: NDArray[np.float32] | None = None
    for start in range(0, ranks, BLOCK):
        parts = left[:, start : start + BLOCK], right[start : start + BLOCK]
        chain = _in_squares if _kernel_is_chain(parts[1].shape[0]) else _spelled_out
        total = chain(*parts) if total is None else total + chain(*parts)
    if total is None:
        return np.zeros((left.shape[0], right.shape[1]), np.float32)
    total[np.isnan(total)] = np.nan  # processors make NaNs of different bits
    return total


@cache
def _kernel_is_chain(ranks: int) -> bool:
    """Return whether the matrix kernel takes the order of the chain on this machine, to the bit.

    It is chosen by the sizes of its operands, never by their values, and they are all alike. The
    trial has sums of terms of one size, of sizes far apart down to the smallest, and of zeros.
    """
    import numpy as np

    random = np.random.default_rng(ranks)
    left = random.standard_normal((_TILE, ranks)).astype(np.float32)
    right = random.standard_normal((ranks, 2 * _TILE)).astype(np.float32)
    left[_TILE // 2 :] *= np.exp2(random.integers(-70, 20, (_TILE // 2, ranks)))
    right[:, _TILE:] *= np.exp2(random.integers(-70, 20, (ranks, _TILE)))
    left[-1], right[:, -1] = -0.0, -0.0
    fast, chain = _in_squares(left, right), _spelled_out(left, right)
    return np.array_equal(fast.view(np.uint32), chain.view(np.uint32))


def _in_squares(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the product, made in squares of one size: the kernel is the same for all of them."""
    import numpy as np

    (rows, ranks), columns = left.shape, right.shape[1]
    down, across = -(-rows // _TILE), -(-columns // _TILE)
    tall = np.zeros((down * _TILE, ranks), np.float32)
    tall[:rows] = left
    wide = np.zeros((across, ranks, _TILE), np.float32)
    for number in range(across):
        part = right[:, number * _TILE : (number + 1) * _TILE]
        wide[number, :, : part.shape[1]] = part
    found = np.empty((down * _TILE, across * _TILE), np.float32)
    squares = found.reshape(down, _TILE, across, _TILE).transpose(0, 2, 1, 3)
    for number, strip in enumerate(tall.reshape(down, _TILE, ranks)):
        squares[number] = np.matmul(strip, wide)
    return found[:rows, :columns]


def _spelled_out(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the product, multiply-add by multiply-add, each rounded once.

    A product of two float32 is exact in float64, its sum with a third is not: it is rounded to odd
    first, after which rounding to float32 is as if it were the only one.

    Source: S. Boldo, G. Melquiond, Emulation of FMA and correctly rounded sums: proved algorithms
    using rounding to odd, IEEE Transactions on Computers 57(4), 2008.
    """
    import numpy as np

    total = np.zeros((left.shape[0], right.shape[1]), np.float32)
    with np.errstate(all="ignore"):
        for column, row in zip(left.T.astype(np.float64), right.astype(np.float64), strict=True):
            first, second = np.multiply.outer(column, row), total.astype(np.float64)
            found = first + second
            back = found - first
            lost = (first - (found - back)) + (second - back)
            even = (found.view(np.uint64) & 1) == 0
            inexact = np.isfinite(lost) & (lost != 0) & even
            nearer = np.nextafter(found, np.where(lost > 0, np.inf, -np.inf))
            total = np.where(inexact, nearer, found).astype(np.float32)
    return total
