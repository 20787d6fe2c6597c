"""Tiny transformers checkpoints with random weights, their logits, and their megatron model.

`mcore_model` is written from the two libraries' meanings of the numbers, by hand.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from .mcore import Model

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Literal

_SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


def llama(
    directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedConfig:
    """Write a Llama checkpoint (rope theta 10000, untied) and return its config."""
    return _write(LlamaConfig, directory, seed, dtype, overrides)


def llama3_rope(
    directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedConfig:
    """Write a Llama 3.1 checkpoint: scaled rope with theta 500000.

    Megatron hard-codes the low and high frequency factors 1 and 4 and the original length 8192, so
    only wavelengths above 2048 positions change: give `logits` 512 tokens or more, or a wrong
    factor hides (5e-5 at 16 tokens, 2e-4 at 64).
    """
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    sizes = {"rope_parameters": rope, "max_position_embeddings": 65536}
    return _write(LlamaConfig, directory, seed, dtype, sizes | overrides)


def mistral(
    directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedConfig:
    """Write a Mistral checkpoint without sliding window (as v0.3) and return its config."""
    sizes = {"sliding_window": None, "head_dim": None}
    return _write(MistralConfig, directory, seed, dtype, sizes | overrides)


def qwen2(
    directory: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    **overrides: Any,
) -> PreTrainedConfig:
    """Write a Qwen2 checkpoint (bias on q, k and v) and return its config."""
    sizes = {"tie_word_embeddings": tied}
    return _write(Qwen2Config, directory, seed, dtype, sizes | overrides)


def qwen3(
    directory: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    **overrides: Any,
) -> PreTrainedConfig:
    """Write a Qwen3 checkpoint (norms on q and k, head size 16, not hidden / heads)."""
    sizes = {"tie_word_embeddings": tied, "head_dim": 16}
    return _write(Qwen3Config, directory, seed, dtype, sizes | overrides)


def mixtral(
    directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedConfig:
    """Write a Mixtral checkpoint with 4 experts, 2 of them for every token."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return _write(MixtralConfig, directory, seed, dtype, sizes | overrides)


def qwen2_moe(
    directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedConfig:
    """Write a Qwen2-MoE checkpoint: bias on q, k and v, and a shared expert with a gate."""
    sizes = _EXPERTS | {"shared_expert_intermediate_size": 80}
    return _write(Qwen2MoeConfig, directory, seed, dtype, sizes | overrides)


def qwen3_moe(
    directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedConfig:
    """Write a Qwen3-MoE checkpoint: norms on q and k, and heads of size 16."""
    sizes = _EXPERTS | {"norm_topk_prob": True, "head_dim": 16}
    return _write(Qwen3MoeConfig, directory, seed, dtype, sizes | overrides)


def olmoe(
    directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedConfig:
    """Write an OLMoE checkpoint: norms on q and k as wholes."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": None}
    return _write(OlmoeConfig, directory, seed, dtype, sizes | overrides)


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def _write(
    config_class: type[PreTrainedConfig],
    directory: Path,
    seed: int,
    dtype: torch.dtype,
    sizes: dict[str, Any],
) -> PreTrainedConfig:
    config = config_class(**_SIZES | sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            scale = 0.1 if norm or name.endswith("bias") else 0.05
            values = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(values + 1 if norm else values)
    model.save_pretrained(directory)
    return model.config


def logits(directory: Path, tokens: object) -> torch.Tensor:
    """Return float32 logits [batch, sequence, vocabulary], computed in float32 by transformers."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    with torch.no_grad():
        return model(torch.as_tensor(tokens)).logits


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint under their names in the files, read by safetensors."""
    return {
        name: tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def config(directory: Path) -> PreTrainedConfig:
    """Return the config of a checkpoint."""
    return AutoConfig.from_pretrained(directory, local_files_only=True)


def mcore_model(
    hf: PreTrainedConfig,
    *,
    spec: Literal["local", "te"] = "te",
    dtype: torch.dtype = torch.float32,
    pad_to: int = 128,
) -> Model:
    """Return the megatron model with these numbers; the vocabulary is padded to ``pad_to``.

    Raises:
        ValueError: the config says something this hand-made table does not know.
    """
    qwen2_like = hf.model_type in ("qwen2", "qwen2_moe")
    mixture = hf.model_type in ("mixtral", "qwen2_moe", "qwen3_moe")
    dense = hf.model_type in ("llama", "mistral", "qwen2", "qwen3")
    if not (dense or mixture) or hf.hidden_act != "silu":
        raise ValueError(f"no hand-made megatron model for {hf.model_type} with {hf.hidden_act}")
    rope = hf.rope_parameters
    scaled = rope["rope_type"] == "llama3"
    if not scaled and rope["rope_type"] != "default":
        raise ValueError(f"no hand-made megatron rope for {rope}")
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    config = {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "ffn_hidden_size": hf.intermediate_size,
        "num_attention_heads": hf.num_attention_heads,
        "num_query_groups": hf.num_key_value_heads,
        "kv_channels": head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.rms_norm_eps,
        "add_bias_linear": False,
        "add_qkv_bias": qwen2_like,
        "qk_layernorm": hf.model_type in ("qwen3", "qwen3_moe"),
        "activation_func": "silu",
        "gated_linear_unit": True,
    }
    if mixture:
        config |= _mixture(hf)
    window = getattr(hf, "sliding_window", None)
    if hf.model_type == "mistral" and window is not None:
        config["window_size"] = (window - 1, 0)  # HF counts the position itself, megatron does not
    gpt = {
        "vocab_size": math.ceil(hf.vocab_size / pad_to) * pad_to,
        "max_sequence_length": hf.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": rope["rope_theta"],
        "rotary_percent": 1.0,
        "rope_scaling": scaled,
        "rope_scaling_factor": rope.get("factor", 8.0),
        "share_embeddings_and_output_weights": hf.tie_word_embeddings,
    }
    return Model(config, gpt, spec, dtype)


def _mixture(hf: PreTrainedConfig) -> dict[str, Any]:
    """Return TransformerConfig's arguments for the experts of a config."""
    ffn = hf.intermediate_size if hf.model_type == "mixtral" else hf.moe_intermediate_size
    normalized = hf.model_type == "mixtral" or hf.norm_topk_prob
    config = {
        "num_moe_experts": hf.num_experts,
        "moe_ffn_hidden_size": ffn,
        "moe_router_topk": hf.num_experts_per_tok,
        "moe_router_pre_softmax": not normalized,
        "moe_token_dispatcher_type": "allgather",
        "moe_router_load_balancing_type": "none",
    }
    dense = getattr(hf, "mlp_only_layers", [])
    if dense:
        config["moe_layer_freq"] = [int(n not in dense) for n in range(hf.num_hidden_layers)]
    if hf.model_type == "qwen2_moe":
        config["moe_shared_expert_intermediate_size"] = hf.shared_expert_intermediate_size
        config["moe_shared_expert_gate"] = True
    return config
