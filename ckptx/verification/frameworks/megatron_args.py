"""What Megatron makes of the args of a checkpoint: the arguments of its config and of GPTModel."""

from __future__ import annotations

from typing import Any

_ACTIVATIONS = {"swiglu": "silu", "squared_relu": "squared_relu", "quick_geglu": "quick_gelu"}
_LAYERS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels"),
    *("normalization", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "rotary_interleaved"),
    *("window_size", "softmax_type", "multi_latent_attention", "mtp_num_layers"),
    "heterogeneous_layers_config_path",
)
_LATENT_ATTENTION = (
    *("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
    *("rotary_base", "rotary_percent", "rotary_scaling_factor", "rope_type"),
    *("mscale", "mscale_all_dim", "beta_fast", "beta_slow", "original_max_position_embeddings"),
)
_EXPERTS = (
    *("moe_ffn_hidden_size", "moe_layer_freq", "moe_grouped_gemm", "moe_token_dispatcher_type"),
    *("moe_shared_expert_intermediate_size", "moe_shared_expert_gate"),
    *("moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax"),
    *("moe_router_enable_expert_bias", "moe_router_num_groups", "moe_router_group_topk"),
    *("moe_router_topk_scaling_factor", "moe_router_load_balancing_type"),
)
"""Args that are arguments of TransformerConfig by the same name."""


def _first_of(args: Any, *names: str, default: object = None) -> Any:
    return next((getattr(args, name) for name in names if hasattr(args, name)), default)


def arguments(args: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of TransformerConfig and of GPTModel that pretrain_gpt makes of args.

    Parallel sizes and dtypes are left out; ``activation_func`` is a name: ``silu``, ``gelu``,
    ``gelu_tanh``, ``squared_relu`` or ``quick_gelu``.
    Facts of NVIDIA/Megatron-LM megatron/training/arguments.py core_transformer_config_from_args and
    gpt_builders.py @ core_v0.16.1; the names of 0.15 and before (norm_epsilon, apply_layernorm_1p)
    are taken too. gpt_builders passes no rope_scaling_factor, so it is GPTModel's 8 whatever the
    args say.

    Raises:
        AttributeError: a field without which megatron cannot build the model is absent.
    """
    mla = bool(_first_of(args, "multi_latent_attention"))
    config: dict[str, Any] = {
        name: getattr(args, name)
        for name in (*_LAYERS, *_EXPERTS, *(_LATENT_ATTENTION if mla else ()))
        if getattr(args, name, None) is not None
    }
    for name in ("num_layers", "hidden_size", "num_attention_heads"):
        config[name] = getattr(args, name)
    config["layernorm_epsilon"] = _first_of(args, "layernorm_epsilon", "norm_epsilon", default=1e-5)
    config["layernorm_zero_centered_gamma"] = bool(
        _first_of(args, "layernorm_zero_centered_gamma", "apply_layernorm_1p", default=False)
    )
    config["num_moe_experts"] = _first_of(args, "num_experts")
    config["num_query_groups"] = (
        args.num_query_groups if _first_of(args, "group_query_attention") else None
    )
    if chosen := [name for name in _ACTIVATIONS if _first_of(args, name)]:
        config["activation_func"] = _ACTIVATIONS[chosen[-1]]
        config["gated_linear_unit"] = chosen[-1] != "squared_relu"
    elif _first_of(args, "bias_gelu_fusion"):  # the fused kernel is the tanh form
        config["activation_func"] = "gelu_tanh"
    gpt = {
        "vocab_size": args.padded_vocab_size,
        "max_sequence_length": args.max_position_embeddings,
        "share_embeddings_and_output_weights": not _first_of(
            args, "untie_embeddings_and_output_weights", default=False
        ),
        "position_embedding_type": _first_of(
            args, "position_embedding_type", default="learned_absolute"
        ),
        "rotary_percent": _first_of(args, "rotary_percent", default=1.0),
        "rotary_base": _first_of(args, "rotary_base", default=10000),
        "rope_scaling": bool(_first_of(args, "use_rope_scaling", default=False)),
    }
    return config, gpt
