"""Copies of one tensor that differ are found before anything is converted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ckptx.errors import ConversionError, PlanError
from ckptx.protocol.contracts import SavePlan
from ckptx.storage.file_plan import FilePlan, Region
from ckptx.storage.open_files import Files
from ckptx.tensors.joins import concat
from ckptx.tensors.lazy import LazyTensor, replicated, stored
from ckptx.writing.replicas import check_replicas

ROWS, COLUMNS = 1500, 1024  # 3 MiB of bfloat16, of which 1 MiB is sampled


def plan_of(*tensors: LazyTensor) -> SavePlan:
    regions, end = [], 0
    for number, tensor in enumerate(tensors):
        regions.append(Region(end, tensor.nbytes, tensor, f"tensor {number}"))
        end += tensor.nbytes
    return SavePlan([FilePlan("out", end, regions)])


@pytest.fixture
def copies(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(np.arange(ROWS * COLUMNS, dtype=np.uint16).tobytes())
    return paths


def node(count: int = 3, rows: int = ROWS) -> LazyTensor:
    return replicated([stored(n, 0, "bfloat16", (rows, COLUMNS)) for n in range(count)])


def check(tensor: LazyTensor, paths: list[Path], mode: str) -> int:
    files = Files([str(path) for path in paths])
    try:
        return check_replicas(plan_of(tensor), files, mode)
    finally:
        files.close()


def spoil(path: Path, element: int) -> None:
    content = bytearray(path.read_bytes())
    content[2 * element] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("mode", ["sample", "all"])
def test_equal_copies_are_counted(copies, mode):
    assert check(node(), copies, mode) == 2
    assert check(node().permute((1, 0)).cast("float32"), copies, mode) == 2


@pytest.mark.parametrize("element", [0, 32767, ROWS * COLUMNS - 32768, ROWS * COLUMNS - 1])
@pytest.mark.parametrize("mode", ["sample", "all"])
def test_the_ends_are_always_compared(copies, mode, element):
    spoil(copies[2], element)
    message = rf"'tensor 0': copy 2 of 3 differs from copy 0 at element {element};"
    with pytest.raises(ConversionError, match=message):
        check(node(), copies, mode)


def test_all_finds_what_a_sample_may_miss(copies):
    missed = 0
    for element in range(100_000, ROWS * COLUMNS - 100_000, 300_000):
        spoil(copies[1], element)
        with pytest.raises(ConversionError, match=f"at element {element};"):
            check(node(), copies, "all")
        try:
            check(node(), copies, "sample")
        except ConversionError:
            pass
        else:
            missed += 1
        spoil(copies[1], element)
    assert missed > 0


def test_small_tensors_are_compared_in_full(copies):
    rows = 512  # 1 MiB
    for element in (1, 200_001, 300_000, rows * COLUMNS - 1):
        spoil(copies[1], element)
        with pytest.raises(ConversionError, match=f"at element {element};"):
            check(node(rows=rows), copies, "sample")
        spoil(copies[1], element)


def test_a_sample_finds_copies_that_differ_throughout(copies):
    content = np.fromfile(copies[1], np.uint16)
    content[40_000:-40_000] += 1  # equal at both ends
    copies[1].write_bytes(content.tobytes())
    with pytest.raises(ConversionError, match="copy 1 of 3"):
        check(node(), copies, "sample")


def test_none_reads_nothing(copies):
    for path in copies:
        path.unlink()
    assert check(node(), copies, "none") == 0


def test_copies_within_copies_are_compared(copies):
    spoil(copies[2], 5)
    first, second, third = (stored(n, 0, "bfloat16", (ROWS, COLUMNS)) for n in range(3))
    within = replicated([first, replicated([second, third])])
    with pytest.raises(ConversionError, match="copy 2 of 3"):
        check(within, copies, "all")

    halves = [
        concat([replicated([t.narrow(0, 0, 9), third.narrow(0, 0, 9)]), t.narrow(0, 9, ROWS)])
        for t in (first, second)
    ]
    with pytest.raises(ConversionError, match="copy 1 of 2"):
        check(replicated(halves), copies, "all")


def test_each_copy_is_compared_once_however_often_it_is_written(copies):
    files = Files([str(path) for path in copies])
    assert check_replicas(plan_of(node(), node(), node()), files, "sample") == 2
    files.close()


def test_unknown_modes_are_refused():
    with pytest.raises(PlanError, match="unknown replica check 'some'; known: sample, all, none"):
        check_replicas(SavePlan([]), Files([]), "some")
