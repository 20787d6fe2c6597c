from __future__ import annotations

import argparse
import io
import struct
import zipfile
from collections import OrderedDict

import pytest

from ckptx.containers import torch_zip, zip_archive
from ckptx.containers.pickle_values import TorchDtype, TorchSize
from ckptx.containers.zip_archive import ArchiveWriter, NewMember
from ckptx.errors import PlanError
from ckptx.storage.file_plan import Crc32, FilePlan
from ckptx.storage.source_file import SourceFile
from ckptx.tensors.dtypes import ITEMSIZE
from ckptx.tensors.lazy import Filled, Stored

pytest.importorskip("torch")

import torch

DTYPES = [getattr(torch, name) for name in ITEMSIZE]


def tensor(dtype, *shape):
    return torch.randn(shape, dtype=torch.complex64 if dtype.is_complex else None).to(dtype)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_reads_what_torch_wrote(tmp_path, eager, same):
    flat = torch.randn(100)
    value = {
        "dtypes": {str(dtype): tensor(dtype, 2, 3) for dtype in DTYPES},
        "views": [flat[3:9].view(2, 3), flat[50:], flat[::7], flat.view(4, 25).t(), flat[5]],
        "expanded": torch.ones(1).expand(3, 4),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "ordered": OrderedDict(a=torch.ones(2), b=({"c": torch.zeros(1)},)),
        "namespace": argparse.Namespace(t=torch.ones(3), dtype=torch.float16),
    }
    path = tmp_path / "a.pt"
    torch.save(value, path)
    files = {5: path.read_bytes()}
    found = torch_zip.read(path, 5)

    def compare(lazy, real):
        if isinstance(real, torch.Tensor):
            assert isinstance(lazy, Stored)
            assert same(eager(lazy, files), real)
        elif isinstance(real, dict):
            assert list(lazy) == list(real)
            for key in real:
                compare(lazy[key], real[key])
        elif isinstance(real, list | tuple):
            assert type(lazy) is type(real)
            for one, other in zip(lazy, real, strict=True):
                compare(one, other)
        elif isinstance(real, argparse.Namespace):
            compare(vars(lazy), vars(real))
        else:
            assert (lazy, real) == (TorchDtype("float16"), torch.float16)

    compare(found, value)


def test_views_of_one_storage_are_extents_of_it(tmp_path):
    flat = torch.randn(10)
    torch.save([flat, flat[4:], flat.view(2, 5).t()], tmp_path / "a.pt")
    whole, part, turned = torch_zip.read(tmp_path / "a.pt", 0)
    assert part.offset == whole.offset + 16
    assert (turned.offset, turned.strides) == (whole.offset, (1, 5))


def test_older_layouts_are_read(tmp_path, eager, same):
    """Files of torch 1.6 to 2.x: other alignment, no byteorder, no dot files."""
    path = tmp_path / "a.pt"
    value = torch.randn(3)
    torch.save({"a": value}, path)
    with zipfile.ZipFile(path) as new, zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for name in ("a/data.pkl", "a/data/0", "a/version"):
            old.writestr(name.replace("a/", "archive/", 1), new.read(name))
    found = torch_zip.read(tmp_path / "old.pt", 0)["a"]
    assert same(eager(found, {0: (tmp_path / "old.pt").read_bytes()}), value)


def test_torch_reads_what_was_planned(tmp_path, execute, spool, same):
    values = {str(dtype): tensor(dtype, 3, 4) for dtype in DTYPES}
    values |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(1.5)}
    lazy, files = spool(values)
    path = tmp_path / "mp_rank.00.pt"
    args = argparse.Namespace(layers=2, dtype=TorchDtype("bfloat16"), sizes=[TorchSize((1,))])
    graph = {"model": OrderedDict(lazy), "tied": lazy["scalar"], "args": args, "iteration": 7}
    path.write_bytes(execute(torch_zip.plan_file(f"x/{path.name}", graph), files))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist()[0] == "mp_rank.00/data.pkl"
    for mmap in (False, True):
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, weights_only=True, mmap=mmap)
        assert list(found["model"]) == list(values)
        assert all(same(found["model"][name], values[name]) for name in values)
        tied = found["tied"].untyped_storage().data_ptr()
        assert tied == found["model"]["scalar"].untyped_storage().data_ptr()
        assert vars(found["args"]) == {
            "layers": 2,
            "dtype": torch.bfloat16,
            "sizes": [torch.Size([1])],
        }


