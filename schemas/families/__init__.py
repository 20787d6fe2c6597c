"""The model families: names, config and limits of each, one file a family.

A module of a folder here that has a `FAMILY`, or several as `FAMILIES`, is found by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pkgutil import walk_packages
from types import ModuleType

from ckptx.model.family import Family
from ckptx.protocol.contracts import SideFile
from ckptx.protocol.hookspecs import hookimpl
from ckptx.schemas.conventions import transformers_memory
from ckptx.tensors.lazy import LazyTensor


def _modules() -> Iterator[ModuleType]:
    for found in walk_packages(__path__, f"{__name__}."):
        if not found.ispkg:
            yield import_module(found.name)


@hookimpl
def register_families(register: Callable[[Family], None]) -> None:
    """Register the families of this folder."""
    for module in _modules():
        for family in getattr(module, "FAMILIES", ()) or (getattr(module, "FAMILY", None),):
            if family is not None:
                register(family)


@hookimpl
def side_files(
    config: Mapping[str, object], names: Sequence[str], iteration: int | str
) -> Sequence[SideFile]:
    """Return the files that a family of this folder wants beside a model's weights."""
    wanted = (getattr(module, "side_files", None) for module in _modules())
    return [file for files in wanted if files for file in files(config, names, iteration)]


@hookimpl
def in_files(
    tensors: Mapping[str, LazyTensor], config: Mapping[str, object]
) -> Mapping[str, LazyTensor]:
    """Return tensors under the names that transformers gives them in files."""
    return transformers_memory.in_files(tensors, config)
