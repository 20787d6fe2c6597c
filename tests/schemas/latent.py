"""Tiny configs of the families whose attention is latent."""

from __future__ import annotations

from typing import Any

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "vocab_size": 37,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
_GROUPS = {"n_group": 4, "topk_group": 2}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": ("deepseek_v2", _SIZES | {"first_k_dense_replace": 1}),
    "deepseek_v2-lite": ("deepseek_v2", _SIZES | {"q_lora_rank": None, "n_shared_experts": 3}),
    "deepseek_v2-groups": (
        "deepseek_v2",
        _SIZES | _GROUPS | {"topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": ("deepseek_v3", _SIZES | _GROUPS | {"num_nextn_predict_layers": 0}),
    "deepseek_v3-tied": (
        "deepseek_v3",
        _SIZES
        | {
            "num_nextn_predict_layers": 0,
            "tie_word_embeddings": True,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
        },
    ),
}
