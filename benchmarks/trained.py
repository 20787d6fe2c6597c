"""Checkpoints of training frameworks, made of a Hugging Face model with the writers of the tests.

They hold weights and no moments of an optimizer, which a copy and DeepSpeed's own script would have
to read, and ckptx would not: the comparison favours the others.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from tests.formats import zero_by_hand
from tests.oracles import fsdp

RANKS = 4


def zero(model: Path, target: Path, stage: int) -> Path:
    """Write a model as ZeRO 2 or 3 of four ranks saves it, unless it is there; return it."""
    if not target.exists():
        state = load_file(_weights(model))
        # Of the random bits some are no numbers, and these have several forms in bfloat16.
        masters = {name: tensor.float().nan_to_num(0.0) for name, tensor in state.items()}
        zero_by_hand.write(target, masters, stage, RANKS)
        (target / "config.json").write_bytes((model / "config.json").read_bytes())
    return target


def sharded(model: Path, target: Path) -> Path:
    """Write a model as FSDP 2 of four ranks saves it, unless it is there; return it."""
    if not target.exists():
        fsdp.run(_save, RANKS, _weights(model), target)
        (target / "config.json").write_bytes((model / "config.json").read_bytes())
    return target


def _weights(model: Path) -> Path:
    return model / "model.safetensors"


def _save(weights: Path, target: Path) -> None:
    """Save as one rank: of every tensor a share of its rows."""
    mesh, rank = init_device_mesh("cpu", (RANKS,)), dist.get_rank()
    state = {}
    with safe_open(weights, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - the file is no mapping
            rows = file.get_slice(name)
            size = rows.get_shape()[0]
            step = -(-size // RANKS)
            own = rows[min(rank * step, size) : min((rank + 1) * step, size)]
            shape = torch.Size(rows.get_shape())
            stride = torch.empty(shape, device="meta").stride()
            state[name] = DTensor.from_local(
                own.clone(), mesh, [Shard(0)], shape=shape, stride=stride
            )
    dcp.save({"model": state}, checkpoint_id=str(target))
