"""Models of real megatron-core, saved by the calls that verl's Megatron workers make.

Source: volcengine/verl verl/utils/checkpoint/megatron_checkpoint_manager.py @ 0079597 and of
verl 0.3, verl/utils/megatron/dist_checkpointing.py @ 06baebf,
verl/models/llama/megatron/layers/parallel_linear.py @ c3b2057.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import dist_checkpointing, mpu
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)

if TYPE_CHECKING:
    from pathlib import Path


class _Head(torch.nn.Linear):
    """The output layer of a value model: whole on every rank, called as Megatron calls its own."""

    def forward(
        self,
        inputs: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> Any:
        return super().forward(inputs).float(), None


def add_head(chunks: list[Any], bias: bool | None) -> None:
    """Replace the output layer by a head with one output, unless ``bias`` is None."""
    for chunk in chunks:
        if bias is not None and chunk.post_process:
            chunk.output_layer = _Head(chunk.config.hidden_size, 1, bias=bias)


def save(directory: Path, form: str, chunks: list[Any]) -> None:
    """Save ``dist_ckpt`` for torch_dist, ``model/mp_rank_TT`` for torch.

    Without chunks only the states are saved, as by verl where a bridge writes the weights.
    """
    if form == "torch":
        _save_lists(directory / "model", chunks)
        return
    state: dict[str, Any] = {}
    for number, chunk in enumerate(chunks):
        key = f"model{number}" if len(chunks) > 1 else "model"
        state[key] = chunk.sharded_state_dict()
    state["lr_scheduler"] = {"num_steps": 7}
    state["rng_state"] = ShardedObject(
        "rng_state",
        [{"torch_rng_state": torch.get_rng_state()}],
        (mpu.get_pipeline_model_parallel_world_size(), mpu.get_tensor_model_parallel_world_size()),
        (mpu.get_pipeline_model_parallel_rank(), mpu.get_tensor_model_parallel_rank()),
        replica_id=mpu.get_data_parallel_rank(with_context_parallel=True),
    )
    target = directory / "dist_ckpt"
    target.mkdir(parents=True, exist_ok=True)
    strategy = FullyParallelSaveStrategyWrapper(
        get_default_save_sharded_strategy("torch_dist"),
        mpu.get_data_parallel_group(with_context_parallel=True),
    )
    dist_checkpointing.save(
        state,
        str(target),
        sharded_strategy=strategy,
        async_sharded_save=False,
        validate_access_integrity=True,
    )
    config = {"params_dtype": "torch.float32"}
    (directory / "transformer_config.json").write_text(json.dumps(config))


def _save_lists(directory: Path, chunks: list[Any]) -> None:
    name = f"mp_rank_{mpu.get_tensor_model_parallel_rank():02d}"
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        name += f"_{mpu.get_pipeline_model_parallel_rank():03d}"
    if mpu.get_expert_model_parallel_world_size() > 1:
        name += f"_{mpu.get_expert_model_parallel_rank():03d}"
    (directory / name).mkdir(parents=True, exist_ok=True)
    torch.save([chunk.state_dict() for chunk in chunks], directory / name / "model.pt")
