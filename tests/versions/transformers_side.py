"""Save or load a small model with the transformers that is first on the path.

python transformers_side.py write|read FAMILY DIRECTORY LOGITS
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
FAMILIES = {
    "llama": SIZES,
    "qwen2": {**SIZES, "max_window_layers": 2},
    "mixtral": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
}
TOKENS = torch.arange(32).reshape(2, 16) * 3
THETA = 50000.0


def _made(family: str) -> torch.nn.Module:
    config = AutoConfig.for_model(family, **FAMILIES[family])
    if hasattr(config, "rope_parameters"):  # transformers 5
        config.rope_parameters = {"rope_type": "default", "rope_theta": THETA}
    else:
        config.rope_theta = THETA
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    return model


def main(action: str, family: str, directory: str, logits: str) -> None:
    """Do what is asked for; the logits of the model are saved, too."""
    if action == "write":
        model = _made(family)
        model.save_pretrained(directory)
    else:
        model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32)
    with torch.no_grad():
        torch.save(model.eval()(TOKENS).logits, logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
