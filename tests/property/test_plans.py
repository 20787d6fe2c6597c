"""Random plans: the proof accepts them whole, and refuses them with any one thing wrong."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptx.conversion.proof import prove
from ckptx.errors import PlanError
from ckptx.protocol.contracts import SavePlan
from ckptx.protocol.messages import Begin, Dropped, End, SourceTensor
from ckptx.storage.file_plan import Crc32, FilePlan, Region
from ckptx.tensors.dtypes import ITEMSIZE
from ckptx.tensors.joins import concat
from ckptx.tensors.lazy import Filled, LazyTensor, Stored, replicated, stored

SETTINGS = settings(max_examples=60, deadline=None)
NOTHING = End()


def begin_of(sources: dict[str, LazyTensor]) -> Begin:
    declared = tuple(SourceTensor(name, extent) for name, extent in sources.items())
    return Begin("hf", "hf/llama", {}, ("a.bin", "b.bin"), declared)


def file_of(path: str, tensors: dict[str, LazyTensor], header: bytes = b"") -> FilePlan:
    regions = [Region(0, len(header), header)]
    for name, tensor in tensors.items():
        end = regions[-1].offset + regions[-1].size
        regions.append(Region(end, tensor.nbytes, tensor, name))
    return FilePlan(path, regions[-1].offset + regions[-1].size, regions)


def plan_of(**tensors: LazyTensor) -> SavePlan:
    return SavePlan([file_of("out", tensors)])


@st.composite
def models(draw: st.DrawFn) -> tuple[dict[str, Stored], SavePlan]:
    """Return source tensors with gaps between them, and a plan that cuts them into random parts."""
    sources: dict[str, Stored] = {}
    outputs: dict[str, LazyTensor] = {}
    for file in range(2):
        position = draw(st.integers(0, 9))
        for number in range(draw(st.integers(1, 3))):
            shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
            dtype = draw(st.sampled_from(["bfloat16", "float32", "int8"]))
            tensor = stored(file, position, dtype, shape)
            sources[f"{file}.{number}"] = tensor
            position += tensor.nbytes + draw(st.integers(0, 9))
            axis = draw(st.integers(0, 1))
            cut = draw(st.integers(0, shape[axis]))
            parts = [tensor.narrow(axis, 0, cut), tensor.narrow(axis, cut, shape[axis])]
            if draw(st.booleans()):
                parts = [part.permute((1, 0)) for part in parts]
            for half, part in enumerate(parts):
                outputs[f"{file}.{number}.{half}"] = part
    names = draw(st.permutations(sorted(outputs)))
    middle = draw(st.integers(0, len(names)))
    groups = [names[:middle], names[middle:]]
    files = [
        file_of(f"out{n}", {name: outputs[name] for name in group}, draw(st.binary(max_size=5)))
        for n, group in enumerate(groups)
    ]
    return sources, SavePlan(files)


def tensors_of(plan: SavePlan) -> list[tuple[int, int]]:
    return [
        (f, r)
        for f, file in enumerate(plan.files)
        for r, region in enumerate(file.regions)
        if isinstance(region.content, LazyTensor) and region.content.numel
    ]


def with_region(plan: SavePlan, f: int, r: int, region: Region) -> SavePlan:
    files = list(plan.files)
    regions = list(files[f].regions)
    regions[r] = region
    files[f] = replace(files[f], regions=regions)
    return replace(plan, files=files)


@SETTINGS
@given(models())
def test_totals_of_a_complete_plan(model):
    sources, plan = model
    proof = prove(plan, begin_of(sources), NOTHING)
    assert proof.files == 2
    assert proof.sources == len(sources)
    assert proof.bytes_in == sum(math.prod(t.shape) * ITEMSIZE[t.dtype] for t in sources.values())
    assert proof.bytes_out == proof.bytes_in + sum(f.regions[0].size for f in plan.files)
    assert not proof.casts
    assert not proof.filled


@SETTINGS
@given(models(), st.data())
def test_a_lost_slice_is_named(model, data):
    sources, plan = model
    f, r = data.draw(st.sampled_from(tensors_of(plan)))
    region = plan.files[f].regions[r]
    assert isinstance(region.content, LazyTensor)
    axis = data.draw(st.integers(0, 1))
    size = region.content.shape[axis]
    at = data.draw(st.integers(0, size - 1))
    kept = [region.content.narrow(axis, 0, at), region.content.narrow(axis, at + 1, size)]
    hole = list(region.content.shape)
    hole[axis] = 1
    padded = concat([kept[0], Filled(region.content.dtype, tuple(hole)), kept[1]], axis)
    name = region.name.rpartition(".")[0]
    with pytest.raises(PlanError, match=rf"would be lost.*'{name}'"):
        prove(with_region(plan, f, r, region._replace(content=padded)), begin_of(sources), NOTHING)


@SETTINGS
@given(models(), st.data())
def test_regions_must_tile_their_file(model, data):
    sources, plan = model
    begin = begin_of(sources)
    f, r = data.draw(st.sampled_from(tensors_of(plan)))
    region = plan.files[f].regions[r]
    shift = data.draw(st.sampled_from([-1, 1, 7]))
    with pytest.raises(PlanError, match="exactly once"):
        prove(
            with_region(plan, f, r, region._replace(offset=region.offset + shift)), begin, NOTHING
        )
    with pytest.raises(PlanError, match="its region"):
        prove(with_region(plan, f, r, region._replace(size=region.size + shift)), begin, NOTHING)
    longer = replace(plan.files[f], size=plan.files[f].size + shift)
    files = [longer if n == f else file for n, file in enumerate(plan.files)]
    with pytest.raises(PlanError, match="the file at"):
        prove(replace(plan, files=files), begin, NOTHING)


@SETTINGS
@given(models(), st.data())
def test_undeclared_bytes_must_not_be_read(model, data):
    sources, plan = model
    name = data.draw(st.sampled_from(sorted(sources)))
    rest = {n: t for n, t in sources.items() if n != name}
    with pytest.raises(PlanError, match="did not declare it"):
        prove(plan, begin_of(rest), NOTHING)


@SETTINGS
@given(models(), st.data())
def test_what_is_dropped_by_name_is_not_lost(model, data):
    sources, plan = model
    extra = stored(1, 5000, "float32", (4, 6))
    begin = begin_of({**sources, "extra": extra})
    with pytest.raises(PlanError, match=r"1 source tensors would be lost.*'extra'"):
        prove(plan, begin, NOTHING)
    dropped = Dropped("extra", "no weight", extra.nbytes, (extra,))
    assert prove(plan, begin, End((dropped,))).dropped == (dropped,)
    half = Dropped("extra", "no weight", 48, (extra.narrow(1, 0, 3),))
    with pytest.raises(PlanError, match="'extra'"):
        prove(plan, begin, End((half,)))


def test_a_strided_source_owns_only_its_own_columns():
    left = stored(0, 0, "float32", (8, 10)).narrow(1, 0, 4)
    right = stored(0, 0, "float32", (8, 10)).narrow(1, 4, 10)
    begin = begin_of({"left": left})
    assert prove(plan_of(w=left), begin, NOTHING).bytes_in == 8 * 4 * 4
    with pytest.raises(PlanError, match="did not declare it"):
        prove(plan_of(w=left, v=right.narrow(0, 0, 7)), begin, NOTHING)
    both = begin_of({"left": left, "right": right})
    assert prove(plan_of(w=left, v=right), both, NOTHING).bytes_in == 8 * 10 * 4
    with pytest.raises(PlanError, match="'right'"):
        prove(plan_of(w=left, v=right.narrow(1, 1, 6)), both, NOTHING)


def test_shared_storage_counts_once_and_each_name_must_be_covered():
    whole = stored(0, 8, "bfloat16", (10, 4))
    begin = begin_of({"whole": whole, "head": whole.narrow(0, 0, 4), "tied": whole})
    assert prove(plan_of(w=whole), begin, NOTHING).bytes_in == 80
    with pytest.raises(PlanError, match=r"2 source tensors would be lost.*'tied', 'whole'"):
        prove(plan_of(w=whole.narrow(0, 0, 9)), begin, NOTHING)
    shifted = begin_of({"first": whole.narrow(0, 0, 6), "second": whole.narrow(0, 4, 10)})
    assert prove(plan_of(w=whole), shifted, NOTHING).bytes_in == 80
    with pytest.raises(PlanError, match=r"1 source tensors would be lost.*'second'"):
        prove(plan_of(w=whole.narrow(0, 0, 9)), shifted, NOTHING)


def test_reading_a_tensor_twice_or_in_overlapping_parts_loses_nothing():
    whole = stored(0, 0, "bfloat16", (10, 4))
    begin = begin_of({"w": whole})
    plan = plan_of(a=whole.narrow(0, 0, 7), b=whole.narrow(0, 3, 10), c=whole)
    assert prove(plan, begin, NOTHING).bytes_in == 80


def test_inexact_steps_replicas_and_padding_are_counted():
    a, b = stored(0, 0, "float32", (3, 4)), stored(1, 0, "float32", (3, 4))
    narrow = stored(0, 100, "float16", (5,))
    plan = plan_of(
        w=concat([replicated([a, b]), Filled("float32", (2, 4))]).cast("bfloat16"),
        v=narrow.cast("float32"),
    )
    proof = prove(plan, begin_of({"a": a, "b": b, "n": narrow}), NOTHING)
    assert proof.inexact == {"float32 -> bfloat16": ["w"]}
    assert proof.casts == {"float32 -> bfloat16": ["w"], "float16 -> float32": ["v"]}
    assert proof.filled == {"w": 8}
    assert proof.replicas == 1


def test_nested_copies_are_counted_and_needed():
    copies = [stored(0, 64 * n, "float32", (16,)) for n in range(4)]
    halves = [concat([c.narrow(0, 0, 8), c.narrow(0, 8, 16)]) for c in copies[:2]]
    node = replicated([replicated(halves), replicated(copies[2:])])
    begin = begin_of({str(n): copy for n, copy in enumerate(copies)})
    assert prove(plan_of(w=node), begin, NOTHING).replicas == 3


@pytest.mark.parametrize("path", ["/etc/passwd", "../up", "a/../../b", ""])
def test_paths_stay_inside_the_target(path):
    tensor = stored(0, 0, "int8", (4,))
    with pytest.raises(PlanError, match="inside the target"):
        prove(SavePlan([file_of(path, {"w": tensor})]), begin_of({"w": tensor}), NOTHING)


def test_a_path_is_planned_once_and_a_plan_is_not_empty():
    tensor = stored(0, 0, "int8", (4,))
    twice = SavePlan([file_of("x", {"w": tensor}), file_of("x", {})])
    with pytest.raises(PlanError, match="planned twice"):
        prove(twice, begin_of({"w": tensor}), NOTHING)
    with pytest.raises(PlanError, match="no tensor"):
        prove(SavePlan([FilePlan("x", 0, [])]), begin_of({}), NOTHING)


@pytest.mark.parametrize("number", [0, 2, 7, -1])
def test_a_checksum_must_be_of_a_tensor(number):
    tensor = stored(0, 0, "int8", (4,))
    regions = [Region(0, 2, b"PK"), Region(2, 4, tensor, "w"), Region(6, 4, Crc32(number))]
    plan = SavePlan([FilePlan("x", 10, regions)])
    with pytest.raises(PlanError, match="no tensor"):
        prove(plan, begin_of({"w": tensor}), NOTHING)


def test_reads_too_fine_to_prove_are_refused():
    tensor = stored(0, 0, "int8", (1 << 15, 1 << 14))
    plan = plan_of(a=tensor.narrow(1, 0, 3), b=tensor.narrow(1, 3, 1 << 14))
    with pytest.raises(PlanError, match="too fine"):
        prove(plan, begin_of({"w": tensor}), NOTHING)
