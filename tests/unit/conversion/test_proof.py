"""What the proof says about single tensors; random plans are in tests/property/test_plans.py."""

from __future__ import annotations

import pytest

from ckptx.conversion.proof import operations, prove
from ckptx.errors import PlanError
from ckptx.protocol.contracts import SavePlan
from ckptx.protocol.messages import Begin, End, SourceTensor
from ckptx.storage.file_plan import FilePlan, Region
from ckptx.tensors.joins import concat, interleave
from ckptx.tensors.lazy import Filled, Stored, replicated, stored

A, B = stored(0, 0, "float32", (4, 6)), stored(0, 96, "float32", (4, 6))


def begin_of(*extents: Stored) -> Begin:
    sources = tuple(SourceTensor(f"source {n}", extent) for n, extent in enumerate(extents))
    return Begin("hf", "hf/llama", {}, ("model.safetensors",), sources)


def plan_of(tensor: Stored) -> SavePlan:
    return SavePlan([FilePlan("out", tensor.nbytes, [Region(0, tensor.nbytes, tensor, "w")])])


def test_operations_run_from_the_outside_in_and_are_named_once():
    assert operations(A.permute((1, 0)).narrow(0, 0, 2)) == ()
    assert operations(replicated([A, B]).cast("bfloat16")) == (
        "cast float32 -> bfloat16",
        "replicated",
    )
    padded = concat([interleave([A, B], 2).cast("float16"), Filled("float16", (1, 6))])
    assert operations(padded) == ("tile", "cast float32 -> float16", "merge", "fill")
    assert operations(interleave([A, B], 2)) == ("merge", "tile")


def test_the_message_about_undeclared_bytes_names_the_file_and_the_bytes():
    message = r"model.safetensors: bytes 96 to 192 are read, but no source tensor lies there"
    with pytest.raises(PlanError, match=message):
        prove(plan_of(B), begin_of(A), End())


def test_a_read_beyond_the_end_of_a_tensor_is_refused():
    longer = stored(0, 0, "float32", (5, 6))
    with pytest.raises(PlanError, match="bytes 0 to 120"):
        prove(plan_of(longer), begin_of(A), End())


def test_a_read_across_the_gap_between_tensors_is_refused():
    far = stored(0, 100, "float32", (4, 6))
    with pytest.raises(PlanError, match="bytes 48 to 144"):
        prove(plan_of(stored(0, 48, "float32", (24,))), begin_of(A, far), End())


def test_the_message_about_lost_tensors_shows_ten_and_counts_the_rest():
    extents = [stored(0, 96 * n, "float32", (4, 6)) for n in range(14)]
    with pytest.raises(PlanError, match=r"13 source tensors would be lost.* and 3 more"):
        prove(plan_of(extents[0]), begin_of(*extents), End())


def test_repeated_elements_are_counted_as_filled():
    row = Stored("float32", (3, 6), 0, 0, (0, 1))
    source = stored(0, 0, "float32", (6,))
    assert prove(plan_of(row), begin_of(source), End()).filled == {"w": 18}
