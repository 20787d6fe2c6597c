"""The hooks of ckptx: how a module offers its loaders, savers and model families.

A plugin is a module that an entry point of the group ``ckptx`` names (``loader_X``, ``saver_X``,
``schema_X``) and that implements one or more of these hooks:

    from ckptx.protocol.hookspecs import hookimpl

    @hookimpl
    def register_loaders(register):
        register(NpzLoader())
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

from ckptx.protocol.contracts import Loader, Saver, SideFile

if TYPE_CHECKING:
    from ckptx.model.family import Family
    from ckptx.tensors.lazy import LazyTensor

PROJECT = "ckptx"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_loaders(register: Callable[[Loader], None]) -> None:
    """Call ``register`` with each loader; the module of ``loader_X`` registers one named X."""


@hookspec
def register_savers(register: Callable[[Saver], None]) -> None:
    """Call ``register`` with each saver; the module of ``saver_X`` registers one named X."""


@hookspec
def register_families(register: Callable[[Family], None]) -> None:
    """Call ``register`` with each family of the module; its ``name`` is unique (``"llama"``)."""


@hookspec
def side_files(
    config: Mapping[str, Any], names: Sequence[str], iteration: int | str
) -> Sequence[SideFile]:
    """Return the files that a model of this config wants beside its weights; none of any other.

    Modules of `schema_X` implement it, for models that a framework loads in parts. It is asked when
    a model whose tensors travel by ``names`` becomes a Hugging Face directory. ``iteration`` is the
    number of the step, or ``"release"``.
    """
    return ()


@hookspec
def in_files(
    tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]
) -> Mapping[str, LazyTensor] | None:
    """Return the tensors of a model under the names of its files, None for a model unknown here.

    What is in memory may have other names there, experts together among them; tensors that have
    the names of files stay. Models that no family describes are compared by these names.
    """
