"""Models under FSDP 2 on the CPU, saved and loaded by `torch.distributed.checkpoint` itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def save(
    model: Path,
    target: Path,
    world: int,
    container: tuple[str, ...] = (),
    optimizer: bool = True,
) -> None:
    """Shard a Hugging Face model over ``world`` ranks and save it below a container.

    With a container the state of an ``optimizer`` after one step is saved beside it.
    """
    run(_save, world, model, target, container, optimizer)


def save_sharded(model: Path, target: Path, world: int, how: str) -> None:
    """Shard a model as ``tests.oracles.verl.SHARDINGS[how]`` does and save its state dict."""
    run(_save_sharded, world, model, target, how)


def save_safetensors(model: Path, target: Path, world: int, consolidate: bool = False) -> None:
    """Shard a model over ``world`` ranks and save it by `HuggingFaceStorageWriter`."""
    run(_save_safetensors, world, model, target, consolidate)


def load(
    checkpoint: Path, model: Path, world: int, container: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """Load a checkpoint into a sharded model that held NaN, and return its whole state dict."""
    gathered = checkpoint.parent / f"{checkpoint.name}-gathered.pt"
    run(_load, world, checkpoint, model, container, gathered)
    found: dict[str, torch.Tensor] = torch.load(gathered)
    return found


def run(work: Callable[..., None], world: int, *args: Any) -> None:
    """Run ``work`` in processes of a gloo group."""
    store = next(a for a in args if hasattr(a, "parent")).parent / f"store-{id(args)}"
    mp.start_processes(_rank, (work, world, str(store), args), world, start_method="fork")
    store.unlink(missing_ok=True)


def _rank(rank: int, work: Callable[..., None], world: int, store: str, args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    work(*args)
    dist.barrier()
    dist.destroy_process_group()


def _sharded(path: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _nested(state: dict[str, Any], container: tuple[str, ...]) -> dict[str, Any]:
    for word in reversed(container):
        state = {word: state}
    return state


def _save(path: Path, target: Path, container: tuple[str, ...], moments: bool) -> None:
    model = _sharded(path)
    state = _nested(get_model_state_dict(model), container)
    if container and moments:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
        model(torch.arange(8)[None]).logits.float().sum().backward()
        optimizer.step()
        found = {str(i): s for i, s in enumerate(optimizer.state.values())}
        state["optimizer"] = {"state": found, "param_groups": [{"lr": 0.0}]}
    dcp.save(state, checkpoint_id=str(target))


def _save_sharded(path: Path, target: Path, how: str) -> None:
    from . import verl  # which imports this module

    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    dcp.save(verl.SHARDINGS[how](model).state_dict(), checkpoint_id=str(target))


def _save_safetensors(path: Path, target: Path, consolidate: bool) -> None:
    state = get_model_state_dict(_sharded(path))
    writer = HuggingFaceStorageWriter(
        str(target), save_distributed=True, enable_consolidation=consolidate
    )
    dcp.save(state, storage_writer=writer)


def _load(checkpoint: Path, path: Path, container: tuple[str, ...], gathered: Path) -> None:
    model = _sharded(path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    state = get_model_state_dict(model)
    dcp.load(_nested(state, container), checkpoint_id=str(checkpoint))
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        torch.save({name: tensor.clone() for name, tensor in whole.items()}, gathered)
