"""The families: what each fixes, and the defaults of its config class in transformers.

Those defaults that matter here are the same in 4.x and 5.x.

Source: huggingface/transformers src/transformers/models/{llama,mistral,qwen2,qwen3,gpt2,gpt_neox,
phi3,gemma,gemma2,starcoder2,glm,glm4,olmo2,mixtral,qwen2_moe,qwen3_moe,olmoe,deepseek_v2,
deepseek_v3}/configuration_*.py and modeling_*.py @ v5.23.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptx.schemas.config.traits import SWITCHES, Biases, ConfigTable

_EVERYWHERE = Biases(True, True, True)
_LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_MISTRAL_DEFAULTS = _LLAMA_DEFAULTS | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "sliding_window": 4096,
}
_QWEN2_DEFAULTS = _LLAMA_DEFAULTS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GPT2_DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
}
_GPT_NEOX_DEFAULTS = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "attention_bias": True,
}
_MEGATRON_BERT_DEFAULTS = {
    "vocab_size": 29056,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "tie_word_embeddings": True,
}
_PHI3_DEFAULTS = _LLAMA_DEFAULTS | {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}
_GEMMA_DEFAULTS = _LLAMA_DEFAULTS | {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_GEMMA2_DEFAULTS = {key: value for key, value in _GEMMA_DEFAULTS.items() if key != "hidden_act"} | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
_STARCODER2_DEFAULTS = {
    "vocab_size": 49152,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "norm_epsilon": 1e-5,
    "use_bias": True,
    "sliding_window": None,
    "tie_word_embeddings": True,
}
_GLM_DEFAULTS = _LLAMA_DEFAULTS | {
    "vocab_size": 151552,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-7,
    "attention_bias": True,
}
_OLMO2_DEFAULTS = _LLAMA_DEFAULTS | {
    "vocab_size": 50304,
    "rms_norm_eps": 1e-5,
}
_MIXTRAL_DEFAULTS = _MISTRAL_DEFAULTS | {
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
}
_QWEN2_MOE_DEFAULTS = _QWEN2_DEFAULTS | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
_QWEN3_MOE_DEFAULTS = _QWEN2_MOE_DEFAULTS | {
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
_OLMOE_DEFAULTS = _LLAMA_DEFAULTS | {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
_DEEPSEEK_V2_DEFAULTS = {
    key: value for key, value in _LLAMA_DEFAULTS.items() if key != "head_dim"
} | {
    "vocab_size": 102400,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_DEEPSEEK_V3_DEFAULTS = _DEEPSEEK_V2_DEFAULTS | {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "max_position_embeddings": 4096,
    "num_nextn_predict_layers": 1,
}
_LATENT = (
    ("q_lora_rank", "q_lora_rank"),
    ("kv_lora_rank", "kv_lora_rank"),
    ("qk_nope_head_dim", "qk_head_dim"),
    ("qk_rope_head_dim", "qk_pos_emb_head_dim"),
)

# The same formula under several names; transformers src/transformers/activations.py ACT2FN.
_GELU = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
_GPT2_GELU = {name: _GELU[name] for name in ("gelu_new", *_GELU)}
# GemmaConfig reads "gelu", a mistake of the official releases, as the tanh form.
_GEMMA_GELU = {"gelu_pytorch_tanh": "geglu_tanh", "gelu": "geglu_tanh"}
_NO_HEAD_KEYS: Mapping[str, str | None] = {"num_key_value_heads": None, "head_dim": None}
_GEMMA_FIXED: Mapping[str, Any] = {
    "layernorm_zero_centered_gamma": True,
    "scale_embeddings": True,
}
_GLM_SWITCHES = {**SWITCHES, "attention_bias": Biases(qkv=True)}

FAMILIES: Mapping[str, ConfigTable] = {
    "llama": ConfigTable("LlamaForCausalLM", _LLAMA_DEFAULTS, ("attention_bias", "mlp_bias")),
    "mistral": ConfigTable("MistralForCausalLM", _MISTRAL_DEFAULTS, windows="all layers"),
    "qwen2": ConfigTable(
        "Qwen2ForCausalLM",
        _QWEN2_DEFAULTS,
        fixed_biases=Biases(qkv=True),
        windows="some layers",
    ),
    "qwen3": ConfigTable(
        "Qwen3ForCausalLM",
        _QWEN2_DEFAULTS | {"head_dim": 128},
        ("attention_bias",),
        qk_layernorm=True,
        windows="some layers",
    ),
    "gpt2": ConfigTable(
        "GPT2LMHeadModel",
        _GPT2_DEFAULTS,
        fixed_biases=_EVERYWHERE,
        names={
            **_NO_HEAD_KEYS,
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "rms_norm_eps": "layer_norm_epsilon",
            "hidden_act": "activation_function",
        },
        normalization="LayerNorm",
        activations=_GPT2_GELU,
        position_embedding_type="learned_absolute",
        dropouts=("attn_pdrop", "embd_pdrop", "resid_pdrop"),
        passthrough_keys={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
        },
    ),
    "gpt_neox": ConfigTable(
        "GPTNeoXForCausalLM",
        _GPT_NEOX_DEFAULTS,
        ("attention_bias",),
        fixed_biases=Biases(mlp=True),
        names={**_NO_HEAD_KEYS, "rms_norm_eps": "layer_norm_eps"},
        normalization="LayerNorm",
        activations=_GELU,
        rotary_percent=0.25,
        rotary_keys=("rotary_emb_base", "rotary_pct"),
        passthrough_keys={"use_parallel_residual": False},
    ),
    "phi3": ConfigTable(
        "Phi3ForCausalLM",
        _PHI3_DEFAULTS,
        names={"head_dim": None},
        windows="all layers",
        rotary_percent=1.0,
        scalings={"su": "longrope", "yarn": "longrope"},
        passthrough_keys={"original_max_position_embeddings": 4096},
    ),
    "gemma": ConfigTable(
        "GemmaForCausalLM",
        _GEMMA_DEFAULTS,
        ("attention_bias",),
        activations=_GEMMA_GELU,
        fixed=_GEMMA_FIXED,
    ),
    "gemma2": ConfigTable(
        "Gemma2ForCausalLM",
        _GEMMA2_DEFAULTS,
        ("attention_bias",),
        windows="layer types",
        names={"hidden_act": "hidden_activation"},
        activations={"gelu_pytorch_tanh": "geglu_tanh"},
        fixed=_GEMMA_FIXED,
        passthrough_keys={
            "query_pre_attn_scalar": None,
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
        },
    ),
    "starcoder2": ConfigTable(
        "Starcoder2ForCausalLM",
        _STARCODER2_DEFAULTS,
        ("use_bias",),
        windows="all layers",
        names={"head_dim": None, "rms_norm_eps": "norm_epsilon"},
        normalization="LayerNorm",
        activations={name: _GELU[name] for name in ("gelu_pytorch_tanh", *_GELU)},
    ),
    "glm": ConfigTable(
        "GlmForCausalLM",
        _GLM_DEFAULTS,
        ("attention_bias",),
        switches=_GLM_SWITCHES,
        rotary_percent=0.5,
        fixed={"rotary_interleaved": True},
    ),
    "glm4": ConfigTable(
        "Glm4ForCausalLM",
        _GLM_DEFAULTS,
        ("attention_bias",),
        switches=_GLM_SWITCHES,
        rotary_percent=0.5,
        fixed={"rotary_interleaved": True},
    ),
    "olmo2": ConfigTable(
        "Olmo2ForCausalLM",
        _OLMO2_DEFAULTS,
        ("attention_bias",),
        names={"head_dim": None},
    ),
    "mixtral": ConfigTable("MixtralForCausalLM", _MIXTRAL_DEFAULTS, windows="all layers"),
    "qwen2_moe": ConfigTable(
        "Qwen2MoeForCausalLM",
        _QWEN2_MOE_DEFAULTS,
        fixed_biases=Biases(qkv=True),
        windows="some layers",
    ),
    "qwen3_moe": ConfigTable(
        "Qwen3MoeForCausalLM",
        _QWEN3_MOE_DEFAULTS,
        ("attention_bias",),
        qk_layernorm=True,
        windows="all layers",
    ),
    "megatron-bert": ConfigTable(
        "MegatronBertForPreTraining",
        _MEGATRON_BERT_DEFAULTS,
        fixed_biases=_EVERYWHERE,
        names={**_NO_HEAD_KEYS, "rms_norm_eps": "layer_norm_eps"},
        normalization="LayerNorm",
        activations=_GPT2_GELU,
        position_embedding_type="learned_absolute",
        dropouts=("attention_probs_dropout_prob", "hidden_dropout_prob"),
    ),
    "olmoe": ConfigTable("OlmoeForCausalLM", _OLMOE_DEFAULTS, ("attention_bias",)),
    "deepseek_v2": ConfigTable(
        "DeepseekV2ForCausalLM",
        _DEEPSEEK_V2_DEFAULTS,
        ("attention_bias", "mlp_bias"),
        qk_layernorm=True,
        names={"head_dim": "v_head_dim"},
        latent=True,
        fields=_LATENT,
    ),
    "deepseek_v3": ConfigTable(
        "DeepseekV3ForCausalLM",
        _DEEPSEEK_V3_DEFAULTS,
        ("attention_bias",),
        qk_layernorm=True,
        names={"head_dim": "v_head_dim"},
        passthrough_keys={"rope_interleave": True},
        latent=True,
        fields=(*_LATENT, ("num_nextn_predict_layers", "mtp_num_layers")),
    ),
}

# Megatron switches that change what the weights mean; a family has each, always, or never.
MEGATRON_ONLY = (
    "layernorm_zero_centered_gamma",
    "rotary_interleaved",
    "qk_l2_norm",
    "no_rope_freq",
    "attention_output_gate",
)
