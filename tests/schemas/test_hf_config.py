"""Configs against transformers' own classes: what they read, and the models they build."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest

from ckptx.errors import SchemaError

from .named import config_from_spec, differences, merge_config, spec_from_config, table

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
    "olmoe": "Olmoe",
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def published(family, hidden, ffn, layers, heads, groups, vocab, positions, eps, theta, **more):
    """A config.json as transformers 4 spells it."""
    return {
        "architectures": [f"{CLASSES[family]}ForCausalLM"],
        "model_type": family,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "rms_norm_eps": eps,
        "rope_theta": theta,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0",
    } | more


QWEN_OFF = {"use_sliding_window": False, "sliding_window": 32768}
PUBLISHED = {
    # No rope_theta and head_dim then; num_key_value_heads came with Llama 2.
    "Llama-2-7B": {
        key: value
        for key, value in published(
            "llama", 4096, 11008, 32, 32, 32, 32000, 4096, 1e-5, None,
            rope_scaling=None, tie_word_embeddings=False, torch_dtype="float16",
        ).items()
        if key != "rope_theta"
    },
    "Llama-1-7B": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "torch_dtype": "float16",
    },
    "Llama-3.1-8B": published(
        "llama", 4096, 14336, 32, 32, 8, 128256, 131072, 1e-5, 500000.0,
        rope_scaling=LLAMA3, attention_bias=False, mlp_bias=False, tie_word_embeddings=False,
    ),
    "Llama-3.2-1B": published(
        "llama", 2048, 8192, 16, 32, 8, 128256, 131072, 1e-5, 500000.0,
        rope_scaling=LLAMA3 | {"factor": 32.0}, head_dim=64, tie_word_embeddings=True,
    ),
    "Yi-6B": published(
        "llama", 4096, 11008, 32, 32, 4, 64000, 4096, 1e-5, 5000000.0, tie_word_embeddings=False,
    ),
    "Mistral-7B-v0.1": published(
        "mistral", 4096, 14336, 32, 32, 8, 32000, 32768, 1e-5, 10000.0, sliding_window=4096,
    ),
    "Mistral-7B-v0.3": published(
        "mistral", 4096, 14336, 32, 32, 8, 32768, 32768, 1e-5, 1000000.0, sliding_window=None,
    ),
    "Qwen2.5-0.5B": published(
        "qwen2", 896, 4864, 24, 14, 2, 151936, 32768, 1e-6, 1000000.0,
        tie_word_embeddings=True, max_window_layers=24, **QWEN_OFF,
    ),
    "Qwen2.5-7B": published(
        "qwen2", 3584, 18944, 28, 28, 4, 152064, 131072, 1e-6, 1000000.0,
        tie_word_embeddings=False, max_window_layers=28, **QWEN_OFF,
    ),
    "Qwen3-0.6B": published(
        "qwen3", 1024, 3072, 28, 16, 8, 151936, 40960, 1e-6, 1000000,
        head_dim=128, tie_word_embeddings=True, attention_bias=False, max_window_layers=28,
        rope_scaling=None, use_sliding_window=False, sliding_window=None,
    ),
    "Qwen3-8B": published(
        "qwen3", 4096, 12288, 36, 32, 8, 151936, 40960, 1e-6, 1000000,
        head_dim=128, tie_word_embeddings=False, attention_bias=False, max_window_layers=36,
        rope_scaling=None, use_sliding_window=False, sliding_window=None,
    ),
    "Mixtral-8x7B": published(
        "mixtral", 4096, 14336, 32, 32, 8, 32000, 32768, 1e-5, 1000000.0,
        sliding_window=None, num_local_experts=8, num_experts_per_tok=2,
        tie_word_embeddings=False,
    ),
    "Qwen1.5-MoE-A2.7B": published(
        "qwen2_moe", 2048, 5632, 24, 16, 16, 151936, 8192, 1e-6, 1000000.0,
        decoder_sparse_step=1, moe_intermediate_size=1408, shared_expert_intermediate_size=5632,
        num_experts=60, num_experts_per_tok=4, norm_topk_prob=False, max_window_layers=21,
        tie_word_embeddings=False, **QWEN_OFF,
    ),
    "Qwen3-30B-A3B": published(
        "qwen3_moe", 2048, 6144, 48, 32, 4, 151936, 40960, 1e-6, 1000000.0,
        head_dim=128, attention_bias=False, decoder_sparse_step=1, mlp_only_layers=[],
        moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
        rope_scaling=None, use_sliding_window=False, sliding_window=None, max_window_layers=48,
        tie_word_embeddings=False,
    ),
    "OLMoE-1B-7B": published(
        "olmoe", 2048, 1024, 16, 16, 16, 50304, 4096, 1e-5, 10000.0,
        attention_bias=False, clip_qkv=None, norm_topk_prob=False, num_experts=64,
        num_experts_per_tok=8, rope_scaling=None, tie_word_embeddings=False,
    ),
}  # fmt: skip

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 16384,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
VARIANTS = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": None}),
    ("llama", {"num_key_value_heads": 1, "head_dim": 32}),
    ("llama", {"tie_word_embeddings": True, "dtype": "bfloat16"}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5}}),
    ("llama", {"rope_theta": 5e6, "rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    ("mistral", {}),
    ("mistral", {"sliding_window": None, "head_dim": 8}),
    ("mistral", {"sliding_window": 7, "tie_word_embeddings": True}),
    ("qwen2", {}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 9}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 9}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 9}),
    ("qwen2", {"rope_parameters": {"rope_theta": 1e6, **YARN}, "tie_word_embeddings": True}),
    ("qwen3", {}),
    ("qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    ("qwen3", {"attention_bias": True}),
    (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
]
MIXTURES = [
    ("mixtral", {"num_local_experts": 4}),
    ("mixtral", {"num_experts_per_tok": 3, "sliding_window": 7}),
    ("qwen2_moe", {"num_experts": 4, "shared_expert_intermediate_size": 48}),
    ("qwen2_moe", {"norm_topk_prob": True, "mlp_only_layers": [1]}),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "norm_topk_prob": True, "head_dim": 24}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1]}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 9}),
    ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "attention_bias": True}),
]
DENSE, VARIANTS = VARIANTS, VARIANTS + MIXTURES
IDS = [
    f"{family}-{'-'.join(changes) or 'plain'}-{n}" for n, (family, changes) in enumerate(VARIANTS)
]


def config_of(family, **values):
    return getattr(transformers, f"{CLASSES[family]}Config")(**values)


def save(config, folder):
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def read(config, folder):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return transformers.AutoConfig.from_pretrained(folder)


def meaning(config):
    """What of a transformers config decides about a forward pass and the weights."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    rope = {key: value for key, value in config.rope_parameters.items() if key != "type"}
    heads = config.hidden_size // config.num_attention_heads
    return {
        "class": type(config).__name__,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope": rope,
        "attention_bias": getattr(config, "attention_bias", None),
        "mlp_bias": getattr(config, "mlp_bias", None),
        "window": window if types is None or "sliding_attention" in types else None,
        "layer_types": types,
        "hidden_act": config.hidden_act,
        "attention_dropout": config.attention_dropout,
        **{name: getattr(config, name, None) for name in ROUTING},
        "mixtures": mixtures(config),
        "dtype": config.dtype or torch.float32,
    }


