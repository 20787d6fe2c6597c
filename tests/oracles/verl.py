"""Models saved as verl saves them: each rank its share of the state dict, in a file of its own.

Source: volcengine/verl verl/utils/checkpoint/fsdp_checkpoint_manager.py @ 01ee5e0.
"""

from __future__ import annotations

import json
import random
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardedStateDictConfig,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import AutoModelForCausalLM

from .fsdp import run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_COLUMN_WISE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_ROW_WISE = ("o_proj", "down_proj")


def save(model: Path, target: Path, world: int, how: str = "fsdp") -> None:
    """Shard a Hugging Face model over ``world`` ranks and save what each has below ``target``.

    ``how`` is a key of `SHARDINGS`. As in verl, the config lies beside.
    """
    target.mkdir(parents=True)
    run(_save, world, model, target, how)
    version = 1 if how.startswith("fsdp1") else 2
    said = {"FSDP_version": version, "world_size": world}
    (target / "fsdp_config.json").write_text(json.dumps(said))
    beside = target / "huggingface"
    beside.mkdir()
    for name in ("config.json", "generation_config.json"):
        if (model / name).exists():
            (beside / name).write_bytes((model / name).read_bytes())


def _save(path: Path, target: Path, how: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    rank, world = dist.get_rank(), dist.get_world_size()
    place = f"world_size_{world}_rank_{rank}.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP 1 and ShardedTensor are deprecated
        state = SHARDINGS[how](model).state_dict()
        torch.save(state, target / f"model_{place}")
    torch.save({"state": {}, "param_groups": []}, target / f"optim_{place}")
    torch.save(extra_state(rank), target / f"extra_state_{place}")


def extra_state(rank: int) -> dict[str, Any]:
    """What verl keeps of a rank: a real scheduler's state and that of every random generator."""
    torch.manual_seed(rank)
    numpy.random.seed(rank)
    random.seed(rank)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_warmup, steps=3))
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    rng = {
        "cpu": torch.get_rng_state(),
        "numpy": numpy.random.get_state(),
        "random": random.getstate(),
    }
    return {"lr_scheduler": scheduler.state_dict(), "rng": rng}


def _warmup(step: int, *, steps: int) -> float:
    return min(1.0, step / steps)


def _fully_sharded(
    model: torch.nn.Module, mesh: DeviceMesh, **placement: Callable[..., Shard]
) -> torch.nn.Module:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **placement)
    return fully_shard(model, mesh=mesh, **placement)


def _fsdp(model: torch.nn.Module) -> torch.nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    return _fully_sharded(model, mesh)


def _unnamed(model: torch.nn.Module) -> torch.nn.Module:
    return _fully_sharded(model, init_device_mesh("cpu", (dist.get_world_size(),)))


def _columns(model: torch.nn.Module) -> torch.nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    return _fully_sharded(
        model, mesh, shard_placement_fn=lambda parameter: Shard(parameter.ndim - 1)
    )


def _older_mesh(model: torch.nn.Module) -> torch.nn.Module:
    """As older torch pickles a mesh: the tensor of the ranks instead of a layout.

    Source: torch:torch/distributed/device_mesh.py @ 00131b6.
    """
    DeviceMesh.__getstate__ = lambda mesh: {
        "device_type": mesh.device_type,
        "mesh": mesh.mesh,
        "mesh_dim_names": mesh.mesh_dim_names,
        "_coordinate_on_dim": mesh.get_coordinate(),
    }
    return _fsdp_tp(model)


class _WithPartial(torch.nn.Module):
    """A state dict with a tensor that ranks have still to sum up."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def state_dict(self) -> dict[str, object]:  # type: ignore[override]
        state = self.model.state_dict()
        mesh = state["model.norm.weight"].device_mesh
        local = torch.ones(64)
        state["model.norm.weight"] = DTensor.from_local(local, mesh, [Partial()])
        return state


def _partial(model: torch.nn.Module) -> torch.nn.Module:
    return _WithPartial(_fsdp(model))


def _hybrid_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("ddp", "fsdp"))


def _hybrid(model: torch.nn.Module) -> torch.nn.Module:
    return _fully_sharded(model, _hybrid_mesh())


def _tensor_parallel(model: torch.nn.Module, mesh: DeviceMesh) -> torch.nn.Module:
    for layer in model.model.layers:
        plan = {}
        for name, _ in layer.named_modules():
            last = name.rpartition(".")[2]
            if last in _COLUMN_WISE:
                plan[name] = ColwiseParallel()
            elif last in _ROW_WISE:
                plan[name] = RowwiseParallel()
        parallelize_module(layer, mesh, plan)
    return model


def _tp(model: torch.nn.Module) -> torch.nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    return _tensor_parallel(model, mesh)


def _fsdp_tp(model: torch.nn.Module) -> torch.nn.Module:
    shape = dist.get_world_size() // 2, 2
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("fsdp", "tp"))
    return _fully_sharded(_tensor_parallel(model, mesh["tp"]), mesh["fsdp"])


def _hybrid_tp(model: torch.nn.Module) -> torch.nn.Module:
    shape = 2, dist.get_world_size() // 4, 2
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("ddp", "fsdp", "tp"))
    return _fully_sharded(_tensor_parallel(model, mesh["tp"]), mesh["ddp", "fsdp"])


def _version_1(model: torch.nn.Module, mesh: DeviceMesh | None) -> torch.nn.Module:
    hybrid = mesh is not None and mesh.ndim == 2
    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy([type(model.model.layers[0])]),
        device_id=torch.device("cpu"),
        sharding_strategy=(
            ShardingStrategy.HYBRID_SHARD if hybrid else ShardingStrategy.FULL_SHARD
        ),
        device_mesh=mesh,
    )
    FullyShardedDataParallel.set_state_dict_type(
        wrapped, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(offload_to_cpu=True)
    )
    return wrapped


def _fsdp1(model: torch.nn.Module) -> torch.nn.Module:
    return _version_1(model, None)


def _fsdp1_mesh(model: torch.nn.Module) -> torch.nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    return _version_1(model, mesh)


def _fsdp1_hybrid(model: torch.nn.Module) -> torch.nn.Module:
    return _version_1(model, _hybrid_mesh())


SHARDINGS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "fsdp": _fsdp,
    "unnamed": _unnamed,
    "columns": _columns,
    "older mesh": _older_mesh,
    "partial": _partial,
    "ddp x fsdp": _hybrid,
    "tp": _tp,
    "fsdp x tp": _fsdp_tp,
    "ddp x fsdp x tp": _hybrid_tp,
    "fsdp1": _fsdp1,
    "fsdp1-mesh": _fsdp1_mesh,
    "fsdp1-ddp x fsdp": _fsdp1_hybrid,
}
