"""Checkpoints of the largest open models as files of holes: every header true, no byte of weight.

Names, shapes and dtypes are those of the published files; sizes come from the public configs.

Source: deepseek-ai/DeepSeek-V3 config.json and model.safetensors.index.json @ main;
moonshotai/Kimi-K2-Instruct config.json @ main.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ITEMSIZE = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
BLOCK = 128
SHARD = 5 * 10**9  # bytes, roughly

DEEPSEEK_V3: Mapping[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "topk_method": "noaux_tc",
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "hidden_act": "silu",
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    },
}
KIMI_K2: Mapping[str, Any] = {
    **DEEPSEEK_V3,
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "max_position_embeddings": 131072,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "num_nextn_predict_layers": 0,
}
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 64,
    "q_lora_rank": 96,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "vocab_size": 4096,
}
"""The sizes of a scaled-down model, which keeps the layers and experts of the large one."""


def tensors(config: Mapping[str, Any]) -> Iterator[tuple[str, str, list[int]]]:
    """Yield name, safetensors dtype and shape of every tensor that was published."""
    hidden = config["hidden_size"]
    yield "model.embed_tokens.weight", "BF16", [config["vocab_size"], hidden]
    depth = config["num_hidden_layers"]
    for layer in range(depth + config["num_nextn_predict_layers"]):
        prefix = f"model.layers.{layer}."
        yield from _layer(config, prefix, dense=layer < config["first_k_dense_replace"])
        if layer >= depth:
            yield f"{prefix}embed_tokens.weight", "BF16", [config["vocab_size"], hidden]
            yield f"{prefix}enorm.weight", "BF16", [hidden]
            yield f"{prefix}hnorm.weight", "BF16", [hidden]
            yield f"{prefix}eh_proj.weight", "BF16", [hidden, 2 * hidden]
            yield f"{prefix}shared_head.norm.weight", "BF16", [hidden]
            yield f"{prefix}shared_head.head.weight", "BF16", [config["vocab_size"], hidden]
    yield "model.norm.weight", "BF16", [hidden]
    yield "lm_head.weight", "BF16", [config["vocab_size"], hidden]


def _layer(
    config: Mapping[str, Any], prefix: str, *, dense: bool
) -> Iterator[tuple[str, str, list[int]]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    query, latent, value = config["q_lora_rank"], config["kv_lora_rank"], config["v_head_dim"]
    attention = f"{prefix}self_attn."
    yield f"{prefix}input_layernorm.weight", "BF16", [hidden]
    yield f"{prefix}post_attention_layernorm.weight", "BF16", [hidden]
    yield f"{attention}q_a_layernorm.weight", "BF16", [query]
    yield f"{attention}kv_a_layernorm.weight", "BF16", [latent]
    linear = {
        f"{attention}q_a_proj": [query, hidden],
        f"{attention}q_b_proj": [heads * (nope + rope), query],
        f"{attention}kv_a_proj_with_mqa": [latent + rope, hidden],
        f"{attention}kv_b_proj": [heads * (nope + value), latent],
        f"{attention}o_proj": [hidden, heads * value],
    }
    if dense:
        linear |= _mlp(f"{prefix}mlp.", hidden, config["intermediate_size"])
    else:
        ffn, count = config["moe_intermediate_size"], config["n_routed_experts"]
        yield f"{prefix}mlp.gate.weight", "BF16", [count, hidden]
        yield f"{prefix}mlp.gate.e_score_correction_bias", "F32", [count]
        linear |= _mlp(f"{prefix}mlp.shared_experts.", hidden, ffn * config["n_shared_experts"])
        for expert in range(count):
            linear |= _mlp(f"{prefix}mlp.experts.{expert}.", hidden, ffn)
    quantised = "quantization_config" in config
    for name, shape in linear.items():
        yield f"{name}.weight", "F8_E4M3" if quantised else "BF16", shape
        if quantised:
            yield f"{name}.weight_scale_inv", "F32", [-(-size // BLOCK) for size in shape]


def _mlp(prefix: str, hidden: int, ffn: int) -> dict[str, list[int]]:
    return {
        f"{prefix}gate_proj": [ffn, hidden],
        f"{prefix}up_proj": [ffn, hidden],
        f"{prefix}down_proj": [hidden, ffn],
    }


def write(config: Mapping[str, Any], directory: Path) -> Path:
    """Write a checkpoint of holes to a directory, unless it is there, and return it."""
    if (directory / "config.json").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, tuple[str, list[int]]]] = [{}]
    size = 0
    for name, dtype, shape in tensors(config):
        if size > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = (dtype, shape)
        size += ITEMSIZE[dtype] * math.prod(shape)
    homes = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        homes |= dict.fromkeys(shard, file)
        _write_shard(directory / file, shard)
    index = {"metadata": {}, "weight_map": homes}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory


def _write_shard(path: Path, shard: Mapping[str, tuple[str, list[int]]]) -> None:
    header: dict[str, Any] = {}
    position = 0
    for name, (dtype, shape) in shard.items():
        stop = position + ITEMSIZE[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + position)