ROUTING = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "norm_topk_prob",
)


def mixtures(config):
    """The layers with experts, as the decoder layers of Qwen's models decide it."""
    step = getattr(config, "decoder_sparse_step", 1)
    layers = range(config.num_hidden_layers)
    dense = getattr(config, "mlp_only_layers", [])
    return [n for n in layers if n not in dense and (n + 1) % step == 0]


def shapes(config):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


def shapes_by_spec(spec):
    """The parameters of a Llama-like model, from the spec alone."""
    hidden, ffn = spec.hidden_size, spec.ffn_hidden_size
    query = spec.num_attention_heads * spec.kv_channels
    key = spec.num_query_groups * spec.kv_channels
    every = spec.add_bias_linear
    found = {
        "model.embed_tokens.weight": (spec.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not spec.tied:
        found["lm_head.weight"] = (spec.vocab_size, hidden)
    linears = {
        "self_attn.q_proj": (query, hidden, every or spec.add_qkv_bias),
        "self_attn.k_proj": (key, hidden, every or spec.add_qkv_bias),
        "self_attn.v_proj": (key, hidden, every or spec.add_qkv_bias),
        "self_attn.o_proj": (hidden, query, every or spec.extra.get("attention_out_bias")),
        "mlp.gate_proj": (ffn, hidden, every or spec.extra.get("mlp_bias")),
        "mlp.up_proj": (ffn, hidden, every or spec.extra.get("mlp_bias")),
        "mlp.down_proj": (hidden, ffn, every or spec.extra.get("mlp_bias")),
    }
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}{norm}.weight"] = (hidden,)
        for name, (rows, columns, bias) in linears.items():
            found[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                found[f"{prefix}{name}.bias"] = (rows,)
        if spec.qk_layernorm:
            for norm in ("q_norm", "k_norm"):
                found[f"{prefix}self_attn.{norm}.weight"] = (spec.kv_channels,)
    return found


@pytest.fixture
def no_warnings(caplog):
    """Fails the test if transformers warns: its logger does not propagate by itself."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("family", CLASSES)
def test_an_empty_config_has_the_defaults_of_its_class(family, tmp_path):
    ours = config_from_spec(spec_from_config({}, family))
    assert meaning(read(ours, tmp_path)) == meaning(config_of(family))


@pytest.mark.parametrize("family", CLASSES)
def test_the_default_table_is_the_class_s(family):
    config = config_of(family)
    assert {
        key: value
        for key, value in table(family).defaults.items()
        if value is not None and getattr(config, key, value) != value
    } in ({}, {"sliding_window": 4096})  # an unused window is read as None


@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=IDS)
def test_a_synthesised_config_means_what_the_saved_one_means(family, changes, tmp_path):
    original = config_of(family, **TINY | changes)
    saved = save(original, tmp_path)
    spec = spec_from_config(saved, family)
    again = read(config_from_spec(spec), tmp_path / "again")
    assert meaning(again) == meaning(original)
    assert spec_from_config(save(again, tmp_path), family) == spec


@pytest.mark.parametrize(("family", "changes"), DENSE, ids=IDS[: len(DENSE)])
def test_the_spec_has_the_model_s_parameters(family, changes, tmp_path):
    original = config_of(family, **TINY | changes)
    spec = spec_from_config(save(original, tmp_path), family)
    assert shapes_by_spec(spec) == shapes(original)


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=IDS)
def test_an_unchanged_config_does_not_differ(family, changes, tmp_path):
    saved = save(config_of(family, **TINY | changes), tmp_path)
    spec = spec_from_config(saved, family)
    assert differences(saved, spec) == []
    assert merge_config(saved, spec) == saved


@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_keep_their_meaning(name, tmp_path):
    config = PUBLISHED[name]
    spec = spec_from_config(config, config["model_type"])
    ours = config_from_spec(spec)
    assert meaning(read(ours, tmp_path / "a")) == meaning(read(config, tmp_path / "b"))
    assert differences(config, spec) == []
    # transformers 4 reads these and nothing else.
    assert ours["rope_theta"] == (config.get("rope_theta") or 10000.0)
    assert ours["rope_scaling"] == config.get("rope_scaling")
    assert ours["torch_dtype"] == config["torch_dtype"]


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("Llama-1-7B", {"num_query_groups": 32, "norm_epsilon": 1e-6, "dtype": "float16"}),
        ("Llama-3.1-8B", {"rotary_base": 500000.0, "rotary_scaling": LLAMA3, "tied": False}),
        ("Llama-3.2-1B", {"kv_channels": 64, "tied": True}),
        ("Mistral-7B-v0.1", {"extra": {"sliding_window": 4096}, "rotary_base": 10000.0}),
        ("Mistral-7B-v0.3", {"extra": {}, "rotary_base": 1000000.0}),
        (
            "Qwen2.5-0.5B",
            {"add_qkv_bias": True, "tied": True, "extra": {"max_window_layers": 24}},
        ),
        (
            "Qwen3-0.6B",
            {"qk_layernorm": True, "kv_channels": 128, "add_qkv_bias": False, "tied": True},
        ),
    ],
)
def test_published_configs_read_as_known(name, facts):
    spec = spec_from_config(PUBLISHED[name], PUBLISHED[name]["model_type"])
    assert {key: getattr(spec, key) for key in facts} == facts


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        (
            "Mixtral-8x7B",
            {"num_experts": 8, "moe_ffn_hidden_size": 14336, "moe_router_pre_softmax": False},
        ),
        (
            "Qwen1.5-MoE-A2.7B",
            {
                "num_experts": 60,
                "moe_ffn_hidden_size": 1408,
                "moe_router_topk": 4,
                "moe_router_pre_softmax": True,
                "moe_shared_expert_intermediate_size": 5632,
                "moe_shared_expert_gate": True,
                "moe_layers": (),
            },
        ),
        (
            "Qwen3-30B-A3B",
            {"num_experts": 128, "moe_router_topk": 8, "moe_router_pre_softmax": False},
        ),
    ],
)
def test_published_mixtures_read_as_known(name, facts):
    spec = spec_from_config(PUBLISHED[name], PUBLISHED[name]["model_type"])
    assert {key: getattr(spec, key) for key in facts} == facts


def test_contradictions_of_a_mixture_are_named_and_the_source_wins():
    config = PUBLISHED["Qwen3-30B-A3B"]
    trained = replace(
        spec_from_config(config, "qwen3_moe"),
        num_experts=64,
        moe_router_topk=4,
        moe_router_pre_softmax=True,
        moe_layers=(False, *[True] * 47),
    )
    assert differences(config, trained) == [
        "num_experts: config 128, source args 64",
        "num_experts_per_tok: config 8, source args 4",
        "norm_topk_prob: config True, source args False",
        "mlp_only_layers: config [], source args [0]",
    ]
    merged = merge_config(config, trained)
    assert differences(merged, trained) == []
    assert merged["num_local_experts"] == merged["num_experts"] == 64


def test_a_contradiction_is_named_and_the_source_wins():
    config = PUBLISHED["Llama-2-7B"] | {"custom": 1, "bos_token_id": 1}
    spec = replace(
        spec_from_config(config, "llama"),
        rotary_base=500000.0,
        max_position_embeddings=8192,
        dtype="bfloat16",
        vocab_size=None,
    )
    assert differences(config, spec) == [
        "max_position_embeddings: config 4096, source args 8192",
        "rope_theta: config 10000, source args 500000",
        "dtype: config float16, source args bfloat16",
    ]
    merged = merge_config(config, spec)
    assert merged["torch_dtype"] == "bfloat16"
    assert "dtype" not in merged
    assert (merged["custom"], merged["bos_token_id"], merged["vocab_size"]) == (1, 1, 32000)
    assert differences(merged, spec) == []


def test_a_merged_config_keeps_the_spelling_it_had(tmp_path):
    new = save(config_of("llama", **TINY, rope_parameters={"rope_theta": 1e4, **LLAMA3}), tmp_path)
    spec = replace(spec_from_config(new, "llama"), rotary_base=7e4, rotary_scaling=None)
    merged = merge_config(new, spec)
    assert merged["rope_parameters"] == {"rope_theta": 70000.0, "rope_type": "default"}
    assert "rope_theta" not in merged
    assert "rope_scaling" not in merged
    old = PUBLISHED["Llama-3.1-8B"]
    merged = merge_config(old, replace(spec_from_config(old, "llama"), rotary_scaling=None))
    assert merged["rope_scaling"] is None
    assert "rope_parameters" not in merged


def test_a_merged_config_takes_biases_windows_and_family():
    llama = spec_from_config(PUBLISHED["Llama-2-7B"], "llama")
    biased = replace(llama, add_bias_linear=True)
    merged = merge_config(PUBLISHED["Llama-2-7B"], biased)
    assert (merged["attention_bias"], merged["mlp_bias"]) == (True, True)
    mistral = spec_from_config(PUBLISHED["Mistral-7B-v0.1"], "mistral")
    assert merge_config(PUBLISHED["Mistral-7B-v0.3"], mistral)["sliding_window"] == 4096
    assert differences(PUBLISHED["Llama-2-7B"], mistral)[0] == (
        "model_type: config llama, source args mistral"
    )
    renamed = merge_config(PUBLISHED["Llama-2-7B"], mistral)
    assert renamed["architectures"] == ["MistralForCausalLM"]
    assert spec_from_config(renamed, "mistral") == mistral


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_size": 65, "num_attention_heads": 4}, "does not divide over 4 heads"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4, "head_dim": 8}, "6 heads do not"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok 5 of num_experts 4"),
        ({"num_experts": 4, "num_local_experts": 5}, "contradict each other"),
        ({"qkv_bias": False}, "qkv_bias is False"),
        (
            {"rope_parameters": {"a": {"rope_theta": 1.0}, "b": {"rope_theta": 2.0}}},
            "differ between layer types",
        ),
    ],
)
def test_a_config_that_cannot_be_is_refused(config, message):
    family = {"num_local_experts": "qwen3_moe", "num_experts": "olmoe", "qkv_bias": "qwen2_moe"}
    with pytest.raises(SchemaError, match=message):
        spec_from_config(config, next((family[key] for key in family if key in config), "llama"))


def test_an_unknown_family_is_refused():
    with pytest.raises(SchemaError, match="unknown model family 'bloom'"):
        spec_from_config({}, "bloom")
    with pytest.raises(SchemaError, match="model_type 'bloom'"):
        differences({"model_type": "bloom"}, spec_from_config({}, "llama"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "LayerNorm"}, "normalization LayerNorm"),
        ({"activation": "gelu"}, "activation gelu"),
        ({"qk_layernorm": True}, "qk_layernorm True"),
        ({"add_qkv_bias": True}, "biases on qkv"),
        ({"rotary_percent": 0.5}, "rotary_percent 0.5"),
        ({"extra": {"sliding_window": 5}}, "sliding windows"),
        ({"extra": {"layernorm_zero_centered_gamma": True}}, "layernorm_zero_centered_gamma"),
        ({"num_experts": 4, "moe_ffn_hidden_size": 8}, "does not have: experts"),
        ({"family": "gpt", "architecture": "GPTModel"}, "no Hugging Face family"),
    ],
)
def test_what_a_family_cannot_say_is_refused(changes, message):
    spec = replace(spec_from_config({}, "llama"), **changes)
    for refuse in (config_from_spec, lambda spec: merge_config({}, spec)):
        with pytest.raises(SchemaError, match=message):
            refuse(spec)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mixtral", {"moe_router_pre_softmax": True}, "do not add up to one"),
        ("mixtral", {"moe_layers": (False, *[True] * 31)}, "dense layers between mixtures"),
        ("mixtral", {"moe_ffn_hidden_size": 8}, "experts of a size of their own"),
        ("mixtral", {"num_experts": None}, "no experts"),
        ("qwen3_moe", {"moe_router_enable_expert_bias": True}, "expert biases"),
        ("qwen3_moe", {"moe_router_score_function": "sigmoid"}, "sigmoid scores"),
        ("qwen3_moe", {"moe_router_group_topk": 2}, "groups of experts"),
        ("qwen3_moe", {"moe_router_topk_scaling_factor": 2.5}, "scaled probabilities"),
        ("qwen3_moe", {"moe_shared_expert_intermediate_size": 8}, "a shared expert"),
        ("qwen2_moe", {"moe_shared_expert_gate": False}, "a shared expert without a gate"),
        ("qwen2_moe", {"extra": {"moe_router_load_balancing_type": "sinkhorn"}}, "sinkhorn"),
    ],
)
def test_what_a_mixture_cannot_say_is_refused(family, changes, message):
    with pytest.raises(SchemaError, match=message):
        config_from_spec(replace(spec_from_config({}, family), **changes))


def test_an_unknown_vocabulary_is_refused():
    with pytest.raises(SchemaError, match="--true-vocab-size"):
        config_from_spec(replace(spec_from_config({}, "llama"), vocab_size=None))


def test_a_spec_is_made_of_plain_values():
    spec = spec_from_config(PUBLISHED["Llama-3.1-8B"], "llama")
    assert json.loads(json.dumps(config_from_spec(spec))) == config_from_spec(spec)
    assert json.dumps([dict(spec.extra), dict(spec.rotary_scaling)])
