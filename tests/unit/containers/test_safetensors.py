from __future__ import annotations

import json
import struct

import pytest
from safetensors import safe_open

from ckptx.containers import safetensors
from ckptx.errors import PlanError
from ckptx.tensors.lazy import Filled

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file, save_file

DTYPES = [getattr(torch, name) for name in safetensors.DTYPES.values()]


@pytest.fixture
def values():
    torch.manual_seed(0)
    ordered = sorted(DTYPES, key=lambda dtype: -dtype.itemsize)
    tensors = {f"{i:02} {dtype}": torch.randn(3, 5).to(dtype) for i, dtype in enumerate(ordered)}
    return tensors | {"scalar é\n": torch.tensor(True), "vide": torch.zeros(0, 4).bool()}


def test_reads_what_the_library_wrote(values, tmp_path, eager, same):
    path = tmp_path / "a.safetensors"
    save_file(values, path, metadata={"format": "pt", "é": "1"})
    found = safetensors.tensors(path, 7)
    files = {7: path.read_bytes()}
    assert set(found) == set(values)
    assert all(same(eager(found[name], files), values[name]) for name in values)
    assert safetensors.read_header(path).metadata == {"format": "pt", "é": "1"}


def test_the_library_reads_what_was_planned(values, tmp_path, execute, spool, same):
    lazy, files = spool(dict(reversed(values.items())))
    path = tmp_path / "a.safetensors"
    path.write_bytes(execute(safetensors.plan_file(path.name, lazy), files))
    found = load_file(path)
    assert found.keys() == values.keys()
    assert all(same(found[name], values[name]) for name in values)
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_bytes_are_those_of_the_library(values, tmp_path, execute, spool):
    path = tmp_path / "a.safetensors"
    save_file(values, path, metadata={"format": "pt"})
    order = safetensors.tensors(path, 0)
    lazy, files = spool({name: values[name] for name in order})
    assert execute(safetensors.plan_file("a", lazy), files) == path.read_bytes()


def test_source_order_is_kept(tmp_path, execute, spool):
    lazy, files = spool({"z": torch.ones(1), "a": torch.ones(2, dtype=torch.int64)})
    path = tmp_path / "a.safetensors"
    path.write_bytes(execute(safetensors.plan_file("a", lazy), files))
    assert list(safetensors.tensors(path, 0)) == ["z", "a"]


def test_a_name_that_is_no_unicode_is_refused():
    with pytest.raises(PlanError, match="Unicode"):
        safetensors.plan_file("a", {"\ud800": Filled("float32", (1,))})


def test_null_metadata_and_unknown_fields_are_accepted_as_upstream(tmp_path):
    entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "extra": 1}
    header = json.dumps({"__metadata__": None, "a": entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\7")
    assert load_file(path)["a"].tolist() == [7]
    assert safetensors.tensors(path, 0)["a"].offset == 8 + len(header)
