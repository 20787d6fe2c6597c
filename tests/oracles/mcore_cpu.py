"""Megatron on the CPU, as ckptx itself runs it, with stand-ins for two CUDA extensions."""

from __future__ import annotations

import sys
import types
from typing import Any

import torch

from ckptx.verification.frameworks import megatron_cpu

from . import mcore_versions


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

    With ``transformer_engine`` the stand-in of `te_stand_in` is importable as
    ``transformer_engine``, for the life of the process: a process has it or has it not.
    """
    if transformer_engine:
        from . import te_stand_in

        te_stand_in.register()
    _register_grouped_gemm()
    mcore_versions.install()
    megatron_cpu.install(hidden=() if transformer_engine else ("transformer_engine", "apex"))
