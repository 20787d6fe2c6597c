"""What the suites of faults share: a source, and what an undisturbed run makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from .scene import CORE, SIZES, Scene, digests


@pytest.fixture(scope="session")
def sources(tmp_path_factory, write_llama) -> tuple[Path, dict[str, str], Path]:
    """A Llama in three shards, the digests of what an undisturbed run makes of it, and that."""
    place = tmp_path_factory.mktemp("undisturbed")
    source = write_llama(place / "llama", shards=3, **SIZES)
    scene = Scene(place / "scene", source, 0)
    assert scene.run(*CORE) == 0, scene.errors
    return source, digests(scene.target), scene.target


@pytest.fixture
def scene(tmp_path, sources, request) -> Scene:
    return Scene(tmp_path / "scene", sources[0], request.node.callspec.params["seed"])
