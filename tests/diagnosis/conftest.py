"""Tiny models of transformers, written once; what tests do to their weights is plain torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

DENSE = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
SQUARE = DENSE | {
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "vocab_size": 64,
}
EXPERTS = DENSE | {"num_hidden_layers": 2, "intermediate_size": 48, "num_local_experts": 12}
LATENT = {k: v for k, v in DENSE.items() if k not in ("head_dim", "num_key_value_heads")} | {
    "num_hidden_layers": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", DENSE),
    "deep": ("Llama", DENSE | {"num_hidden_layers": 12}),
    "square": ("Llama", SQUARE),
    "qwen2": ("Qwen2", {k: v for k, v in DENSE.items() if k != "head_dim"}),
    "qwen3": ("Qwen3", DENSE | {"num_hidden_layers": 2}),
    "mixtral": ("Mixtral", EXPERTS),
    "deepseek_v3": ("DeepseekV3", LATENT),
}
State = dict[str, "torch.Tensor"]


class Weights:
    """The weights of one model, copied for every test, and its config."""

    def __init__(self, config: dict[str, Any], state: State) -> None:
        self.config = config
        self.state = state

    def copy(self) -> State:
        """Return the weights, free to be changed."""
        return {name: tensor.clone() for name, tensor in self.state.items()}

    def write(self, directory: Path, state: State, **config: Any) -> Path:
        """Write a model directory."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps({**self.config, **config}))
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        safetensors.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory


@pytest.fixture(scope="session")
def weights_of() -> Callable[[str], Weights]:
    """The weights of a model as transformers initialises it, with norms and biases of their own."""

    @cache
    def made(name: str) -> Weights:
        family, sizes = MODELS[name]
        config = getattr(transformers, f"{family}Config")(**sizes)
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.data.normal_(1, 0.1)
            if key.endswith("bias"):
                parameter.data.normal_(0, 0.1)
        said = json.loads(config.to_json_string(use_diff=False))
        said["architectures"] = [f"{family}ForCausalLM"]
        return Weights(said, _published(model, config))

    return made


def _published(model: Any, config: Any) -> State:
    """Return a state dict with the names of published files: experts one by one."""
    state: State = {}
    for name, tensor in model.state_dict().items():
        stem, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            stem = stem.replace(".mlp.", ".block_sparse_moe.")
            for expert, fused in enumerate(tensor):
                state[f"{stem}.{expert}.w1.weight"], state[f"{stem}.{expert}.w3.weight"] = (
                    fused.chunk(2)
                )
        elif last == "down_proj":
            stem = stem.replace(".mlp.", ".block_sparse_moe.")
            for expert, one in enumerate(tensor):
                state[f"{stem}.{expert}.w2.weight"] = one
        elif ".mlp.gate." in name:
            state[name.replace(".mlp.", ".block_sparse_moe.")] = tensor
        else:
            state[name] = tensor
    return {name: tensor.clone() for name, tensor in state.items()}
