"""Make ``import megatron.core`` (0.16.1) build, run, save and load models without CUDA.

Megatron asks ``torch.cuda`` for a device and for RNG states in places no option reaches. `install`
redirects those few questions to the CPU. It changes no numerics and nothing megatron writes.
The patches are process wide: call `install` only in a process that is there to run megatron.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

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


def install(*, hidden: Sequence[str] = ("transformer_engine", "apex")) -> None:
    """Patch torch for CPU-only megatron; do it before the first megatron import. Idempotent.

    Packages that are ``hidden`` cannot be imported any more, installed or not: their kernels need
    CUDA, and without them megatron falls back to torch, the same on every machine.

    Raises:
        RuntimeError: megatron is already imported.
    """
    if _installed:
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError(f"call {__name__}.install() before importing megatron")
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment] # what import reads as: not there
    cpu = torch.device("cpu")
    cuda: Any = torch.cuda  # none of this is what its annotations say
    cuda.current_device = lambda: cpu
    for name in ("synchronize", "set_device", "empty_cache", "manual_seed", "manual_seed_all"):
        setattr(cuda, name, _nothing)
    cuda.get_rng_state = _rng_state
    cuda.set_rng_state = _set_rng_state
    cuda.Stream = cuda.Event = cuda.current_stream = _Idle
    cuda.stream = contextlib.nullcontext
    for owner in (torch.Tensor, torch.nn.Module):
        owner.cuda = _on_cpu  # type: ignore[method-assign, assignment] # as above
    patched: Any = torch
    patched.compile = patched.jit.script = _uncompiled

    logging.getLogger("megatron").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = _rng_state
    random._set_cuda_rng_state = _set_rng_state
    _installed.append(True)
