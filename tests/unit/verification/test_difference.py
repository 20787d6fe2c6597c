"""How far two tensors are apart, against plain numpy and torch."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from ckptx.storage.blocks import BlockReader
from ckptx.storage.open_files import Files
from ckptx.tensors.lazy import stored
from ckptx.verification import difference
from ckptx.verification.difference import Tolerance

EXACT = Tolerance()


@pytest.fixture
def apart(tmp_path):
    """Write two arrays, and measure them as tensors of two checkpoints."""

    def measured(a, b, tolerance=EXACT, threads=2):
        tensors, files = [], []
        for name, array in (("a", a), ("b", b)):
            (tmp_path / name).write_bytes(array.tobytes())
            tensors.append(stored(0, 0, array.dtype.name, array.shape))
            files.append(Files([str(tmp_path / name)]))
        stream = BlockReader(*files, threads=threads)
        (found,) = difference.measure(stream, [(tensors[0], tensors[1])], tolerance)
        for one in files:
            one.close()
        return found

    return measured


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("numel", [7, 3_000_001])
def test_differences_are_those_of_numpy(apart, dtype, numel):
    generator = np.random.default_rng(0)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    a = generator.standard_normal(numel).astype(kind)
    b = a.copy()
    b[1::5] = generator.standard_normal(len(b[1::5])).astype(kind)
    found = apart(a, b)
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    distance = np.abs(wide_a - wide_b)
    assert found.beyond == found.differing == np.count_nonzero(distance)
    assert found.max_abs == pytest.approx(distance.max(), rel=1e-6)
    nonzero = wide_a != 0
    relative = (distance[nonzero] / np.abs(wide_a[nonzero])).max()
    assert found.max_rel == pytest.approx(relative, rel=1e-6)


def test_equal(apart):
    a = np.arange(100_001, dtype=np.float32)
    assert apart(a, a.copy()) == difference.Deviation()


@pytest.mark.parametrize(
    ("a", "b", "differing", "largest"),
    [
        ([0.0, 1.0], [-0.0, 1.0], 1, 0.0),  # bits count
        ([math.nan, 1.0], [math.nan, 1.0], 0, 0.0),
        ([math.nan, 1.0], [2.0, 1.0], 1, math.inf),
        ([math.inf, 1.0], [math.inf, 3.0], 1, 2.0),
        ([math.inf, 1.0], [-math.inf, 1.0], 1, math.inf),
    ],
)
def test_values_that_are_no_numbers(apart, a, b, differing, largest):
    found = apart(np.array(a, np.float32), np.array(b, np.float32))
    assert (found.differing, found.max_abs) == (differing, largest)


@pytest.mark.parametrize("rtol", [0.0, 0.01])
@pytest.mark.parametrize("atol", [0.0, 0.1])
def test_tolerance_is_that_of_torch(apart, rtol, atol):
    torch = pytest.importorskip("torch")
    generator = np.random.default_rng(0)
    a = generator.standard_normal(10_000).astype(np.float32)
    b = (a * (1 + generator.normal(0, 0.01, 10_000))).astype(np.float32)
    b[:3] = a[:3] = [np.nan, np.inf, 0]
    found = apart(a, b, Tolerance(rtol, atol))
    # torch measures against its second argument, ckptx against A.
    close = torch.isclose(torch.tensor(b), torch.tensor(a), rtol, atol, equal_nan=True)
    assert found.beyond == int((~close).sum())


def test_dtypes_are_compared_in_the_wider_one(apart):
    a = np.linspace(-3, 3, 1000).astype(ml_dtypes.bfloat16)
    assert apart(a, a.astype(np.float32)).differing == 0
    b = a.astype(np.float32)
    b[5] += 2**-20
    assert apart(a, b).differing == 1


def test_relative_to_nothing(apart):
    zeros = np.zeros(5, np.float32)
    assert apart(zeros, zeros + 1).max_rel == math.inf
    some = np.array([0, 2], np.float32)
    assert apart(some, some + 1).max_rel == 0.5
