"""Objects that go from one pickle to another, without being made in between."""

from __future__ import annotations

import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from ckptx.containers import torch_zip
from ckptx.containers.carried import as_json, carried, saved
from ckptx.errors import FormatError

pytest.importorskip("torch")

import torch


def again(value, place: Path):
    """What torch loads after a value was saved by torch, read, carried and saved by ckptx."""
    source, target = place / "a.pt", place / "b.pt"
    torch.save(value, source)
    found = carried(torch_zip.read(source, 0), "here")
    target.write_bytes(saved(target.name, found, [str(source)]))
    return torch.load(target, weights_only=False)


@pytest.mark.parametrize(
    "value",
    [
        np.arange(12, dtype=np.uint32).reshape(3, 4),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.zeros((0, 3), np.int8),
        np.array([True, False]),
        np.float64(0.1),
        np.int32(-7),
        np.dtype(">i4"),
    ],
)
def test_what_numpy_has_made(value, tmp_path):
    found = again({"x": value}, tmp_path)["x"]
    assert type(found) is type(value)
    if not isinstance(value, np.dtype):
        assert found.dtype == value.dtype
    np.testing.assert_array_equal(found, value)


def test_random_states(tmp_path):
    generator = np.random.RandomState(5)
    ours = random.Random(5)
    state = {"numpy": generator.get_state(), "random": ours.getstate()}
    found = again(state, tmp_path)
    other, another = np.random.RandomState(), random.Random()
    other.set_state(found["numpy"])
    another.setstate(found["random"])
    assert other.random_sample() == generator.random_sample()
    assert another.random() == ours.random()


def test_plain_values_and_tensors(tmp_path):
    shared = torch.arange(5)
    value = {
        "nested": [(1, 2.5, None, True, b"\x00\xff", "text"), {3: {4}}],
        "ordered": OrderedDict(b=1, a=2),
        "tensors": (shared, shared[1:3], torch.zeros(0), torch.ones(2, dtype=torch.bfloat16)),
        "size": torch.Size([2, 3]),
        "dtype": torch.float16,
    }
    found = again(value, tmp_path)
    for mine, theirs in zip(found.pop("tensors"), value.pop("tensors"), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
    assert found == value
    assert list(found["ordered"]) == ["b", "a"]
    assert type(found["size"]) is torch.Size


@pytest.mark.parametrize(
    ("value", "name"), [(torch.device("cpu"), "torch.device"), ({1: [complex(1, 2)]}, "complex")]
)
def test_what_cannot_be_carried_is_named(value, name, tmp_path):
    torch.save({"x": value}, tmp_path / "a.pt")
    with pytest.raises(FormatError, match=f"here: holds a {name}, which cannot be carried"):
        carried(torch_zip.read(tmp_path / "a.pt", 0), "here")


def test_few_bytes_that_are_many_values():
    value: list[object] = [1]
    for _ in range(60):
        value = [value, value]
    with pytest.raises(FormatError, match="holds more than 1000000 values"):
        carried(value, "here")
    value.append(value)
    with pytest.raises(FormatError, match="here: "):
        carried([value], "here")
    itself: list[object] = []
    itself.append(itself)
    with pytest.raises(FormatError, match="nested too deeply, or hold themselves"):
        carried(itself, "here")


def test_json():
    assert as_json({"a": (1, [None, 2.5]), 3: "x"}) == {"a": [1, [None, 2.5]], "3": "x"}
    for value in (b"", {1.5: 1}, object()):
        with pytest.raises(TypeError):
            as_json(value)