def test_equal_plans_have_equal_bytes(execute, spool):
    lazy, files = spool({"a": torch.ones(3)})
    plans = [torch_zip.plan_file("a.pt", {"m": dict(lazy), "s": {"x", "y"}}) for _ in range(2)]
    assert execute(plans[0], files) == execute(plans[1], files)


def test_archive_layout_is_byte_for_byte_that_of_torch(tmp_path):
    path = tmp_path / "some.name.pt"
    torch.save({"a": torch.randn(3, 4), "b": torch.zeros(0), "c": torch.ones(2).bool()}, path)
    writer = ArchiveWriter("some.name")
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            data = archive.read(name)
            writer.add(NewMember(name.removeprefix("some.name/"), len(data), data))
    size, regions = writer.finish()
    assert b"".join(region.content for region in regions) == path.read_bytes()
    assert size == path.stat().st_size


def test_members_beyond_4_gib_use_zip64(tmp_path):
    """A sparse file: the payload of the first tensor is a hole, everything around it is real."""
    big = Filled("uint8", (zip_archive.LIMIT32 + 100,))
    small = Filled("float32", (3,), 0.0)
    plan = torch_zip.plan_file("big.pt", {"big": big, "small": small})
    path = tmp_path / "big.pt"
    write_sparse(path, plan)
    with zipfile.ZipFile(path) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        assert archive.read("big/version") == b"3\n"
    assert sizes["big/data/0"] == big.nbytes
    found = torch.load(path, weights_only=True, mmap=True)
    assert found["big"].shape == big.shape
    assert found["small"].tolist() == [0, 0, 0]
    lazy = torch_zip.read(path, 0)
    assert lazy["big"].offset % 64 == 0
    assert lazy["small"].offset > zip_archive.LIMIT32
    # As torch 2.13 writes it: the local header does not know the stored size.
    data = span(path, 0, 2000)
    header = data.index(b"big/data/0")
    field = struct.pack("<2H2Q", 1, 16, big.nbytes, 0)
    assert data[header + 10 : header + 10 + len(field)] == field


def span(path, start, size):
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def write_sparse(path, plan: FilePlan) -> None:
    with path.open("wb") as file:
        for region in plan.regions:
            file.seek(region.offset)
            if isinstance(region.content, bytes):
                file.write(region.content)
        file.truncate(plan.size)


def test_crc_regions_name_their_tensor():
    plan = torch_zip.plan_file("a.pt", [Filled("float32", (2,)), Filled("int8", (5,))])
    tensors = [i for i, region in enumerate(plan.regions) if isinstance(region.content, Filled)]
    named = [r.content.region for r in plan.regions if isinstance(r.content, Crc32)]
    assert sorted(named) == sorted(tensors * 2)  # data descriptor and central directory


@pytest.mark.parametrize("shape", [(3, 4), (), (0, 2), (1,), (2, 1, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dcp_items_are_those_of_torch(dtype, shape, same):
    value = tensor(dtype, *shape)
    stream = io.BytesIO()
    torch.save(value, stream)
    envelope = torch_zip.plan_item(str(dtype).removeprefix("torch."), shape)
    flat = value.reshape(-1)
    payload = flat.view(torch.uint8).numpy().tobytes() if value.numel() else b""
    item = envelope.prefix + payload + envelope.suffix
    assert len(item) == len(envelope.prefix) + envelope.nbytes + len(envelope.suffix)
    assert not len(envelope.prefix) % 64 or not value.numel()
    ours, theirs = (zipfile.ZipFile(io.BytesIO(data)) for data in (item, stream.getvalue()))
    assert ours.namelist() == theirs.namelist()
    assert same(torch.load(io.BytesIO(item), weights_only=True), value)


def test_object_items():
    item = torch_zip.plan_bytes_item([Filled("uint8", (0,))])
    (found,) = torch.load(io.BytesIO(item), weights_only=True)
    assert (found.dtype, found.shape) == (torch.uint8, (0,))
    with zipfile.ZipFile(io.BytesIO(item)) as archive:
        assert archive.testzip() is None
    with pytest.raises(PlanError, match="tensor with elements"):
        torch_zip.plan_bytes_item([Filled("uint8", (1,))])


def test_reads_an_archive_inside_a_file(tmp_path, eager, same):
    path = tmp_path / "items"
    value = torch.randn(4, 3).t()
    stream = io.BytesIO()
    torch.save(value, stream)
    item = stream.getvalue()
    path.write_bytes(b"x" * 13 + item + b"y" * 5)
    with SourceFile(path) as file:
        found = torch_zip.read_open(file, 0, 13, len(item))
    assert same(eager(found, {0: path.read_bytes()}), value)
