"""The mean of tensors of several checkpoints, as a computed tensor, element by element.

    x1 + x2 + ... + xn, divided by n             or x1 * w1 + x2 * w2 + ... + xn * wn

In float32, from the first to the last, each step rounded; then once to the dtype of the result.
Only one of the tensors is held at a time, beside the sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckptx.tensors import lazy
from ckptx.tensors.lazy import Box, Computed, Filled, LazyTensor

if TYPE_CHECKING:  # planning computes nothing, and needs no numpy
    import numpy as np
    from numpy.typing import NDArray

MEAN = "mean"


class Mean:
    """The operation; ``params`` has the number of tensors, after which the weights are inputs."""

    def label(self, tensor: Computed) -> str:
        """Return the step in the words of a cast."""
        (count,) = tensor.params
        dtypes = dict.fromkeys(one.dtype for one in tensor.inputs[:count])
        weights = [one.value for one in tensor.inputs[count:] if isinstance(one, Filled)]
        by = f" by {', '.join(f'{weight:g}' for weight in weights)}" if weights else ""
        return f"mean of {count}{by}: {', '.join(dtypes)} -> {tensor.dtype}"

    def needs(self, tensor: Computed, box: Box) -> Sequence[Box]:
        """Return the same box of every tensor, and the weights."""
        (count,) = tensor.params
        return [box if number < count else ((0, 1),) for number in range(len(tensor.inputs))]

    def evaluate(
        self, tensor: Computed, box: Box, inputs: Iterable[NDArray[Any]]
    ) -> NDArray[np.float32]:
        """Return the mean; of ``inputs`` one is asked for after the other."""
        import numpy as np

        (count,) = tensor.params
        weights = [one.value for one in tensor.inputs[count:] if isinstance(one, Filled)]
        total: NDArray[np.float32] | None = None
        for number, values in zip(range(count), inputs, strict=False):
            term = values.astype(np.float32)
            if weights:
                term *= np.float32(weights[number])
            total = term if total is None else np.add(total, term, out=total)
        assert total is not None
        if not weights:
            total /= np.float32(count)
        total[np.isnan(total)] = np.nan  # processors make NaNs of different bits
        return total


def mean(tensors: Sequence[LazyTensor], weights: Sequence[float] = ()) -> Computed:
    """Return the mean of tensors of one shape in the dtype of the first, weighted if asked for."""
    factors = (Filled("float32", (1,), weight) for weight in weights)
    first = tensors[0]
    return Computed(first.dtype, first.shape, MEAN, (*tensors, *factors), (len(tensors),))


class Renumbered:
    """Lazy tensors of one checkpoint with its files numbered from ``first`` on.

    What is shared stays shared.
    """

    def __init__(self, first: int) -> None:
        self._first = first
        self._known: dict[int, tuple[LazyTensor, LazyTensor]] = {}

    def __call__(self, tensor: LazyTensor) -> LazyTensor:
        """Return a tensor as it is called among the files of all."""
        known = self._known.get(id(tensor))
        if known is None:
            known = self._known[id(tensor)] = tensor, self._made(tensor)
        return known[1]

    def _made(self, tensor: LazyTensor) -> LazyTensor:
        match tensor:
            case lazy.Stored(file=file):
                return replace(tensor, file=file + self._first)
            case lazy.Replicated(copies=copies):
                return replace(tensor, copies=tuple(map(self, copies)))
            case lazy.Tiled(tiles=tiles):
                return replace(tensor, tiles=tuple((origin, self(part)) for origin, part in tiles))
            case Computed(inputs=inputs):
                return replace(tensor, inputs=tuple(map(self, inputs)))
            case lazy.Sliced() | lazy.Permuted() | lazy.Split() | lazy.Merged() | lazy.Cast():
                return replace(tensor, base=self(tensor.base))
        return tensor  # filled, of no file
