"""Tiny transformers checkpoints with random weights, their logits, and their megatron model.

`mcore_model` is written from the two libraries' meanings of the numbers, by hand.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Starcoder2Config,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer

from .mcore import Model

if TYPE_CHECKING:
    from collections.abc import Collection
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


def gpt2(directory: Path, *, seed: int = 0, **overrides: Any) -> PreTrainedConfig:
    """Write a GPT-2 checkpoint: learned positions, tied, head size 8."""
    sizes = {
        "n_embd": 64,
        "n_inner": 96,
        "n_layer": 4,
        "n_head": 8,
        "n_positions": 64,
        "tie_word_embeddings": True,
    }
    return _write(GPT2Config, directory, seed, torch.float32, sizes | overrides, _OWN_NAMES)


def gpt_neox(directory: Path, *, seed: int = 0, **overrides: Any) -> PreTrainedConfig:
    """Write a GPT-NeoX checkpoint: one residual after the other, half of a head rotated."""
    sizes = {
        "use_parallel_residual": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
        "layer_norm_eps": 1e-4,
    }
    return _write(GPTNeoXConfig, directory, seed, torch.float32, sizes | overrides, _NEOX_NAMES)


def phi3(directory: Path, *, seed: int = 0, **overrides: Any) -> PreTrainedConfig:
    """Write a Phi-3 checkpoint of which three quarters of a head are rotated, as in Phi-4-mini."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    sizes = {"rope_parameters": rope, "pad_token_id": None}
    return _write(Phi3Config, directory, seed, torch.float32, sizes | overrides)


def gemma(directory: Path, *, seed: int = 0, **overrides: Any) -> PreTrainedConfig:
    """Write a Gemma checkpoint: tied, head size 16, not hidden / heads."""
    sizes = {"head_dim": 16, "tie_word_embeddings": True, "pad_token_id": None}
    return _write(GemmaConfig, directory, seed, torch.float32, sizes | overrides)


def gemma2(directory: Path, *, seed: int = 0, **overrides: Any) -> PreTrainedConfig:
    """Write a Gemma 2 checkpoint: norms after attention and MLP, windows in every other layer."""
    sizes = {"head_dim": 16, "tie_word_embeddings": True, "pad_token_id": None, "sliding_window": 5}
    return _write(Gemma2Config, directory, seed, torch.float32, sizes | overrides)


def starcoder2(directory: Path, *, seed: int = 0, **overrides: Any) -> PreTrainedConfig:
    """Write a StarCoder2 checkpoint: LayerNorm and biases everywhere, tied."""
    sizes = {"tie_word_embeddings": True, "norm_epsilon": 1e-4}
    return _write(
        Starcoder2Config, directory, seed, torch.float32, sizes | overrides, {"rms_norm_eps"}
    )


def glm(directory: Path, *, seed: int = 0, **overrides: Any) -> PreTrainedConfig:
    """Write a GLM-4 checkpoint: half of a head rotated, in pairs of neighbours."""
    sizes = {"head_dim": 16, "pad_token_id": None, "rms_norm_eps": 1e-6}
    return _write(GlmConfig, directory, seed, torch.float32, sizes | overrides)


def glm4(directory: Path, *, seed: int = 0, **overrides: Any) -> PreTrainedConfig:
    """Write a GLM-4-0414 checkpoint: GLM-4 with norms after attention and MLP."""
    sizes = {"head_dim": 16, "pad_token_id": None}
    return _write(Glm4Config, directory, seed, torch.float32, sizes | overrides)


def granite(directory: Path, *, seed: int = 0, **overrides: Any) -> PreTrainedConfig:
    """Write a Granite checkpoint, which no schema knows."""
    return _write(GraniteConfig, directory, seed, torch.float32, {"pad_token_id": None} | overrides)


def olmo2(directory: Path, *, seed: int = 0, **overrides: Any) -> PreTrainedConfig:
    """Write an OLMo 2 checkpoint: norms after attention and MLP only, and of whole projections."""
    return _write(Olmo2Config, directory, seed, torch.float32, {"pad_token_id": None} | overrides)


_OWN_NAMES = frozenset(_SIZES) - {"vocab_size", "bos_token_id", "eos_token_id"}
"""Keys of `_SIZES` that GPT-2 spells in its own way."""
_NEOX_NAMES = frozenset({"num_key_value_heads", "rms_norm_eps"})


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


