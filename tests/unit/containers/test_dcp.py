from __future__ import annotations

import pickle
import random
from collections import OrderedDict
from pathlib import Path

import pytest

from ckptx.containers import dcp
from ckptx.containers.dcp import ObjectItem, TensorItem
from ckptx.containers.dcp_metadata import Chunk
from ckptx.errors import FormatError, PlanError
from ckptx.tensors import tiling
from ckptx.tensors.lazy import Filled, Stored

pytest.importorskip("torch")

import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

# torch itself warns about single-process saving and its own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture
def values():
    torch.manual_seed(0)
    return {
        "rows": torch.randn(6, 4).bfloat16(),
        "fp8": torch.randn(5).to(torch.float8_e4m3fn),
        "turned": torch.randn(3, 5).t(),
        "scalar": torch.tensor(2.5),
        "flags": torch.tensor([True, False]),
        "blocks": torch.arange(24).reshape(4, 6),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }


def read_files(names):
    return {number: Path(name).read_bytes() for number, name in enumerate(names)}


def test_reads_what_torch_saved(values, tmp_path, eager, same):
    nested = {"model": values, "step": 3, "betas": [0.9, torch.ones(2)]}
    torch_dcp.save(nested, checkpoint_id=tmp_path, no_dist=True)
    metadata = dcp.read_metadata(tmp_path)
    files = ["/first"]
    found = dcp.tensors(metadata, files)
    shifted = {i + 1: raw for i, raw in read_files(files[1:]).items()}
    for name, value in values.items():
        assert same(eager(found[f"model.{name}"], shifted), value)
    assert metadata.planner_data["model.rows"] == ("model", "rows")
    assert "step" in metadata.objects
    assert dcp.read_object(metadata, "step", files) == 3
    assert files == ["/first", str(tmp_path / "__0_0.distcp")]


def test_metadata_says_what_torch_says(values, tmp_path):
    torch_dcp.save({"model": values, "o": "x"}, checkpoint_id=tmp_path, no_dist=True)
    real = FileSystemReader(tmp_path).read_metadata()
    found = dcp.read_metadata(tmp_path)
    for key, entry in found.tensors.items():
        expected = real.state_dict_metadata[key]
        assert entry.shape == tuple(expected.size)
        assert f"torch.{entry.dtype}" == str(expected.properties.dtype)
        chunks = [Chunk(tuple(c.offsets), tuple(c.sizes)) for c in expected.chunks]
        assert list(entry.chunks) == chunks
    for index, info in real.storage_data.items():
        place = found.items[index.fqn, None if index.offset is None else tuple(index.offset)]
        assert (place.path, place.offset, place.length) == (
            info.relative_path,
            info.offset,
            info.length,
        )
    assert len(found.items) == len(real.storage_data)


def test_sharded_chunks_are_assembled(tmp_path, eager, same, spool, execute):
    """Items by `torch.save`, metadata by torch's classes: what several ranks leave behind."""
    whole = torch.randn(5, 7)
    boxes = [((3, 0), (2, 7)), ((0, 4), (3, 3)), ((0, 0), (3, 4))]
    storage, position = {}, 0
    with (tmp_path / "__0_0.distcp").open("wb") as file:
        file.write(b"odd")
        for (row, column), (rows, columns) in boxes:
            start = file.tell()
            torch.save(whole[row : row + rows, column : column + columns].clone(), file)
            position = file.tell()
            index = MetadataIndex("w", (row, column))
            storage[index] = info(start, position - start)
    chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in boxes]
    properties = TensorProperties(dtype=torch.float32)
    entry = TensorStorageMetadata(properties, whole.shape, chunks)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"w": entry}, None, storage)))
    files: list[str] = []
    found = dcp.tensors(dcp.read_metadata(tmp_path), files)["w"]
    assert same(eager(found, read_files(files)), whole)


def info(offset, length):
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo("__0_0.distcp", offset, length)


def written(tmp_path, execute, plans, files):
    for plan in plans:
        path = tmp_path / plan.path
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(execute(plan, files))


@pytest.fixture
def planned(values, tmp_path, execute, spool):
    lazy, files = spool(values)
    first = [
        TensorItem("rows", (6, 4), (0, 0), lazy["rows"].narrow(0, 0, 2)),
        TensorItem("rows", (6, 4), (6, 0), lazy["rows"].narrow(0, 6, 6)),  # a rank without rows
        ObjectItem("step", {"x": [1, OrderedDict(y=2.5)]}),
        *(TensorItem(k, tuple(values[k].shape), (0,), lazy[k]) for k in ("fp8", "flags")),
        TensorItem("scalar", (), (), lazy["scalar"]),
    ]
    second = [
        TensorItem("rows", (6, 4), (2, 0), lazy["rows"].narrow(0, 2, 6)),
        *(
            TensorItem("blocks", (4, 6), (r, c), lazy["blocks"].narrow(0, r, r + 2).narrow(1, c, e))
            for r, c, e in ((0, 4, 6), (2, 0, 4), (0, 0, 4), (2, 4, 6))
        ),
        *(
            TensorItem(k, tuple(values[k].shape), (0, 0), lazy[k])
            for k in ("turned", "empty", "parameter")
        ),
        ObjectItem("layer._extra_state/shard_0_1", [Filled("uint8", (0,))]),
    ]
    plans = dcp.plan_directory({"__0_0.distcp": first, "__1_0.distcp": second, "none": []})
    written(tmp_path, execute, plans, files)
    return plans


def test_torch_loads_what_was_planned(planned, values, tmp_path, same):
    target = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in values.items()}
    target |= {"step": None, "layer._extra_state/shard_0_1": None}
    torch_dcp.load(target, checkpoint_id=tmp_path, no_dist=True)
    assert all(same(target[key], values[key]) for key in values)
    assert target["step"] == {"x": [1, {"y": 2.5}]}
    assert [t.shape for t in target["layer._extra_state/shard_0_1"]] == [(0,)]


