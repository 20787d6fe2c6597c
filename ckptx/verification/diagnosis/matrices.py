"""Mistakes in the axes of a matrix: transposed, or shards joined along the wrong axis."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ckptx.tensors.lazy import LazyTensor, Shape
from ckptx.verification.diagnosis.evidence import TensorPair
from ckptx.verification.diagnosis.mistakes import Hypothesis, Variant, on_one

_RANKS = (2, 4, 8, 16, 32, 64)


def _transposed(pair: TensorPair) -> Iterator[Variant]:
    """Yield the last two axes exchanged."""
    if len(pair.a) in (2, 3) and pair.a[-2:] == pair.b[-2:][::-1]:
        axes = (1, 0) if len(pair.a) == 2 else (0, 2, 1)
        yield Variant("rows of A are columns of B", on_one(lambda tensor: tensor.permute(axes)))


TRANSPOSED = Hypothesis(
    "transposed",
    "matrices are transposed",
    "One side stores [in, out], the other [out, in]: GPT-2's Conv1D and grouped experts do the "
    "first, everything else the second. Convert that side again, with the right architecture "
    "in its config.",
    _transposed,
)


def _wrongly_joined(pair: TensorPair) -> Iterator[Variant]:
    """Yield every number of ranks that the shapes allow."""
    a, b = pair.a, pair.b
    if len(a) != 2 or len(b) != 2:
        return
    if a == b:
        for ranks in _RANKS:
            if a[1] % ranks == 0 and a[1] != ranks:
                words = f"the columns of {ranks} ranks lie one rank after another in"
                yield Variant(f"{words} B", on_one(_stacked(ranks, a)))
                yield Variant(f"{words} A", on_one(_unstacked(ranks, a)))
        return
    for here, there, side in ((a, b, "B"), (b, a, "A")):
        for axis in (0, 1):
            # Cut along ``axis`` as is right, joined along the other.
            if not here[1 - axis]:
                continue
            ranks, odd = divmod(there[1 - axis], here[1 - axis])
            if odd or ranks < 2 or there[axis] * ranks != here[axis]:
                continue
            right, wrong = ("rows", "columns") if axis == 0 else ("columns", "rows")
            words = f"{ranks} shards of {right} were joined as {wrong} in {side}"
            change = _rejoined(ranks, axis if side == "B" else 1 - axis)
            yield Variant(words, on_one(change))


WRONG_AXIS = Hypothesis(
    "shards-on-wrong-axis",
    "tensor-parallel shards were joined along the wrong axis",
    "Shards of query, key, value, gate, up projection and vocabulary are joined along the rows "
    "(axis 0), those of the attention output and of the down projection along the columns "
    "(axis 1). Convert again from the ranks' files.",
    _wrongly_joined,
)


def _rejoined(ranks: int, axis: int) -> Callable[[LazyTensor], LazyTensor]:
    """Return how to cut a matrix along an axis and join the parts along the other."""

    def change(tensor: LazyTensor) -> LazyTensor:
        if axis == 0:
            parts = tensor.split(0, tensor.shape[0] // ranks)
            return parts.permute((1, 0, 2)).merge(1)
        parts = tensor.split(1, tensor.shape[1] // ranks)
        return parts.permute((1, 0, 2)).merge(0)

    return change


def _stacked(ranks: int, shape: Shape) -> Callable[[LazyTensor], LazyTensor]:
    """Return how shards of columns lie one after another in memory, seen as the whole matrix."""
    return lambda tensor: _rejoined(ranks, 1)(tensor).merge(0).split(0, shape[1])


def _unstacked(ranks: int, shape: Shape) -> Callable[[LazyTensor], LazyTensor]:
    """Return the inverse of `_stacked`."""

    def change(tensor: LazyTensor) -> LazyTensor:
        shards = tensor.merge(0).split(0, shape[1] // ranks).split(0, shape[0])
        return shards.permute((1, 0, 2)).merge(1)

    return change