def deepseek_v2(
    directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedConfig:
    """Write a DeepSeek-V2-Lite checkpoint: no query rank, two shared experts, YaRN."""
    sizes = _LATENT | {
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.5,
        "first_k_dense_replace": 1,
        "rope_parameters": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    }
    return _write(DeepseekV2Config, directory, seed, dtype, sizes | overrides)


def deepseek_v3(
    directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedConfig:
    """Write a DeepSeek-V3 checkpoint: a query rank, biases that choose experts, four groups.

    A token goes to 4 experts in 2 of 4 groups, so a group counts by its best 2, as in the
    published model.
    """
    sizes = _LATENT | {
        "q_lora_rank": 40,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 2,
        "num_nextn_predict_layers": 0,
        "rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    }
    return _write(DeepseekV3Config, directory, seed, dtype, sizes | overrides)


_LATENT = {
    # transformers normalises latent vectors with this one whatever the config says.
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 8,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 48,
    "pad_token_id": None,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 64,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def _write(
    config_class: type[PreTrainedConfig],
    directory: Path,
    seed: int,
    dtype: torch.dtype,
    sizes: dict[str, Any],
    without: Collection[str] = (),
) -> PreTrainedConfig:
    usual = {key: value for key, value in _SIZES.items() if key not in without}
    config = config_class(**usual | sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = ("norm" in name or ".ln_" in name) and name.endswith("weight")
            scale = 0.1 if norm or name.endswith("bias") else 0.05
            values = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(values + 1 if norm and "gemma" not in config.model_type else values)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.05)
    model.save_pretrained(directory)
    return model.config


def tokenizer(directory: Path) -> None:
    """Save a tokenizer of whole words, for the vocabulary that models have here unless told."""
    words = ["<unk>", "The", "capital", "of", "France", "is", *(f"w{n}" for n in range(6, 131))]
    made = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained(directory)


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
    known = _MEGATRON.get(hf.model_type)
    activation = getattr(hf, "hidden_act", None) or getattr(hf, "activation_function", None)
    if known is None or activation not in known:
        raise ValueError(f"no hand-made megatron model for {hf.model_type} with {activation}")
    rope = getattr(hf, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10000}
    latent = hf.model_type in _LATENT_FAMILIES
    scaled = rope["rope_type"] == "llama3"
    if not latent and not scaled and rope["rope_type"] != "default":
        raise ValueError(f"no hand-made megatron rope for {rope}")
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    norm_names = ("rms_norm_eps", "norm_epsilon", "layer_norm_eps", "layer_norm_epsilon")
    layer_norm = hf.model_type in ("gpt2", "gpt_neox", "starcoder2")
    config = {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "ffn_hidden_size": hf.n_inner if hf.model_type == "gpt2" else hf.intermediate_size,
        "num_attention_heads": hf.num_attention_heads,
        "num_query_groups": getattr(hf, "num_key_value_heads", hf.num_attention_heads),
        "kv_channels": head_dim,
        "normalization": "LayerNorm" if layer_norm else "RMSNorm",
        "layernorm_epsilon": next(getattr(hf, name) for name in norm_names if hasattr(hf, name)),
        "add_bias_linear": layer_norm,
        "add_qkv_bias": hf.model_type in ("qwen2", "qwen2_moe", "glm"),
        "qk_layernorm": hf.model_type in ("qwen3", "qwen3_moe"),
        **known[activation],
    }
    if hf.model_type == "gemma":
        config["layernorm_zero_centered_gamma"] = True
    if hf.model_type == "glm":
        config["rotary_interleaved"] = True
    if hf.model_type in _MIXTURES:
        config |= _mixture(hf)
    if latent:
        config |= _latent(hf, rope)
    window = getattr(hf, "sliding_window", None)
    if hf.model_type in ("mistral", "phi3", "starcoder2") and window is not None:
        config["window_size"] = (window - 1, 0)  # HF counts the position itself, megatron does not
    gpt = {
        "vocab_size": math.ceil(hf.vocab_size / pad_to) * pad_to,
        "max_sequence_length": hf.max_position_embeddings,
        "position_embedding_type": "learned_absolute" if hf.model_type == "gpt2" else "rope",
        "rotary_base": rope["rope_theta"],
        "rotary_percent": rope.get("partial_rotary_factor", 1.0),
        "rope_scaling": scaled,
        "rope_scaling_factor": rope.get("factor", 8.0),
        "share_embeddings_and_output_weights": hf.tie_word_embeddings,
    }
    scale = hf.hidden_size**0.5 if hf.model_type == "gemma" else None
    return Model(config, gpt, spec, dtype, embedding_scale=scale)


_LATENT_FAMILIES = ("deepseek_v2", "deepseek_v3")
_MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", *_LATENT_FAMILIES)
_SWIGLU = {"silu": {"activation_func": "silu", "gated_linear_unit": True}}
# Megatron's kernels of gelu with bias or gate compute the tanh form.
_FUSED_GELU = {"activation_func": "gelu", "bias_activation_fusion": True}
_EXACT_GELU = {"activation_func": "gelu", "gated_linear_unit": False}
_MEGATRON: dict[str, dict[str, dict[str, Any]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "glm", *_MIXTURES), _SWIGLU),
    "gpt2": {"gelu_new": _FUSED_GELU, "gelu": _EXACT_GELU},
    "gpt_neox": {"gelu": _EXACT_GELU},
    "starcoder2": {"gelu_pytorch_tanh": _FUSED_GELU},
    "gemma": {"gelu_pytorch_tanh": {**_FUSED_GELU, "gated_linear_unit": True}},
}
"""By model_type and activation, what of TransformerConfig decides about the MLP."""


def _mixture(hf: PreTrainedConfig) -> dict[str, Any]:
    """Return TransformerConfig's arguments for the experts of a config."""
    ffn = hf.intermediate_size if hf.model_type == "mixtral" else hf.moe_intermediate_size
    normalized = hf.model_type == "mixtral" or hf.norm_topk_prob
    experts = "n_routed_experts" if hf.model_type in _LATENT_FAMILIES else "num_experts"
    config = {
        "num_moe_experts": getattr(hf, experts),
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


def _latent(hf: PreTrainedConfig, rope: dict[str, Any]) -> dict[str, Any]:
    """Return TransformerConfig's arguments for DeepSeek's attention and routing."""
    dense = hf.first_k_dense_replace
    config = {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": hf.q_lora_rank,
        "kv_lora_rank": hf.kv_lora_rank,
        "qk_head_dim": hf.qk_nope_head_dim,
        "qk_pos_emb_head_dim": hf.qk_rope_head_dim,
        "v_head_dim": hf.v_head_dim,
        "kv_channels": hf.v_head_dim,
        "num_query_groups": None,
        "rotary_base": rope["rope_theta"],
        "rope_type": "yarn" if rope["rope_type"] == "yarn" else "rope",
        "moe_layer_freq": [0] * dense + [1] * (hf.num_hidden_layers - dense),
        "moe_shared_expert_intermediate_size": hf.n_shared_experts * hf.moe_intermediate_size,
        "moe_router_topk_scaling_factor": hf.routed_scaling_factor,
    }
    if rope["rope_type"] == "yarn":
        config |= {
            "rotary_scaling_factor": rope["factor"],
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
            "beta_fast": rope["beta_fast"],
            "beta_slow": rope["beta_slow"],
            "mscale": rope["mscale"],
            "mscale_all_dim": rope["mscale_all_dim"],
        }
    if hf.model_type == "deepseek_v3":
        config |= {
            "moe_router_score_function": "sigmoid",
            "moe_router_pre_softmax": False,
            "moe_router_enable_expert_bias": True,
            "moe_router_num_groups": hf.n_group,
            "moe_router_group_topk": hf.topk_group,
        }
    elif hf.topk_method != "greedy":
        config |= {
            "moe_router_num_groups": hf.n_group,
            "moe_router_group_topk": hf.topk_group,
        }
    return config


def add_further_layer(directory: Path, config: PreTrainedConfig, seed: int = 7) -> None:
    """Give a DeepSeek-V3 checkpoint a layer for multi-token prediction, as the published one has.

    Its decoder layer has the shapes of the last one's.
    """
    file = directory / "model.safetensors"
    tensors = load_file(file)
    last, own = (f"model.layers.{config.num_hidden_layers + shift}." for shift in (-1, 0))
    shapes = {n.removeprefix(last): t.shape for n, t in tensors.items() if n.startswith(last)}
    hidden = config.hidden_size
    norms = ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")
    shapes |= {"eh_proj.weight": (hidden, 2 * hidden), **dict.fromkeys(norms, (hidden,))}
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        norm = "norm" in name
        values = torch.randn(shape, generator=generator) * (0.1 if norm else 0.05)
        tensors[own + name] = values + 1 if norm else values
    tensors[f"{own}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{own}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, file, {"format": "pt"})
    said = json.loads((directory / "config.json").read_text())
    said["num_nextn_predict_layers"] = 1
    (directory / "config.json").write_text(json.dumps(said, indent=2))


def further_logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of the first layer for multi-token prediction, computed by hand.

    The decoder layer is transformers' own; around it stands the formula of the DeepSeek-V3 report
    (section 2.2) with Megatron's ends: the token after the last is number 0.
    """
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    depth = model.config.num_hidden_layers
    prefix = f"model.layers.{depth}."
    own = {n.removeprefix(prefix): t for n, t in weights(directory).items() if n.startswith(prefix)}
    layer = DeepseekV3DecoderLayer(model.config, depth).eval()
    experts = [
        [own.pop(f"mlp.experts.{e}.{part}_proj.weight") for part in ("gate", "up", "down")]
        for e in range(model.config.n_routed_experts)
    ]
    own["mlp.experts.gate_up_proj"] = torch.stack([torch.cat(e[:2]) for e in experts])
    own["mlp.experts.down_proj"] = torch.stack([e[2] for e in experts])
    layer.load_state_dict({name: own[name] for name in layer.state_dict()})

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], own[name], model.config.rms_norm_eps)

    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state
        following = torch.cat([tokens[:, 1:], torch.zeros_like(tokens[:, :1])], 1)
        pair = [norm(own["embed_tokens.weight"][following], "enorm.weight")]
        x = torch.cat([*pair, norm(hidden, "hnorm.weight")], -1) @ own["eh_proj.weight"].T
        length = tokens.shape[1]
        positions = model.model.rotary_emb(x, torch.arange(length)[None])
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        x = layer(x, attention_mask=mask, position_embeddings=positions)
        return norm(x, "shared_head.norm.weight") @ own["shared_head.head.weight"].T
