"""Other releases of megatron-core than the installed one: where they lie, and what they lack here.

Their wheels lie unpacked, a directory each, in ``megatron-core`` of the virtual environment
(``make`` puts the newest there) or where ``CKPTX_MEGATRON_CORE`` says. One that is put first on the
path goes before the installed one. From 0.17 on they ask for Python 3.12; 3.11 needs `install`.
"""

from __future__ import annotations

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


def install() -> None:
    """Give this process what newer releases import and nothing here calls."""
    if not hasattr(typing, "override"):
        typing.override = lambda method: method  # type: ignore[attr-defined]
    # Kernels that page activations of mixtures out of a GPU's memory; they are made with triton.
    kernels = types.ModuleType("megatron.core.transformer.moe.ops.paged_stash")
    kernels.GLOBAL_BLOCK_SIZE = 1024  # type: ignore[attr-defined]
    kernels.paged_stash_copy_kernel = kernels.paged_stash_pop_kernel = None  # type: ignore[attr-defined]
    sys.modules[kernels.__name__] = kernels


def prepare_to_save(filesystem_async: Any) -> None:
    """Let this rank save by itself; ``filesystem_async`` is megatron's module of that name.

    Its queue server, one spawned process per rank, is not needed to carry one result: since core
    0.15 to the process itself, before that from one that it forks.
    """
    import megatron.core

    release = number(megatron.core.__version__)
    forking = multiprocessing.get_context("fork")
    filesystem_async._results_queue = queue.Queue() if release >= (0, 15) else forking.Queue()
    if release < (0, 13):  # calls torch's function as it was before torch 2.8
        from torch.distributed.checkpoint.filesystem import SerializationFormat

        filesystem_async._write_item = partial(
            filesystem_async._write_item, serialization_format=SerializationFormat.TORCH_SAVE
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
