"""Adapters that the real peft makes, saves, loads and merges."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from .fsdp import run
from .hf import weights


def make(base: Path, target: Path | None = None, *, seed: int = 5, **config: Any) -> PeftModel:
    """Return a model with an adapter whose every number is random; save the adapter.

    The matrices hold multiples of 2^-6: sums of their products are exact in float32, so that they
    do not depend on the order in which a processor's kernel adds.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of targets that fan in, of tied layers
        torch.manual_seed(seed)
        model = get_peft_model(_base(base), LoraConfig(**config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "magnitude" in name:
                    parameter.mul_(0.5 + torch.rand_like(parameter))
                elif parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
                if "lora_" in name and "magnitude" not in name:
                    parameter.copy_((parameter * 64).round() / 64)
        if target is not None:
            model.save_pretrained(target)
    return model.eval()


def merged(base: Path, adapters: list[Path], target: Path) -> dict[str, torch.Tensor]:
    """Return the weights that peft's merge of saved adapters has when transformers saves them."""
    model: Any = _base(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for adapter in adapters:
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        model.save_pretrained(target)
    return weights(target)


def logits(base: Path, adapter: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of a model with its adapter beside it, as training saw them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(_base(base, torch.float32), adapter)
    with torch.no_grad():
        return model.eval()(tokens).logits


def save_sharded(base: Path, target: Path, world: int, config: dict[str, Any]) -> None:
    """Save a model and its adapter, sharded by FSDP 2, as verl and as DCP hold it."""
    (target / "actor").mkdir(parents=True)
    run(_save_sharded, world, base, target, config)
    for name in ("config.json", "generation_config.json"):
        for place in (target, target / "actor"):
            (place / name).write_bytes((base / name).read_bytes())


def _save_sharded(base: Path, target: Path, config: dict[str, Any]) -> None:
    model = make(base, **config)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    state = model.state_dict()
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.save(state, target / "actor" / f"model_world_size_{world}_rank_{rank}.pt")
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=str(target / "dcp"))


def _base(directory: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    seeing = hasattr(AutoConfig.from_pretrained(directory), "vision_config")
    kind = AutoModelForImageTextToText if seeing else AutoModelForCausalLM
    return kind.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", local_files_only=True
    )
