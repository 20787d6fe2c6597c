"""The hooks of ckptx: how a module offers its loaders, savers and model families.

A plugin is a module that an entry point of the group ``ckptx`` names (``loader_X``, ``saver_X``,
``schema_X``) and that implements one or more of these hooks:

    from ckptx.hookspecs import hookimpl

    @hookimpl
    def register_loaders(register):
        register(NpzLoader())
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pluggy

from ckptx.plugin import Loader, Saver

if TYPE_CHECKING:
    from ckptx.schema import Family

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
