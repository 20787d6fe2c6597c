"""Mistakes in the axes of a matrix: transposed, or shards joined along the wrong axis."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ckptx.tensors.lazy import LazyTensor
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
                yield Variant(f"{words} B", on_one(partial(_stacked, ranks)))
                yield Variant(f"{words} A", on_one(partial(_unstacked, ranks)))
        return
    for here, there, side in ((a, b, "B"), (b, a, "A")):
        for axis in (0, 1):
            # Cut along ``axis`` as is right, joined along the other.
            ranks, odd = divmod(there[1 - axis], here[1 - axis] or 1)
            if odd or ranks < 2 or there[axis] * ranks != here[axis]:
                continue
            right, wrong = ("rows", "columns") if axis == 0 else ("columns", "rows")
            words = f"{ranks} shards of {right} were joined as {wrong} in {side}"
            change = partial(_rejoined, ranks, axis if side == "B" else 1 - axis)
            yield Variant(words, on_one(change))


WRONG_AXIS = Hypothesis(
    "shards-on-wrong-axis",
    "tensor-parallel shards were joined along the wrong axis",
    "Shards of query, key, value, gate, up projection and vocabulary are joined along the rows "
    "(axis 0), those of the attention output and of the down projection along the columns "
    "(axis 1). Convert again from the ranks' files.",
    _wrongly_joined,
)


def _rejoined(ranks: int, axis: int, matrix: LazyTensor) -> LazyTensor:
    """Return a matrix cut along an axis, with the shards joined along the other."""
    shards = matrix.split(axis, matrix.shape[axis] // ranks)
    return shards.permute((1, 0, 2)).merge(1 - axis)


def _stacked(ranks: int, matrix: LazyTensor) -> LazyTensor:
    """Return shards of columns one after another in memory, seen as the whole matrix."""
    return _rejoined(ranks, 1, matrix).merge(0).split(0, matrix.shape[1])


def _unstacked(ranks: int, matrix: LazyTensor) -> LazyTensor:
    """Return the inverse of `_stacked`."""
    rows, columns = matrix.shape
    shards = matrix.merge(0).split(0, columns // ranks).split(0, rows)
    return shards.permute((1, 0, 2)).merge(1)
