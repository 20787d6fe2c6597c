"""Loaders ask of a place what a `Location` has, and nothing more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckptx.registry import registry
from ckptx.storage.location import Location
from ckptx.testing.conversion import loaded, save
from ckptx.testing.models import messages, tiny

MEMBERS = {name for name in vars(Location) if not name.startswith("_")}


class Elsewhere(os.PathLike):
    """A place that has the members of `Location` and no other of a path's."""

    def __init__(self, path):
        self._path = Path(path)

    def __getattr__(self, name):
        if name not in MEMBERS:
            raise AttributeError(f"{name} is no member of Location")
        found = getattr(self._path, name)
        return _wrapped(found) if not callable(found) else lambda *a, **k: _wrapped(found(*a, **k))

    def __truediv__(self, name):
        return Elsewhere(self._path / name)

    def __lt__(self, other):
        return self._path < other._path

    def __eq__(self, other):
        return isinstance(other, Elsewhere) and self._path == other._path

    def __hash__(self):
        return hash(self._path)

    def __str__(self):
        return str(self._path)

    def __fspath__(self):
        return str(self._path)


def _wrapped(found):
    if isinstance(found, Path):
        return Elsewhere(found)
    if isinstance(found, str | bytes | bool | os.stat_result) or hasattr(found, "read"):
        return found
    return [Elsewhere(path) for path in found]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("hf", {}), ("hf", {"weight_files": "bin"}), ("dcp", {}), ("pytorch", {})),
        *(("core", {}), ("core", {"ckpt_format": "torch", "target_tensor_parallel_size": 2})),
        ("legacy", {}),
    ],
)
def test_loaders_need_no_more_than_a_location(name, options, tmp_path):
    model = tiny("llama")
    target = save(registry.saver(name), messages(model, tmp_path / "s"), tmp_path / "t", options)
    loader = registry.loader(name)
    place = Elsewhere(target)
    assert loader.detect(place)
    assert loaded(loader, place).keys() == loaded(loader, target).keys()


def test_every_loader_detects_by_a_location(tmp_path):
    (tmp_path / "other.txt").touch()
    for name in registry.names("loader"):
        assert not registry.loader(name).detect(Elsewhere(tmp_path))
