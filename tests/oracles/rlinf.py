"""Models saved as RLinf saves them, by torch itself.

Source: RLinf/RLinf rlinf/hybrid_engines/fsdp/strategy/{base,checkpoint}.py @ a3816b5.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from .fsdp import run
from .verl import SHARDINGS

if TYPE_CHECKING:
    from pathlib import Path


def save(model: Path, actor: Path, world: int, version: str = "fsdp2", form: str = "dcp") -> None:
    """Save a Hugging Face model that ``world`` ranks hold; ``form`` is dcp or local_shard."""
    actor.mkdir(parents=True)
    run(_save, world, model, actor, version, form)


def _save(path: Path, actor: Path, version: str, form: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP 1 is deprecated
        sharded = SHARDINGS["unnamed"](model) if version == "fsdp2" else _version_1(model)
        optimizer = torch.optim.AdamW(sharded.parameters(), lr=1e-3)
        if form == "local_shard":
            folder = actor / "local_shard_checkpoint"
            folder.mkdir(exist_ok=True)
            state = {key: _local(value) for key, value in sharded.state_dict().items()}
            torch.save(
                {
                    "model": state,
                    "optimizers": optimizer.state_dict(),
                    "lr_schedulers": [{"last_epoch": 1}],
                    "fsdp_version": version,
                    "rng": {"cpu": torch.get_rng_state()},
                },
                folder / f"checkpoint_rank_{dist.get_rank()}.pt",
            )
        else:
            training = _Training(sharded, optimizer, version)
            dcp.save({"fsdp_checkpoint": training}, checkpoint_id=str(actor / "dcp_checkpoint"))


class _Training(Stateful):
    def __init__(self, model: torch.nn.Module, optimizer: Any, version: str) -> None:
        self.parts = model, optimizer, version

    def state_dict(self) -> dict[str, Any]:
        model, optimizer, version = self.parts
        options = StateDictOptions(full_state_dict=False, cpu_offload=True)
        weights, moments = get_state_dict(model, optimizer, options=options)
        return {
            "model": weights,
            "optimizers": moments,
            "lr_schedulers": [{"last_epoch": 1}],
            "fsdp_version": version,
            "rng": {"cpu": torch.get_rng_state()},
        }


def _version_1(model: torch.nn.Module) -> torch.nn.Module:
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy([type(model.model.layers[0])]),
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )


def _local(value: torch.Tensor) -> torch.Tensor:
    return (value.to_local() if isinstance(value, DTensor) else value).cpu()
