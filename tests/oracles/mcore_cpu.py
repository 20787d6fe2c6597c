"""Make ``import megatron.core`` (0.16.1) build, run, save and load models without CUDA.

Megatron asks ``torch.cuda`` for a device and for RNG states in places no option reaches. `install`
redirects those few questions to the CPU. It changes no numerics and nothing megatron writes.
The patches are process wide: call `install` only in a process that is there to run megatron.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import types
import warnings
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_installed: list[bool] = []


def _on_cpu(value: torch.Tensor | torch.nn.Module, *_: object, **__: object) -> Any:
    return value


def _nothing(*_: object, **__: object) -> None:
    return None


class _Idle:
    """Stand for a CUDA stream or event: nothing runs beside the CPU, so nothing is waited for."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., _Idle]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Idle  # record_event() returns an event, the rest nothing anybody looks at


def _uncompiled(function: Callable[..., Any] | None = None, *_: object, **__: object) -> Any:
    """Stand for torch.compile and torch.jit.script, with and without decorator arguments."""
    return _uncompiled if function is None else function


def _rng_state(*_: object, **__: object) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *_: object, **__: object) -> None:
    torch.set_rng_state(new_state)


def _gmm(rows: torch.Tensor, matrices: torch.Tensor, sizes: torch.Tensor, trans_b: bool) -> Any:
    """Stand for ``grouped_gemm.ops.gmm``: the rows of every expert times its matrix."""
    assert not trans_b  # megatron never asks for it
    parts = torch.split(rows, [int(size) for size in sizes])
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)])


def _register_grouped_gemm() -> None:
    """Put a stand-in for ``grouped_gemm``, a CUDA extension, into ``sys.modules``."""
    module = types.ModuleType("grouped_gemm")
    module.ops = types.SimpleNamespace(gmm=_gmm)  # type: ignore[attr-defined] # all that is used
    sys.modules["grouped_gemm"] = module


def install(*, transformer_engine: bool = False) -> None:
    """Patch torch for CPU-only megatron; do it before the first megatron import.

    Idempotent. With ``transformer_engine`` the stand-in of `te_stand_in` is importable as
    ``transformer_engine``, for the life of the process: a process has it or has it not.

    Raises:
        RuntimeError: megatron is already imported, or a second call asks for the other TE setting.
    """
    if _installed:
        if _installed[0] != transformer_engine:
            raise RuntimeError(
                "one process cannot run megatron both with and without the TE stand-in"
            )
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("call tests.oracles.mcore_cpu.install() before importing megatron.core")

    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment, return-value] # a device is what callers pass it as
    for name in ("synchronize", "set_device", "empty_cache", "manual_seed", "manual_seed_all"):
        setattr(torch.cuda, name, _nothing)
    torch.cuda.get_rng_state = _rng_state  # type: ignore[assignment] # see module docstring
    torch.cuda.set_rng_state = _set_rng_state  # type: ignore[assignment] # see module docstring
    torch.cuda.Stream = torch.cuda.Event = _Idle  # type: ignore[misc, assignment] # see module docstring
    torch.cuda.current_stream = _Idle  # type: ignore[assignment] # see module docstring
    torch.cuda.stream = contextlib.nullcontext  # type: ignore[assignment, misc] # see module docstring
    torch.Tensor.cuda = _on_cpu  # type: ignore[method-assign] # see module docstring
    torch.nn.Module.cuda = _on_cpu  # type: ignore[method-assign] # see module docstring
    torch.compile = _uncompiled  # type: ignore[assignment] # see module docstring
    torch.jit.script = _uncompiled  # type: ignore[assignment] # see module docstring

    if transformer_engine:
        from . import te_stand_in

        te_stand_in.register()

    _register_grouped_gemm()
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = _rng_state
    random._set_cuda_rng_state = _set_rng_state
    _installed.append(transformer_engine)
