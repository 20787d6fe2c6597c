"""What the algebra refuses, and the shapes of its nodes where they matter to others."""

from __future__ import annotations

import numpy as np
import pytest

from ckptx.errors import PlanError
from ckptx.tensors.dtypes import ITEMSIZE, is_widening
from ckptx.tensors.joins import concat, deinterleave, interleave, rejoin, stack, tile
from ckptx.tensors.lazy import (
    Cast,
    Computed,
    Filled,
    Replicated,
    Sliced,
    Stored,
    Tiled,
    replicated,
    stored,
)
from ckptx.tensors.pieces import leaves, pieces

MATRIX = stored(0, 0, "float32", (4, 6))
VECTOR = stored(0, 0, "float32", (4,))
SCALAR = stored(0, 0, "float32", ())


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda: MATRIX.narrow(0, 2, 5), r"cannot cut \[2:5\] from axis 0 of \[4, 6\]"),
        (lambda: MATRIX.narrow(0, 3, 2), "cannot cut"),
        (lambda: MATRIX.narrow(0, -1, 2), "cannot cut"),
        (lambda: MATRIX.narrow(2, 0, 1), r"no axis 2 in \[4, 6\]"),
        (lambda: MATRIX.narrow(-1, 0, 1), "no axis -1"),
        (lambda: MATRIX.permute((0, 0)), "does not permute"),
        (lambda: MATRIX.permute((0,)), "does not permute"),
        (lambda: MATRIX.split(1, 4), "does not split into rows of 4"),
        (lambda: MATRIX.split(1, 0), "does not split"),
        (lambda: MATRIX.split(-1, 2), "no axis -1"),
        (lambda: MATRIX.merge(1), "no axis after 1"),
        (lambda: MATRIX.merge(-1), "no axis after -1"),
        (lambda: MATRIX.chunk(0, 3, 0), "does not divide by 3"),
        (lambda: MATRIX.chunk(0, 0, 0), "does not divide by 0"),
        (lambda: MATRIX.chunk(0, 2, 2), "cannot cut"),
        (lambda: MATRIX.squeeze(), "is not 1"),
        (lambda: SCALAR.squeeze(), "is not 1"),
        (lambda: SCALAR.unsqueeze(), "no axis 0"),
        (lambda: concat([]), "nothing to concatenate"),
        (lambda: concat([SCALAR, SCALAR]), "no axis 0"),
        (lambda: concat([VECTOR, VECTOR], 1), "no axis 1"),
        (lambda: concat([MATRIX, VECTOR]), r"cannot join \[4\] to \[4, 6\]"),
        (lambda: concat([MATRIX, MATRIX.cast("float64")]), "different dtypes: float32, float64"),
        (lambda: stack([MATRIX, VECTOR]), "cannot join"),
        (lambda: replicated([]), "no copies"),
        (lambda: replicated([MATRIX, VECTOR]), "copies of one tensor differ"),
        (lambda: interleave([MATRIX, VECTOR], 3), "does not divide into 3 groups"),
        (lambda: interleave([MATRIX], 0), "groups"),
        (lambda: deinterleave(MATRIX, [2, 1], 1), "which sum to 3"),
        (lambda: deinterleave(MATRIX, [3, 1], 2), "do not divide into 2 groups"),
        (lambda: deinterleave(MATRIX, [4], 0), "groups"),
        (lambda: MATRIX.cast("float12"), "unknown dtype 'float12'; known: float64"),
        (lambda: MATRIX.cast("float8_e4m3fn"), "no cast from float32 to float8_e4m3fn"),
        (lambda: MATRIX.cast("int8"), "no cast from float32 to int8"),
        (lambda: stored(0, 0, "int64", (2,)).cast("float32"), "no cast from int64"),
        (lambda: stored(0, 0, "bool", (2,)).cast("bfloat16"), "no cast from bool"),
        (lambda: stored(0, 0, "complex64", (2,)).cast("float32"), "no cast from complex64"),
    ],
)
def test_what_makes_no_sense_is_refused(step, message):
    with pytest.raises(PlanError, match=message):
        step()


def rows(start: int, stop: int, column: int = 0, last: int = 2) -> tuple[tuple[int, int], Stored]:
    return (start, column), stored(0, 0, "int8", (stop - start, last - column))


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        ([], "no tiles"),
        ([rows(0, 2)], r"hold 4 elements, \[4, 2\] needs 8"),
        ([rows(0, 4), rows(0, 4)], "overlap"),
        ([rows(0, 3), rows(2, 3)], "overlap"),
        ([rows(0, 2, 0, 1), rows(0, 2, 0, 1), rows(2, 4)], "overlap"),
        ([rows(0, 2), rows(0, 2)], "overlap"),
        ([rows(0, 2), rows(3, 5)], "lies outside"),
        ([((-1, 0), stored(0, 0, "int8", (4, 2)))], "lies outside"),
        ([((0,), stored(0, 0, "int8", (4, 2)))], "has not as many axes"),
        ([((0, 0), stored(0, 0, "int8", (8,)))], "has not as many axes"),
        ([((0, 0), stored(0, 0, "int8", (2, 2))), ((2, 0), Filled("int16", (2, 2)))], "dtypes"),
    ],
)
def test_tiles_must_cover_the_shape_once(tiles, message):
    with pytest.raises(PlanError, match=message):
        tile((4, 2), tiles)