def test_torch_reads_the_metadata(planned, tmp_path):
    found = FileSystemReader(tmp_path).read_metadata()
    rows = found.state_dict_metadata["rows"]
    assert rows == TensorStorageMetadata(
        TensorProperties(dtype=torch.bfloat16),
        torch.Size([6, 4]),
        [
            ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 4])),
            ChunkStorageMetadata(torch.Size([2, 0]), torch.Size([4, 4])),
        ],
    )
    assert found.state_dict_metadata["step"] == BytesStorageMetadata()
    place = found.storage_data[MetadataIndex("rows", torch.Size([2, 0]))]
    assert (place.relative_path, place.offset) == ("__1_0.distcp", 0)
    assert next(index for index in found.storage_data if index.fqn == "step").offset is None


def test_reads_what_it_planned(planned, values, tmp_path, eager, same):
    files: list[str] = []
    metadata = dcp.read_metadata(tmp_path)
    found = dcp.tensors(metadata, files, ["blocks", "turned"])
    data = read_files(files)
    assert list(found) == ["blocks", "turned"]
    assert all(same(eager(found[key], data), values[key]) for key in found)
    assert dcp.read_object(metadata, "step", files) == {"x": [1, {"y": 2.5}]}


def test_planner_data_rebuilds_a_nested_dictionary(tmp_path, execute):
    items = [TensorItem("a.b", (2,), (0,), Filled("float32", (2,), 3.0))]
    plans = dcp.plan_directory({"f": items}, {"a.b": ("a", "b")})
    written(tmp_path, execute, plans, {})
    target = {"a": {"b": torch.zeros(2)}}
    torch_dcp.load(target, checkpoint_id=tmp_path, no_dist=True)
    assert target["a"]["b"].tolist() == [3, 3]
    assert FileSystemReader(tmp_path).read_metadata().planner_data == {"a.b": ("a", "b")}


def test_equal_checkpoints_have_equal_bytes(planned, tmp_path):
    """No save id, no absolute path: what differs between two saves of torch."""
    items = [TensorItem("w", (2,), (0,), Filled("int8", (2,))), ObjectItem("o", {"x", "y"})]
    first, second = (dcp.plan_directory({"f": list(items)}) for _ in range(2))
    assert first == second
    assert str(tmp_path).encode() not in (tmp_path / ".metadata").read_bytes()


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([((0,), 2)], "chunks hold 2 elements"),
        ([((0,), 2), ((1,), 3)], "overlap"),
        ([((0,), 2), ((3,), 2)], "outside"),
        ([((0,), 2), ((0,), 2)], "overlap"),
    ],
)
def test_incomplete_tensors_are_not_planned(items, message):
    entries = [TensorItem("w", (4,), o, Filled("int8", (n,))) for o, n in items]
    with pytest.raises(PlanError, match=message):
        dcp.plan_directory({"f": entries})


@pytest.mark.parametrize("drop", [0, 3, 6])
def test_incomplete_directories_are_not_read(planned, tmp_path, drop):
    name = "__1_0.distcp"
    metadata = dcp.read_metadata(tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) - 1 - drop * 1000])
    with pytest.raises(FormatError, match=r"__1_0\.distcp.*truncated"):
        dcp.read_object(metadata, "layer._extra_state/shard_0_1", [])
    (tmp_path / name).unlink()
    with pytest.raises(FormatError, match=r"__1_0\.distcp: cannot be opened"):
        dcp.tensors(metadata, [])


def test_items_of_one_shape_may_differ_in_layout(tmp_path, eager, same, execute):
    """Equal shapes, lengths and end records, but other strides: no layout may be reused."""
    tensors = {"a": torch.randn(3, 3), "b": torch.randn(3, 3).t(), "c": torch.randn(3, 3)}
    torch_dcp.save(tensors, checkpoint_id=tmp_path, no_dist=True)
    files: list[str] = []
    found = dcp.tensors(dcp.read_metadata(tmp_path), files)
    assert isinstance(found["b"], Stored)
    assert found["b"].strides == (1, 3)
    assert all(same(eager(found[key], read_files(files)), tensors[key]) for key in tensors)


def test_tilings_against_counting():
    """Random boxes, checked by painting them."""
    rng = random.Random(0)
    outcomes = set()
    for _ in range(400):
        shape = tuple(rng.randint(1, 4) for _ in range(rng.randint(1, 3)))
        boxes = cut(shape, rng)
        change = rng.random()
        if change < 0.3:
            boxes.pop(rng.randrange(len(boxes)))
        elif change < 0.6:
            boxes[rng.randrange(len(boxes))] = rng.choice(boxes)
        painted = torch.zeros(shape, dtype=torch.int64)
        for offsets, sizes in boxes:
            box = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
            painted[box] += 1
        complete = bool((painted == 1).all())
        assert (tiling.fault(shape, boxes) == "") is complete
        outcomes.add(complete)
    assert outcomes == {True, False}


def cut(shape, rng):
    boxes = [((0,) * len(shape), shape)]
    for _ in range(rng.randint(0, 5)):
        offsets, sizes = boxes.pop(rng.randrange(len(boxes)))
        axis = rng.randrange(len(shape))
        at = rng.randint(0, sizes[axis])
        low = (*sizes[:axis], at, *sizes[axis + 1 :])
        high = (*sizes[:axis], sizes[axis] - at, *sizes[axis + 1 :])
        moved = (*offsets[:axis], offsets[axis] + at, *offsets[axis + 1 :])
        boxes += [(offsets, low), (moved, high)]
    rng.shuffle(boxes)
    return boxes
