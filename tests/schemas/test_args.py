"""Megatron's args: values written down here, Megatron's own names for them, and the way back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ckptx.containers.pickle_values import TorchDtype
from ckptx.errors import SchemaError
from ckptx.model.pipeline_parallel import Pipeline
from ckptx.schemas.megatron_settings.args import (
    args_from_spec,
    launch_flags,
    notes,
    spec_from_args,
    unsupported_by_megatron,
)

from .named import config_from_spec, spec_from_config

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}

# What load_args_from_checkpoint sets; NVIDIA/Megatron-LM megatron/training/checkpointing.py
# @ core_v0.16.1.
RESTORED = """
    num_layers hidden_size ffn_hidden_size seq_length num_attention_heads num_query_groups
    group_query_attention kv_channels max_position_embeddings position_embedding_type
    add_position_embedding use_rotary_position_embeddings rotary_base rotary_percent
    rotary_interleaved add_bias_linear add_qkv_bias squared_relu swiglu
    untie_embeddings_and_output_weights apply_layernorm_1p normalization
    apply_query_key_layer_scaling attention_dropout hidden_dropout hybrid_override_pattern spec
    hybrid_attention_ratio hybrid_mlp_ratio num_experts moe_layer_freq moe_ffn_hidden_size
    moe_router_topk moe_token_dispatcher_type moe_router_pre_softmax moe_grouped_gemm
    moe_shared_expert_intermediate_size moe_router_score_function moe_router_enable_expert_bias
    moe_router_topk_scaling_factor mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads
    is_hybrid_model heterogeneous_layers_config_path heterogeneous_layers_config_encoded_json
    moe_latent_size tokenizer_model tokenizer_type tiktoken_pattern padded_vocab_size ckpt_format
    tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size
    num_layers_per_virtual_pipeline_stage expert_model_parallel_size
