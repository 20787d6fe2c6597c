"""Tiny configs of the dense families that are not spelt as Llama's relatives are."""

from __future__ import annotations

from typing import Any

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 37,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-4,
    "pad_token_id": None,
}
_HEADS = _SIZES | {"head_dim": 6}
_GPT2 = {
    "n_embd": 32,
    "n_inner": 40,
    "n_layer": 4,
    "n_head": 8,
    "n_positions": 64,
    "vocab_size": 37,
    "layer_norm_epsilon": 1e-4,
}
_NEOX = {
    key: value
    for key, value in _SIZES.items()
    if key not in ("num_key_value_heads", "rms_norm_eps")
} | {"layer_norm_eps": 1e-4}
_STARCODER = {key: value for key, value in _SIZES.items() if key != "rms_norm_eps"} | {
    "norm_epsilon": 1e-4
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 20000.0,
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 3.0],
}

CLASSES = {
    "gpt2": "GPT2",
    "gpt_neox": "GPTNeoX",
    "phi3": "Phi3",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "starcoder2": "Starcoder2",
    "glm": "Glm",
    "glm4": "Glm4",
    "olmo2": "Olmo2",
}
"""Beginnings of the names of config classes."""

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT2),
    "gpt2-untied": ("gpt2", _GPT2 | {"tie_word_embeddings": False, "n_inner": None}),
    "gpt2-exact": ("gpt2", _GPT2 | {"activation_function": "gelu"}),
    "gpt2-scaled-by-layer": (
        "gpt2",
        _GPT2 | {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    ),
    "gpt_neox": ("gpt_neox", _NEOX),
    "gpt_neox-sequential": ("gpt_neox", _NEOX | {"use_parallel_residual": False}),
    "gpt_neox-no-attention-bias": (
        "gpt_neox",
        _NEOX | {"attention_bias": False, "hidden_act": "gelu_new", "tie_word_embeddings": True},
    ),
    "phi3": ("phi3", _SIZES),
    "phi3-window": ("phi3", _SIZES | {"sliding_window": 7, "num_key_value_heads": None}),
    "phi3-long": ("phi3", _SIZES | {"rope_parameters": _LONG}),
    "gemma": ("gemma", _HEADS),
    "gemma-biases": ("gemma", _HEADS | {"attention_bias": True, "tie_word_embeddings": False}),
    "gemma2": ("gemma2", _HEADS),
    "gemma2-uncapped": (
        "gemma2",
        _HEADS
        | {
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
            "query_pre_attn_scalar": 144,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
    ),
    "starcoder2": ("starcoder2", _STARCODER),
    "starcoder2-no-bias": (
        "starcoder2",
        _STARCODER | {"use_bias": False, "sliding_window": 7, "tie_word_embeddings": False},
    ),
    "glm": ("glm", _HEADS),
    "glm-no-bias": ("glm", _HEADS | {"attention_bias": False, "tie_word_embeddings": True}),
    "glm4": ("glm4", _HEADS),
    "olmo2": ("olmo2", _SIZES),
    "olmo2-biases": ("olmo2", _SIZES | {"attention_bias": True, "num_key_value_heads": None}),
}