def test_tiles_may_be_given_in_any_order_and_be_empty():
    first, second = rows(0, 3), rows(3, 4)
    empty = (3, 0), stored(0, 0, "int8", (0, 2))
    made = tile((4, 2), [second, empty, first])
    assert isinstance(made, Tiled)
    assert made.tiles == (first, second)
    assert tile((3, 2), [first, empty]) == first[1]


def test_a_large_grid_of_tiles_is_checked_in_no_time():
    # 64 flat shards that end within rows, three boxes each: what FSDP and ZeRO leave behind.
    width, total, ranks = 1000, 1_000_000, 640
    tiles = []
    for rank in range(ranks):
        position, stop = total * rank // ranks, total * (rank + 1) // ranks
        while position < stop:
            row, column = divmod(position, width)
            whole = column == 0 and stop - position >= width
            high = (stop - position) // width if whole else 1
            last = width if whole else min(width, column + stop - position)
            tiles.append(((row, column), stored(0, 0, "int8", (high, last - column))))
            position += high * (last - column)
    assert tile((total // width, width), tiles).nbytes == total
    moved = [((0, 0), tiles[0][1]), *((o, t) for o, t in tiles[1:-1]), ((0, 0), tiles[-1][1])]
    with pytest.raises(PlanError, match="overlap"):
        tile((total // width, width), moved)


def test_strides_of_single_elements_do_not_tell_tensors_apart():
    column = stored(0, 0, "int8", (4, 4)).narrow(1, 2, 3)
    row = stored(0, 0, "int8", (4, 4)).narrow(0, 1, 2)
    assert row == stored(0, 4, "int8", (1, 4))
    assert column.narrow(0, 0, 1) == stored(0, 2, "int8", (1, 1))
    assert column.merge(0) == Stored("int8", (4,), 0, 2, (4,))


def test_copies_fold_and_equal_ones_are_one():
    first, second, third = (stored(n, 0, "int8", (4,)) for n in range(3))
    assert replicated([first, first]) == first
    nested = replicated([replicated([first, second]), third])
    assert nested == Replicated("int8", (4,), (first, second, third))
    assert nested.narrow(0, 0, 2) == replicated([t.narrow(0, 0, 2) for t in (first, second, third)])


def test_leaves_include_every_copy_and_what_is_below_casts():
    first, second = (stored(n, 0, "float16", (4,)) for n in range(2))
    tensor = concat([replicated([first, second]).cast("float32"), Filled("float32", (2,))])
    assert list(leaves(tensor)) == [first, second, Filled("float32", (2,))]
    assert [type(piece.leaf) for piece in pieces(tensor)] == [Cast, Filled]


def test_views_of_casts_are_casts_of_views():
    cast = MATRIX.cast("bfloat16")
    assert cast.narrow(0, 1, 2).permute((1, 0)).split(0, 3) == (
        MATRIX.narrow(0, 1, 2).permute((1, 0)).split(0, 3).cast("bfloat16")
    )
    assert MATRIX.cast("float32") is MATRIX


def test_widening_casts_are_those_that_keep_every_value():
    exact = {
        (source, target)
        for source in ITEMSIZE
        for target in ITEMSIZE
        if is_widening(source, target)
    }
    proper = {pair for pair in exact if pair[0] != pair[1]}
    wide = {("float32", "float64")}
    wide |= {(half, w) for half in ("float16", "bfloat16") for w in ("float32", "float64")}
    for eight in ("float8_e4m3fn", "float8_e5m2"):
        wide |= {(eight, w) for w in ("float16", "bfloat16", "float32", "float64")}
    assert proper == wide
    assert {(d, d) for d in ITEMSIZE} <= exact


def test_what_was_cut_from_one_extent_is_that_extent_again():
    whole = stored(0, 8, "float32", (6, 4))
    for view in (whole, whole.permute((1, 0))):
        rows = view.shape[0]
        parts = [view.narrow(0, n, n + 2) for n in range(0, rows, 2)]
        assert rejoin(parts) == view
        assert rejoin([view.narrow(1, 0, 2), view.narrow(1, 2, view.shape[1])], 1) == view


def test_what_was_not_cut_from_one_extent_is_only_joined():
    whole = stored(0, 8, "float32", (6, 4))
    first, last = whole.narrow(0, 0, 2), whole.narrow(0, 3, 6)
    assert rejoin([first, last]) == concat([first, last])
    assert rejoin([last, first]) == concat([last, first])
    other = stored(1, 8 + 2 * 16, "float32", (2, 4))
    assert rejoin([first, other]) == concat([first, other])


def test_numbers_of_numpy_do_not_stay_in_what_is_kept():
    """A journal or a pickle of a later plan would hold them."""
    theirs = tuple(np.array([7919, 3, 5]))
    stored(0, 0, "uint8", theirs)
    Computed("float32", theirs, "lora", ()).narrow(1, np.int64(1), np.int64(2))
    ours = stored(0, 0, "uint8", (7919, 3, 5))
    assert {type(stride) for stride in ours.strides} == {int}
    cut = Computed("float32", (7919, 3, 5), "lora", ()).narrow(1, 1, 2)
    assert isinstance(cut, Sliced)
    assert {type(bound) for bounds in cut.box for bound in bounds} == {int}
