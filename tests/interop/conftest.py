from __future__ import annotations

from functools import cache

import pytest

from . import experts
from .adapted import BASES
from .conversion import FAMILIES, Source

pytest.importorskip("megatron.core")


@pytest.fixture(scope="session")
def source_of(tmp_path_factory):
    """The model of a family, written once."""

    @cache
    def written(name: str) -> Source:
        directory = tmp_path_factory.mktemp(name) / "hf"
        write, overrides = {**FAMILIES, **experts.FAMILIES, **experts.LATENT}[name]
        return Source(name, directory, write(directory, **overrides))

    return written


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    @cache
    def written(name):
        directory = tmp_path_factory.mktemp(name) / "base"
        write, overrides = BASES[name]
        write(directory, **overrides)
        return directory

    return written
