"""The hooks of ckptx: how a module offers its loaders, savers and layouts.

A plugin is a module that an entry point of the group ``ckptx`` names (``loader_X``, ``saver_X``,
``schema_X``) and that implements one or more of these hooks:

    from ckptx.hookspecs import hookimpl

    @hookimpl
    def register_loaders(register):
        register(NpzLoader())
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pluggy

from ckptx.plugin import Loader, Saver

PROJECT = "ckptx"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_loaders(register: Callable[[Loader], None]) -> None:
    """Call ``register`` with each loader of the module; entry ``loader_X`` registers one named X."""


@hookspec
def register_savers(register: Callable[[Saver], None]) -> None:
    """Call ``register`` with each saver of the module; entry ``saver_X`` registers one named X."""


@hookspec
def register_layouts(register: Callable[[Any], None]) -> None:
    """Call ``register`` with each layout of the module; its ``name`` is unique (``"hf/llama"``)."""
