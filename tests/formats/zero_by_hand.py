"""DeepSpeed's files by hand, with torch alone: any number of ranks, any padding.

Source: deepspeedai/DeepSpeed deepspeed/runtime/zero/{stage_1_and_2,stage3}.py @ v0.19.8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def write(
    root: Path,
    state: Mapping[str, torch.Tensor],
    stage: int,
    world: int,
    *,
    compute: torch.dtype = torch.bfloat16,
    groups: int = 1,
    alignment: int = 1,
    shared: Mapping[str, str] | None = None,
    tag: str = "global_step7",
    step: float = 7.0,
    rank: int = 0,
    affine: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint whose masters are ``state``; return its root.

    Parameters start at multiples of ``alignment`` elements (ZeRO 1 and 2). With an ``affine`` map
    ``state`` is what tensor-parallel ``rank`` of two has.
    """
    directory = root / tag
    directory.mkdir(parents=True, exist_ok=affine is not None)
    (root / "latest").write_text(tag)
    members = [list(state)[group::groups] for group in range(groups)]
    shapes = [{name: state[name].shape for name in names} for names in members]
    module = {
        name: tensor.to(compute) if stage < 3 else torch.empty(0, dtype=compute)
        for name, tensor in state.items()
    }
    module |= {alias: module[name] for alias, name in (shared or {}).items()}
    model = {
        "module": module,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": shapes,
        "frozen_param_shapes": {},
        "frozen_param_fragments": {},
        "shared_params": dict(shared or {}),
        "lr_scheduler": {"last_epoch": 7},
        "global_steps": 7,
        "dp_world_size": world,
        "mp_world_size": 2 if affine else 1,
        "ds_version": "0.19.8",
        "universal_checkpoint_info": {"affine_map": affine},
    }
    tensors = [[state[name] for name in names] for names in members]
    for dp in range(world):
        if stage == 3 or dp == 0:
            prefix = f"zero_pp_rank_{dp}_" if stage == 3 else ""
            torch.save(model, directory / f"{prefix}mp_rank_{rank:02d}_model_states.pt")
        if stage == 3:
            inner = {"fp32_flat_groups": [_pieces(group, dp, world) for group in tensors]}
        else:
            flat = [_partition(group, dp, world, alignment) for group in tensors]
            gaps = [[-tensor.numel() % alignment for tensor in group] for group in tensors]
            inner = {
                "single_partition_of_fp32_groups": flat,
                "param_alignment_paddings": gaps,
            }
        inner |= {"zero_stage": stage, "partition_count": world if stage == 3 else [world] * groups}
        inner["optimizer_state_dict"] = {"state": {0: {"step": torch.tensor(step)}}}
        path = directory / f"bf16_zero_pp_rank_{dp}_mp_rank_{rank:02d}_optim_states.pt"
        torch.save({"optimizer_state_dict": inner, "ds_version": "0.19.8"}, path)
    return root


def _partition(
    group: Sequence[torch.Tensor], rank: int, world: int, alignment: int
) -> torch.Tensor:
    """Return a rank's part of the row of parameters, without the padding at its end."""
    parts = []
    for tensor in group:
        gap = torch.full((-tensor.numel() % alignment,), 99.0, dtype=tensor.dtype)
        parts += [tensor.reshape(-1), gap]
    row = torch.cat(parts)
    size = -(-row.numel() // (2 * world)) * 2
    return row[rank * size : (rank + 1) * size].clone()


def _pieces(group: Sequence[torch.Tensor], rank: int, world: int) -> torch.Tensor:
    """Return a rank's part of every parameter; what is short of a part is padded."""
    parts = []
    for tensor in group:
        size = -(-tensor.numel() // world)
        piece = torch.full((size,), 99.0, dtype=tensor.dtype)
        own = tensor.reshape(-1)[rank * size : (rank + 1) * size]
        piece[: own.numel()] = own
        parts.append(piece)
    return torch.cat(parts)
