"""Low-rank updates: the order of the sum, and that no element knows the box it is asked for in."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from ckptx.errors import SchemaError
from ckptx.storage.gather import read
from ckptx.tensors import low_rank
from ckptx.tensors.lazy import stored
from ckptx.tensors.low_rank import product, updated

pytest.importorskip("torch")

import torch


def nearest(value: Fraction) -> np.float32:
    """Return the float32 nearest to a fraction, the even one of two."""
    middle = np.float32(float(value))
    around = [np.nextafter(middle, np.float32(side)) for side in (-np.inf, np.inf)]
    ordered = sorted(
        (abs(Fraction(float(one)) - value), int(one.view(np.uint32)) & 1, float(one))
        for one in (*around, middle)
    )
    return np.float32(ordered[0][2])


def exact_chain(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    found = np.zeros((left.shape[0], right.shape[1]), np.float32)
    for row, column in np.ndindex(found.shape):
        total = np.float32(0)
        for one, other in zip(left[row], right[:, column], strict=True):
            total = nearest(Fraction(float(one)) * Fraction(float(other)) + Fraction(float(total)))
        found[row, column] = total
    return found


def matrices(rows: int, ranks: int, columns: int, spread: float = 1.0):
    random = np.random.default_rng(rows * ranks + columns)
    sizes = ((rows, ranks), (ranks, columns))
    return [
        (random.standard_normal(s) * 2 ** random.uniform(-spread, spread, s)).astype(np.float32)
        for s in sizes
    ]


@pytest.mark.parametrize("spread", [0.0, 12.0, 70.0])
def test_every_step_is_rounded_once(spread):
    """Sizes far apart in one sum, down to the smallest of float32: rounding twice would show."""
    left, right = matrices(6, 5, 7, spread)
    left[0], right[:, 0] = [1, 2**-24, 2**-60, 0, -1], [1, 1, 1, 1, 1]  # a tie, and then not
    expected = exact_chain(left, right)
    assert np.array_equal(low_rank._spelled_out(left, right), expected)
    assert np.array_equal(product(left, right), expected)


@pytest.mark.parametrize(
    ("rows", "ranks", "columns"),
    [(3, 1, 200), (64, 8, 64), (65, 16, 127), (2, 64, 2), (70, 256, 3)],
)
def test_the_fast_way_is_the_spelled_out_one(rows, ranks, columns):
    left, right = matrices(rows, ranks, columns)
    assert np.array_equal(product(left, right), low_rank._spelled_out(left, right))


@pytest.mark.parametrize("fast", [True, False])
def test_zeros_and_nans_have_the_same_bits_everywhere(fast, monkeypatch):
    if not fast:
        monkeypatch.setattr(low_rank, "_kernel_is_chain", lambda ranks: False)
    left = np.array([[-0.0, -0.0], [0.0, -0.0], [np.inf, -np.inf], [np.nan, 1]], np.float32)
    right = np.array([[1.0, -1.0], [1.0, 2.0]], np.float32)
    with np.errstate(invalid="ignore"):
        found = product(left, right).view(np.uint32)
    nan, infinite = 0x7FC00000, 0xFF800000
    assert found.tolist() == [[0, 0], [0, 0], [nan, infinite], [nan, nan]]


def test_a_kernel_of_another_order_is_not_used(monkeypatch):
    left, right = matrices(70, 12, 90)
    expected = product(left, right)
    monkeypatch.setattr(low_rank, "_kernel_is_chain", lambda ranks: False)
    assert np.array_equal(product(left, right), expected)


@pytest.mark.parametrize(("rows", "ranks", "columns"), [(70, 8, 90), (70, 256, 3), (40, 700, 50)])
def test_the_product_is_as_close_as_torchs(rows, ranks, columns):
    """The bound of a sum in float32, whatever its order, which torch does not promise."""
    left, right = matrices(rows, ranks, columns)
    expected = left.astype(np.float64) @ right.astype(np.float64)
    size = np.abs(left).astype(np.float64) @ np.abs(right).astype(np.float64)
    bound = ranks * 2.0**-24 * size
    assert (np.abs(product(left, right) - expected) <= bound).all()
    eager = (torch.from_numpy(left) @ torch.from_numpy(right)).numpy()
    assert (np.abs(eager - expected) <= bound).all()


@pytest.fixture
def tensors(tmp_path: Path):
    """Return a file with W [130, 90], B, A and m, as lazy and as torch tensors."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(130, 90), (130, 5), (5, 90), (130,)]
    eager = [torch.randn(shape, generator=generator) for shape in shapes]
    path, lazy, offset = tmp_path / "tensors", [], 0
    for tensor in eager:
        lazy.append(stored(0, offset, "float32", tuple(tensor.shape)))
        offset += tensor.nbytes
    path.write_bytes(b"".join(tensor.numpy().tobytes() for tensor in eager))
    return lazy, eager, [str(path)]


@pytest.mark.parametrize("kind", ["lora", "rounded", "dora"])
def test_an_element_does_not_know_its_box(kind, tensors):
    (weight, left, right, magnitude), _, files = tensors
    more = {"rounded": kind == "rounded", "magnitude": magnitude if kind == "dora" else None}
    whole = updated(weight, left, right, 0.3, "bfloat16", **more)
    expected = read(whole, files)
    turned = read(whole.permute((1, 0)), files)
    assert np.array_equal(turned.view(np.uint16), expected.T.view(np.uint16))
    random = np.random.default_rng(1)
    for _ in range(30):
        box = tuple(tuple(sorted(random.integers(0, size + 1, 2))) for size in (130, 90))
        rows, columns = (slice(*bounds) for bounds in box)
        found = read(whole, files, box)
        assert found.tobytes() == np.ascontiguousarray(expected[rows, columns]).tobytes()


def test_values_are_those_of_eager_torch(tensors):
    """torch does everything but the sum, whose order it does not promise."""
    (weight, left, right, magnitude), (w, b, a, m), files = tensors
    update = torch.from_numpy(exact_chain(b[:3].numpy(), a.numpy())) * 0.3
    box = ((0, 3), (0, 90))
    plain = read(updated(weight, left, right, 0.3, "float32"), files, box)
    assert np.array_equal(plain, (w[:3] + update).numpy())
    lazy = updated(weight, left, right, 0.3, "bfloat16", rounded=True)
    eager = (w[:3] + update.bfloat16().float()).bfloat16()
    assert np.array_equal(read(lazy, files, box).view(np.int16), eager.view(torch.int16).numpy())
    scaled = read(updated(weight, left, right, 0.3, "float32", magnitude=magnitude), files)
    wide = (w + (b @ a) * 0.3).double()
    expected = m.double()[:, None] * wide / wide.norm(dim=1, keepdim=True)
    assert np.allclose(scaled, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_shapes_that_do_not_belong_together(tensors):
    (weight, left, right, magnitude), _, _ = tensors
    with pytest.raises(SchemaError, match=r"has rank 5, A \[4, 90\] has rank 4"):
        updated(weight, left, right.narrow(0, 0, 4), 1.0, "float32")
    with pytest.raises(SchemaError, match="of another base model"):
        updated(weight.narrow(0, 0, 9), left, right, 1.0, "float32")
    short = magnitude.narrow(0, 0, 9)
    with pytest.raises(SchemaError, match=r"the magnitude is \[9\], the weight has 130 rows"):
        updated(weight, left, right, 1.0, "float32", magnitude=short)