"""

COMMON = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 16,
    "seq_length": 256,
    "max_position_embeddings": 256,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-6,
    "layernorm_epsilon": 1e-6,
    "apply_layernorm_1p": False,
    "layernorm_zero_centered_gamma": False,
    "swiglu": True,
    "squared_relu": False,
    "openai_gelu": False,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "rotary_seq_len_interpolation_factor": None,
    "window_size": None,
    "window_attn_skip_freq": None,
    "untie_embeddings_and_output_weights": True,
    "padded_vocab_size": 256,
    "vocab_size": 101,
    "make_vocab_size_divisible_by": 128,
    "tokenizer_type": "HuggingFaceTokenizer",
    "params_dtype": TorchDtype("bfloat16"),
    "bf16": True,
    "fp16": False,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": None,
    "num_layers_per_virtual_pipeline_stage": None,
    "num_virtual_stages_per_pipeline_rank": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "pipeline_model_parallel_layout": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 2,
    "transformer_impl": "transformer_engine",
    "ckpt_format": "torch_dist",
    "use_dist_ckpt": True,
    "iteration": 0,
    "no_save_optim": True,
    "no_save_rng": True,
    "num_experts": None,
    "multi_latent_attention": False,
    "mtp_num_layers": None,
}
MIXTURE = {
    "num_experts": 4,
    "moe_ffn_hidden_size": 24,
    "moe_layer_freq": 1,
    "moe_router_topk": 2,
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_topk_scaling_factor": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False,
}
# family, changes to the config, changes to the arguments.
CASES = [
    ("llama", {}, {}),
    ("llama", {"num_key_value_heads": 4}, {"num_query_groups": 4, "group_query_attention": False}),
    ("llama", {"head_dim": 32}, {"kv_channels": 32}),
    ("llama", {"tie_word_embeddings": True}, {"untie_embeddings_and_output_weights": False}),
    ("llama", {"rope_theta": 500000.0}, {"rotary_base": 500000}),
    ("llama", {"rms_norm_eps": 1e-5}, {"norm_epsilon": 1e-5, "layernorm_epsilon": 1e-5}),
    ("llama", {"attention_bias": True, "mlp_bias": True}, {"add_bias_linear": True}),
    ("llama", {"rope_scaling": LLAMA3}, {"use_rope_scaling": True}),
    (
        "llama",
        {"rope_scaling": LLAMA3 | {"factor": 32.0}},
        {"use_rope_scaling": True, "rope_scaling_factor": 32.0},
    ),
    (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rotary_seq_len_interpolation_factor": 2},
    ),
    (
        "llama",
        {"torch_dtype": "float16"},
        {"params_dtype": TorchDtype("float16"), "bf16": False, "fp16": True},
    ),
    (
        "llama",
        {"torch_dtype": "float32"},
        {"params_dtype": TorchDtype("float32"), "bf16": False, "fp16": False},
    ),
    ("mistral", {"sliding_window": None}, {}),
    ("mistral", {"sliding_window": 8}, {"window_size": (7, 0)}),
    ("qwen2", {}, {"add_qkv_bias": True}),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
        {"add_qkv_bias": True, "window_size": (7, 0), "window_attn_skip_freq": [0, 0, 0, 1]},
    ),
    ("qwen3", {}, {"qk_layernorm": True, "kv_channels": 128}),
    (
        "mixtral",
        {"num_local_experts": 4},
        MIXTURE | {"moe_ffn_hidden_size": 96, "rotary_base": 1000000},
    ),
    (
        "qwen2_moe",
        {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
        MIXTURE
        | {
            "add_qkv_bias": True,
            "moe_router_topk": 3,
            "moe_router_pre_softmax": True,
            "moe_shared_expert_intermediate_size": 5632,
            "moe_shared_expert_gate": True,
        },
    ),
    (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        | {"norm_topk_prob": True, "mlp_only_layers": [0], "decoder_sparse_step": 1},
        MIXTURE | {"qk_layernorm": True, "moe_layer_freq": [0, 1, 1, 1]},
    ),
]


def write(spec, *, tp=2, pipeline=Pipeline(2), source_args=None, **changes):  # noqa: B008 - frozen
    options = {
        "padded_vocab_size": 256,
        "true_vocab_size": 101,
        "make_vocab_size_divisible_by": 128,
        "iteration": 0,
        "transformer_impl": "transformer_engine",
        "ckpt_format": "torch_dist",
    } | changes
    return args_from_spec(spec, tp=tp, pipeline=pipeline, source_args=source_args, **options)


def small(family, **changes):
    return spec_from_config(SMALL | changes, family)


@pytest.mark.parametrize(("family", "config", "expected"), CASES)
def test_args_say_what_the_config_says(family, config, expected):
    args = write(small(family, **config))
    wanted = COMMON | expected
    assert {name: args[name] for name in wanted} == wanted


@pytest.mark.parametrize(("family", "config", "expected"), CASES)
def test_args_of_megatron_alone_give_the_model(family, config, expected):
    """Without our note: all but the family's name is in Megatron's own words."""
    spec = small(family, **config)
    found = spec_from_args(COMMON | expected, family)
    kept = {name: value for name, value in spec.extra.items() if name != "max_window_layers"}
    assert found == replace(spec, extra=kept)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        *((family, config) for family, config, _ in CASES),
        ("llama", {"rope_scaling": YARN}),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 3.0}}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.5}}),
        ("llama", {"rope_scaling": LLAMA3 | {"low_freq_factor": 2.0}}),
    ],
)
def test_a_model_comes_back_as_it_was(family, config):
    spec = small(family, **config)
    again = spec_from_args(write(spec))
    assert again == spec
    assert config_from_spec(again) == config_from_spec(spec)


def test_everything_megatron_restores_is_there():
    assert [name for name in RESTORED.split() if name not in write(small("llama"))] == []


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        ({"window_size": (7, 0)}, "mistral"),
        ({"add_qkv_bias": True}, "qwen2"),
        ({"add_qkv_bias": True, "window_size": (7, 0), "window_attn_skip_freq": 2}, "qwen2"),
        ({"qk_layernorm": True}, "qwen3"),
        ({"add_bias_linear": True}, "llama"),
        ({"window_size": (-1, 0)}, "llama"),
        ({"window_size": (7, 0), "window_attn_skip_freq": 2}, "gpt"),
        ({"qk_layernorm": True, "add_qkv_bias": True}, "gpt"),
        ({"normalization": "LayerNorm"}, "gpt"),
        ({"swiglu": False}, "gpt"),
        ({"apply_layernorm_1p": True}, "gpt"),
        ({"layernorm_zero_centered_gamma": True}, "gpt"),
        ({"rotary_interleaved": True}, "glm"),
        ({"rotary_percent": 0.5, "kv_channels": 16}, "phi3"),
        ({"position_embedding_type": "learned_absolute"}, "gpt"),
        (MIXTURE | {"moe_ffn_hidden_size": None}, "mixtral"),
        (MIXTURE, "gpt"),  # experts of a size of their own, neither norms nor biases
        (MIXTURE | {"qk_layernorm": True}, "qwen3_moe"),
        (MIXTURE | {"moe_ffn_hidden_size": 96, "moe_router_pre_softmax": True}, "gpt"),
        (MIXTURE | {"qk_layernorm": True, "moe_router_score_function": "sigmoid"}, "gpt"),
        (
            MIXTURE | {"qk_layernorm": True, "moe_router_load_balancing_type": "sinkhorn"},
            "gpt",
        ),
    ],
)
def test_the_family_follows_from_the_switches(changes, family):
    assert spec_from_args(COMMON | changes).family == family


def test_skip_frequency_counts_layers_from_one():
    args = COMMON | {"add_qkv_bias": True, "window_size": (7, 0), "window_attn_skip_freq": 2}
    spec = spec_from_args(args)
    inside, outside = "sliding_attention", "full_attention"
    assert spec.extra == {"sliding_window": 8, "layer_types": [inside, outside] * 2}


def test_a_known_family_overrules_the_guess_but_not_the_args():
    assert spec_from_args(COMMON, "mistral").architecture == "MistralForCausalLM"
    with pytest.raises(SchemaError, match=r"family qwen3, the args are not: .*qk_layernorm False"):
        spec_from_args(COMMON, "qwen3")


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"group_query_attention": False, "num_query_groups": 1}, {"num_query_groups": 4}),
        ({"kv_channels": None}, {"kv_channels": 16}),
        ({"params_dtype": None, "fp16": True, "bf16": False}, {"dtype": "float16"}),
        ({"params_dtype": "torch.bfloat16"}, {"dtype": "bfloat16"}),
        ({"layernorm_epsilon": None}, {"norm_epsilon": 1e-6}),
        ({"norm_epsilon": None}, {"norm_epsilon": 1e-6}),
        ({"add_bias_linear": None, "disable_bias_linear": True}, {"add_bias_linear": False}),
        ({"swiglu": False, "squared_relu": True}, {"activation": "squared_relu"}),
        ({"swiglu": False}, {"activation": "gelu"}),
        (
            {"position_embedding_type": None, "use_rotary_position_embeddings": True},
            {"position_embedding_type": "rope"},
        ),
    ],
)
def test_other_megatron_s_spellings_are_read(changes, facts):
    spec = spec_from_args(COMMON | changes)
    assert {name: getattr(spec, name) for name in facts} == facts


@pytest.mark.parametrize(
    ("frequency", "layers"),
    [
        (1, ()),
        (2, (True, False, True, False)),
        ([0, 1, 1, 0], (False, True, True, False)),
        ([1, 1, 1, 1], (True, True, True, True)),
        ("([0]*1+[1]*3)", (False, True, True, True)),
        ("[1, 0] * 2", (True, False, True, False)),
        ("1", ()),
        (None, ()),
    ],
)
def test_the_pattern_of_mixtures_is_read_and_written(frequency, layers):
    spec = spec_from_args(COMMON | MIXTURE | {"moe_layer_freq": frequency})
    assert spec.moe_layers == layers
    assert spec.homogeneous == (not layers)
    assert write(spec)["moe_layer_freq"] == ([int(moe) for moe in layers] or 1)


@pytest.mark.parametrize(
    "frequency",
    ["[1]*3", "[2]*4", "__import__('os').abort()", "[1]*4000000000", "[" * 999, "1.5", [1, 1], 0.5],
)
def test_a_pattern_that_is_none_is_refused(frequency):
    with pytest.raises(SchemaError, match="moe_layer_freq"):
        spec_from_args(COMMON | MIXTURE | {"moe_layer_freq": frequency})


def test_one_expert_per_token_has_no_softmax_of_its_own():
    spec = small("mixtral", num_local_experts=4, num_experts_per_tok=1)
    with pytest.raises(SchemaError, match="one expert per token and normalised"):
        write(spec)


def test_missing_args_are_all_named():
    args = {name: value for name, value in COMMON.items() if "epsilon" not in name}
    del args["hidden_size"], args["num_layers"], args["num_query_groups"]
    with pytest.raises(
        SchemaError,
        match=r"num_layers, hidden_size, norm_epsilon \(or layernorm_epsilon\), num_query_groups; "
        r".*--hf-base",
    ):
        spec_from_args(args)


def test_sizes_of_latent_attention_must_be_there():
    with pytest.raises(SchemaError, match="do not say kv_lora_rank, qk_head_dim, qk_pos_emb"):
        spec_from_args(COMMON | {"multi_latent_attention": True, "v_head_dim": 16})


@pytest.mark.parametrize(
    "changes", [{"moe_latent_size": 8}, {"experimental_attention_variant": "dsa"}]
)
def test_what_is_not_there_yet_is_named(changes):
    with pytest.raises(SchemaError, match=f"{next(iter(changes))} .* cannot be converted yet"):
        spec_from_args(COMMON | changes)


def test_source_args_stay_where_nothing_changed():
    source = COMMON | {
        "lr": 3e-4,
        "tokenizer_type": "Llama3Tokenizer",
        "seq_length": 128,
        "consumed_train_samples": 77,
        "hidden_dropout": 0.1,
        "disable_bias_linear": True,
        "use_distributed_optimizer": True,
    }
    args = write(
        spec_from_args(source), tp=1, pipeline=Pipeline(1), ckpt_format="torch", source_args=source
    )
    kept = ("lr", "tokenizer_type", "seq_length", "consumed_train_samples", "hidden_dropout")
    assert {name: args[name] for name in kept} == {name: source[name] for name in kept}
    assert args["tensor_model_parallel_size"] == args["pipeline_model_parallel_size"] == 1
    assert (args["ckpt_format"], args["use_dist_ckpt"]) == ("torch", False)
    assert args["use_distributed_optimizer"] is False
    assert "disable_bias_linear" not in args


@pytest.mark.parametrize(
    ("pipeline", "per_stage", "stages"),
    [
        (Pipeline(2), None, None),
        (Pipeline(2, 2), 1, None),
        (Pipeline(2, 2, first=2), None, 2),
        (Pipeline(2, 2, layout="Et|t|t|tL"), None, None),
    ],
)
def test_virtual_stages_are_said_in_one_way(pipeline, per_stage, stages):
    args = write(small("llama"), pipeline=pipeline)
    assert args["num_layers_per_virtual_pipeline_stage"] == per_stage
    assert args["num_virtual_stages_per_pipeline_rank"] == stages
    assert Pipeline.from_args(args) == pipeline


@pytest.mark.parametrize(
    ("family", "config", "named"),
    [
        ("llama", {"attention_bias": True}, "attention_bias=true only"),
        ("llama", {"mlp_bias": True}, "mlp_bias=true only"),
        ("qwen3", {"attention_bias": True}, "attention_bias=true only"),
    ],
)
def test_biases_that_megatron_has_not_are_refused(family, config, named):
    spec = small(family, **config)
    (problem,) = unsupported_by_megatron(spec)
    assert named in problem
    with pytest.raises(SchemaError, match=named):
        write(spec)


@pytest.mark.parametrize(("family", "config", "_expected"), CASES)
def test_nothing_else_is_refused(family, config, _expected):
    assert unsupported_by_megatron(small(family, **config)) == []


@pytest.mark.parametrize(
    ("family", "config", "settings"),
    [
        ("llama", {}, []),
        ("llama", {"rope_scaling": LLAMA3}, []),
        ("llama", {"rope_scaling": LLAMA3 | {"factor": 32.0}}, ["rope_scaling_factor=32"]),
        (
            "llama",
            {"rope_scaling": LLAMA3 | {"low_freq_factor": 2.0, "factor": 4.0}},
            ["rope_scaling_factor=4", "low_freq_factor 2.0"],
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            ["--rotary-seq-len-interpolation-factor 2;"],
        ),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.5}}, ["linear scaling"]),
        ("llama", {"rope_scaling": YARN}, ["yarn scaling"]),
        ("mistral", {"sliding_window": 4096}, ["--window-size 4095,0"]),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            ["--window-size 7,0 --window-attn-skip-freq [0,0,1,1]"],
        ),
    ],
)
def test_notes_name_the_setting(family, config, settings):
    found = notes(small(family, **config))
    assert len(found) == len(settings)
    for note, setting in zip(found, settings, strict=True):
        assert setting in note


def test_launch_flags_are_what_megatron_does_not_restore():
    spec = small("qwen3", rope_scaling=LLAMA3, torch_dtype="float16")
    assert launch_flags(spec) == [
        *("--norm-epsilon", "1e-06", "--qk-layernorm"),
        *("--use-rope-scaling", "--rope-scaling-factor", "8.0", "--fp16"),
    ]
    assert launch_flags(small("llama", torch_dtype="float32")) == ["--norm-epsilon", "1e-06"]
    assert "--moe-shared-expert-gate" in launch_flags(small("qwen2_moe"))
    grouped = replace(small("qwen3_moe"), moe_router_num_groups=4, moe_router_group_topk=2)
    assert launch_flags(grouped)[-5:-1] == [
        *("--moe-router-num-groups", "4", "--moe-router-group-topk", "2"),
    ]
