"""Adapters that the real peft makes, saves, loads and merges."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from .hf import weights


def make(base: Path, target: Path | None = None, *, seed: int = 5, **config: Any) -> PeftModel:
    """Return a model with an adapter whose every number is random; save the adapter."""
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


def _base(directory: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", local_files_only=True
    )
