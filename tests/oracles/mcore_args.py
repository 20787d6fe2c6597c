"""The args namespace of megatron.training, from an oracle `Model` and back to one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from .mcore_model import Model

if TYPE_CHECKING:
    from .mcore_model import Layout

ArgsNames = Literal["0.16", "0.15"]
_DEFAULTS: dict[str, Any] = {
    "add_bias_linear": True,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "normalization": "LayerNorm",
    "rotary_interleaved": False,
    "window_size": None,
    "multi_latent_attention": False,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": None,
    "moe_layer_freq": 1,
    "moe_grouped_gemm": False,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False,
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_topk_scaling_factor": None,
    "mtp_num_layers": None,
    "heterogeneous_layers_config_path": None,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
}
_RENAMED = (
    "activation_func",
    "gated_linear_unit",
    "num_moe_experts",
    "num_query_groups",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "bias_activation_fusion",
)


def of_model(model: Model, layout: Layout, names: ArgsNames) -> dict[str, Any]:
    """Return the fields a loader needs, named as megatron ``names`` names them.

    Up to 0.15 the norm fields are norm_epsilon and apply_layernorm_1p. From 0.16 argparse is
    generated from TransformerConfig and they carry its names, layernorm_epsilon and
    layernorm_zero_centered_gamma
    (NVIDIA/Megatron-LM:megatron/training/argument_utils.py@core_v0.16.1).
    """
    config, gpt = model.config, model.gpt
    activation = config.get("activation_func", "gelu")
    gated = config.get("gated_linear_unit", False)
    groups = config.get("num_query_groups")
    old = names == "0.15"
    values = _DEFAULTS | {name: value for name, value in config.items() if name not in _RENAMED}
    return values | {
        "norm_epsilon" if old else "layernorm_epsilon": config.get("layernorm_epsilon", 1e-5),
        "apply_layernorm_1p" if old else "layernorm_zero_centered_gamma": config.get(
            "layernorm_zero_centered_gamma", False
        ),
        "group_query_attention": groups is not None,
        "num_query_groups": groups or 1,
        "kv_channels": config.get("kv_channels")
        or config["hidden_size"] // config["num_attention_heads"],
        "ffn_hidden_size": config.get("ffn_hidden_size") or 4 * config["hidden_size"],
        "num_experts": config.get("num_moe_experts"),
        "swiglu": gated and activation == "silu",
        "squared_relu": activation == "squared_relu",
        "quick_geglu": gated and activation == "quick_gelu",
        "openai_gelu": False,
        "bias_gelu_fusion": activation == "gelu_tanh"
        or bool(activation == "gelu" and config.get("bias_activation_fusion")),
        "gated_linear_unit": gated,
        "bias_swiglu_fusion": True,
        "position_embedding_type": gpt.get("position_embedding_type", "learned_absolute"),
        "add_position_embedding": True,
        "use_rotary_position_embeddings": False,
        "rotary_base": gpt.get("rotary_base", 10000),
        "rotary_percent": gpt.get("rotary_percent", 1.0),
        "rotary_seq_len_interpolation_factor": gpt.get("seq_len_interpolation_factor"),
        "use_rope_scaling": gpt.get("rope_scaling", False),
        "rope_scaling_factor": gpt.get("rope_scaling_factor", 8.0),
        "max_position_embeddings": gpt["max_sequence_length"],
        "seq_length": gpt["max_sequence_length"],
        "untie_embeddings_and_output_weights": not gpt.get(
            "share_embeddings_and_output_weights", False
        ),
        "make_vocab_size_divisible_by": 128,
        "padded_vocab_size": gpt["vocab_size"],
        "vocab_size": None,
        "tokenizer_type": "NullTokenizer",
        "tokenizer_model": None,
        "params_dtype": model.dtype,
        "bf16": model.dtype == torch.bfloat16,
        "fp16": model.dtype == torch.float16,
        "use_legacy_models": False,
        "transformer_impl": "transformer_engine" if model.spec == "te" else "local",
        "spec": None,
        "bert_binary_head": True,
        "consumed_train_samples": 0,
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
        **_of_layout(layout),
    }


def _of_layout(layout: Layout) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp or layout.tp,
        "context_parallel_size": 1,
        "data_parallel_size": layout.ranks_per_stage // layout.tp,
        "num_layers_per_virtual_pipeline_stage": None,
        "num_virtual_stages_per_pipeline_rank": layout.vpp,
        "decoder_first_pipeline_num_layers": layout.first,
        "decoder_last_pipeline_num_layers": layout.last,
        "pipeline_model_parallel_layout": layout.layout,
        "account_for_embedding_in_pipeline_split": layout.embedding_in_split,
        "account_for_loss_in_pipeline_split": layout.loss_in_split,
        "sequence_parallel": False,
        "use_distributed_optimizer": False,
    }


_ACTIVATIONS = ("swiglu", "squared_relu", "quick_geglu")
_SAME_NAME = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "normalization",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "rotary_interleaved",
    "window_size",
    "softmax_type",
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "rotary_base",
    "rotary_percent",
    "rotary_scaling_factor",
    "rope_type",
    "mscale",
    "mscale_all_dim",
    "beta_fast",
    "beta_slow",
    "original_max_position_embeddings",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_layer_freq",
    "moe_grouped_gemm",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "moe_router_score_function",
    "moe_router_pre_softmax",
    "moe_router_enable_expert_bias",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
    "moe_router_load_balancing_type",
    "moe_token_dispatcher_type",
    "mtp_num_layers",
    "heterogeneous_layers_config_path",
)
_MLA_ONLY = frozenset(
    _SAME_NAME[_SAME_NAME.index("q_lora_rank") : _SAME_NAME.index("moe_router_topk")]
)


def _first_of(args: Any, *names: str, default: object = None) -> Any:
    return next((getattr(args, name) for name in names if hasattr(args, name)), default)


def model_from_args(args: Any) -> Model:
    """Return the model that megatron's pretrain_gpt builds from these args.

    Facts of megatron/training/arguments.py core_transformer_config_from_args and gpt_builders.py at
    core_v0.16.1; the names of 0.15 and before (norm_epsilon, apply_layernorm_1p) are taken too.
    gpt_builders passes no rope_scaling_factor, so it is GPTModel's 8 whatever the args say.

    Raises:
        AttributeError: a field without which megatron cannot build the model is absent.
    """
    mla = bool(_first_of(args, "multi_latent_attention"))
    config: dict[str, Any] = {
        name: getattr(args, name)
        for name in _SAME_NAME
        if getattr(args, name, None) is not None and (mla or name not in _MLA_ONLY)
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
    chosen = [name for name in _ACTIVATIONS if _first_of(args, name)]
    if chosen:
        config["activation_func"] = {"swiglu": "silu", "quick_geglu": "quick_gelu"}.get(
            chosen[-1], chosen[-1]
        )
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
    spec = "te" if _first_of(args, "transformer_impl") == "transformer_engine" else "local"
    return Model(config, gpt, spec, _first_of(args, "params_dtype", default=torch.float32))
