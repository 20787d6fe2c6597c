"""The args namespace of megatron.training, from an oracle `Model` and back to one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from ckptx.verification.frameworks import megatron_args

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


def model_from_args(args: Any) -> Model:
    """Return the model that megatron's pretrain_gpt builds from these args.

    Raises:
        AttributeError: a field without which megatron cannot build the model is absent.
    """
    config, gpt = megatron_args.arguments(args)
    te = getattr(args, "transformer_impl", None) == "transformer_engine"
    dtype = getattr(args, "params_dtype", torch.float32)
    return Model(config, gpt, "te" if te else "local", dtype)
