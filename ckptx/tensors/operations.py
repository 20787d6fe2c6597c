"""The computations that a lazy tensor may stand for, besides placement and casts.

An operation says which boxes of its inputs a box of its output needs, and computes that box from
them. It must give the same bytes whatever boxes it is asked for: an element may depend on its place
in the tensor, never on the box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from ckptx.errors import SchemaError
from ckptx.tensors.dtypes import numpy_dtype
from ckptx.tensors.lazy import Box, Computed, LazyTensor
from ckptx.tensors.low_rank import Dora, LowRank
from ckptx.tensors.mean import MEAN, Mean

if TYPE_CHECKING:  # planning computes nothing, and needs no numpy
    import numpy as np
    from numpy.typing import NDArray


class Operation(Protocol):
    """How a kind of `ckptx.tensors.lazy.Computed` tensor is evaluated."""

    def label(self, tensor: Computed) -> str:
        """Return what the report calls it; every computation is listed as inexact."""

    def needs(self, tensor: Computed, box: Box) -> Sequence[Box]:
        """Return the box of every input that a box of the output depends on."""

    def evaluate(self, tensor: Computed, box: Box, inputs: Any) -> NDArray[np.float32]:
        """Return a box of the output from those boxes, before it is rounded to its dtype.

        ``inputs`` are arrays: a sequence, or for `ONE_BY_ONE` an iterator that reads each.
        """


class Dequantise:
    """A float8 matrix times one float32 scale for every block of it, ``params`` rows by columns.

    The product is made in float32 and rounded once.

    Source: deepseek-ai/DeepSeek-V3 inference/kernel.py, weight_dequant @ main;
    huggingface/transformers src/transformers/integrations/finegrained_fp8.py @ v5.23.0.
    """

    def label(self, tensor: Computed) -> str:
        """Return the step in the words of a cast."""
        return f"{tensor.inputs[0].dtype} * {tensor.inputs[1].dtype} -> {tensor.dtype}"

    def needs(self, tensor: Computed, box: Box) -> Sequence[Box]:
        """Return the same box of the matrix, and the blocks that it touches."""
        blocks = tuple(
            (start // size, -(-stop // size))
            for (start, stop), size in zip(box, tensor.params, strict=True)
        )
        return [box, blocks]

    def evaluate(
        self, tensor: Computed, box: Box, inputs: Sequence[NDArray[Any]]
    ) -> NDArray[np.float32]:
        """Return the product."""
        import numpy as np

        codes, scales = inputs
        (top, bottom), (left, right) = box
        rows, columns = tensor.params
        wide = scales.astype(np.float32).repeat(columns, 1)[:, left % columns :][:, : right - left]
        product = _table(tensor.inputs[0].dtype)[codes.view(np.uint8)]
        for number, scale in enumerate(wide, top // rows):
            # The rows of the box that lie in this block.
            first, last = max(number * rows, top) - top, min((number + 1) * rows, bottom) - top
            product[first:last] *= scale
        return product


@cache
def _table(dtype: str) -> NDArray[np.float32]:
    """Return the value of every code: looking one up is faster than computing it."""
    import numpy as np

    codes = np.arange(256, dtype=np.uint8).view(numpy_dtype(dtype))
    table: NDArray[np.float32] = codes.astype(np.float32)
    return table


OPERATIONS: Mapping[str, Operation] = {
    "dequantise": Dequantise(),
    "lora": LowRank(),
    "lora, update rounded": LowRank(rounded=True),
    "dora": Dora(),
    MEAN: Mean(),
}
"""By the name that `ckptx.tensors.lazy.Computed` has them under."""
ONE_BY_ONE = (MEAN,)
"""Those whose inputs are many, and are read one after the other."""


def needs(tensor: Computed, box: Box) -> Sequence[Box]:
    """Return the box of every input that a box of a computed tensor depends on."""
    return OPERATIONS[tensor.op].needs(tensor, box)


def dequantised(
    weight: LazyTensor, scale: LazyTensor, block: tuple[int, int], dtype: str
) -> Computed:
    """Return a block-quantised matrix in ``dtype``; ``scale`` has one element for every block.

    Raises:
        SchemaError: the scale does not belong to the matrix.
    """
    wanted = [-(-size // part) for size, part in zip(weight.shape, block, strict=False)]
    if len(weight.shape) != 2 or list(scale.shape) != wanted:
        raise SchemaError(
            f"the scale is {list(scale.shape)}, blocks of {list(block)} of {list(weight.shape)} "
            f"need {wanted}"
        )
    return Computed(dtype, weight.shape, "dequantise", (weight, scale), block)
