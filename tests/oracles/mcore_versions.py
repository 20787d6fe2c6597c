"""Other releases of megatron-core than the installed one: where they lie, and what they lack here.

Their wheels lie unpacked, a directory each, in ``megatron-core`` of the virtual environment
(``make`` puts the newest there) or where ``CKPTX_MEGATRON_CORE`` says. One that is put first on the
path goes before the installed one. From 0.17 on they ask for Python 3.12; 3.11 needs `install`.
"""

from __future__ import annotations

import importlib
import inspect
import multiprocessing
import os
import queue
import sys
import types
import typing
from functools import partial
from pathlib import Path
from typing import Any

NEWEST = "0.19.2"


def place(version: str) -> Path | None:
    """Return the directory to put first on the path, None where the release is not there."""
    home = os.environ.get("CKPTX_MEGATRON_CORE") or Path(sys.prefix) / "megatron-core"
    found = Path(home) / version
    return found if (found / "megatron" / "core").is_dir() else None


class Empty(types.ModuleType):
    """A module that has whatever is asked for."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = type(name, (), {}) if name[:1].isupper() else lambda *_, **__: None
        setattr(self, name, found)
        return found


def install() -> None:
    """Give this process what newer releases import and nothing here calls."""
    if not hasattr(typing, "override"):
        typing.override = lambda method: method  # type: ignore[attr-defined]
    # Kernels that page activations of mixtures out of a GPU's memory; they are made with triton.
    kernels = types.ModuleType("megatron.core.transformer.moe.ops.paged_stash")
    kernels.GLOBAL_BLOCK_SIZE = 1024  # type: ignore[attr-defined]
    kernels.paged_stash_copy_kernel = kernels.paged_stash_pop_kernel = None  # type: ignore[attr-defined]
    sys.modules[kernels.__name__] = kernels
    (first, *_) = importlib.import_module("megatron").__path__
    older = Path(first, "core/transformer/moe/paged_stash.py")  # in core 0.18 it makes them itself
    if older.is_file() and "\nimport triton\n" in older.read_text():
        triton, language = Empty("triton"), Empty("triton.language")
        triton.language, triton.__version__ = language, "3.4.0"  # type: ignore[attr-defined]
        sys.modules |= {one.__name__: one for one in (triton, language)}


def prepare_to_save(filesystem_async: Any) -> None:
    """Let this rank save by itself; ``filesystem_async`` is megatron's module of that name.

    Its queue server, one spawned process per rank, is not needed to carry one result: since core
    0.15 to the process itself, before that from one that it forks.
    """
    import megatron.core

    release = number(megatron.core.__version__)
    if release < (0, 11):  # before torch 2.6, whose torch.load takes no class unless it is told
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    forking = multiprocessing.get_context("fork")
    filesystem_async._results_queue = queue.Queue() if release >= (0, 15) else forking.Queue()
    if release < (0, 13):  # calls torch's function as it was before torch 2.8, or before 2.7
        from torch.distributed.checkpoint import filesystem

        transforms = [filesystem._StorageWriterTransforms()] if release < (0, 12) else []
        filesystem_async._write_item = partial(
            filesystem_async._write_item,
            *transforms,
            serialization_format=filesystem.SerializationFormat.TORCH_SAVE,
        )


def accepted(function: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return those of the keyword arguments that a function of this release has."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


def number(version: str) -> tuple[int, ...]:
    """Return the first two parts of a version.

    Examples:
        >>> number("0.12.3")
        (0, 12)
    """
    return tuple(int(part) for part in version.split(".")[:2])
