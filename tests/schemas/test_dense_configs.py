"""Configs of dense families against transformers' own classes, and through Megatron's args."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ckptx.errors import SchemaError
from ckptx.schemas.megatron_settings.args import (
    launch_flags,
    notes,
    spec_from_args,
    unsupported_by_megatron,
)

from .dense import CLASSES, CONFIGS
from .megatron import args_of
from .named import config_from_spec, differences, merge_config, spec_from_config, table

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# What says nothing of a forward pass or a weight, or says it in an older version's words besides.
ASIDE = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "transformers_version",
    "partial_rotary_factor",
    "rotary_pct",
    "rotary_emb_base",
    "head_dim",
    "n_inner",
    "dtype",
    "use_cache",
}


def config_of(family, values):
    return getattr(transformers, f"{CLASSES[family]}Config")(**values)


def saved(config, folder):
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def read(config, folder):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return transformers.AutoConfig.from_pretrained(folder)


def meaning(config):
    values = {key: value for key, value in config.to_dict().items() if key not in ASIDE}
    heads = config.hidden_size // config.num_attention_heads
    values["head size"] = getattr(config, "head_dim", None) or heads
    if values.get("hidden_act") == "gelu_new":
        values["hidden_act"] = "gelu_pytorch_tanh"  # two names of one formula
    if config.model_type == "gpt2":
        values["ffn"] = config.n_inner or 4 * config.n_embd
    if config.model_type == "phi3":
        values["rope_parameters"].pop("original_max_position_embeddings", None)  # said beside it
    return values


@pytest.mark.parametrize("family", CLASSES)
def test_an_empty_config_has_the_defaults_of_its_class(family, tmp_path):
    ours = config_from_spec(spec_from_config({}, family))
    assert meaning(read(ours, tmp_path)) == meaning(config_of(family, {}))


@pytest.mark.parametrize("family", CLASSES)
def test_the_default_table_is_the_class_s(family):
    config = config_of(family, {})
    ours = table(family).defaults
    assert {
        key: getattr(config, key, value)
        for key, value in ours.items()
        if value is not None and getattr(config, key, value) != value
    } == {}
    # Nothing is left to a default that the table does not have.
    keys = {table(family).key(name) for name in ("vocab_size", "hidden_act", "rms_norm_eps")}
    keys |= {key for key in table(family).bias_keys if getattr(config, key)}
    assert keys | set(table(family).passthrough_keys) <= set(ours) | {"model_type"}


def test_gpt2_in_the_usual_words(tmp_path):
    """Twelve heads, its default, would fit these weights as well as four do."""
    values = {
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "max_position_embeddings": 32,
    }
    spec = spec_from_config(values, "gpt2")
    assert meaning(read(config_from_spec(spec), tmp_path)) == meaning(config_of("gpt2", values))
    assert spec_from_config({**values, "n_head": 4}, "gpt2") == spec
    with pytest.raises(SchemaError, match="n_head is 12 and num_attention_heads is 4"):
        spec_from_config({**values, "n_head": 12}, "gpt2")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_synthesised_config_means_what_the_saved_one_means(name, tmp_path):
    family, values = CONFIGS[name]
    original = config_of(family, values)
    spec = spec_from_config(saved(original, tmp_path), family)
    again = read(config_from_spec(spec), tmp_path / "again")
    assert meaning(again) == meaning(original)
    assert spec_from_config(saved(again, tmp_path), family) == spec


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_4_reads_the_same_from_its_own_keys(name):
    """Its keys alone bring the spec back: rope_parameters and dtype came with 5."""
    family, values = CONFIGS[name]
    spec = spec_from_config({**config_of(family, values).to_dict(), "dtype": "bfloat16"}, family)
    ours = config_from_spec(spec)
    for key in ("rope_parameters", "dtype"):
        ours.pop(key, None)
    assert spec_from_config(ours, family) == spec


@pytest.mark.parametrize("name", CONFIGS)
def test_an_unchanged_config_does_not_differ(name, tmp_path):
    family, values = CONFIGS[name]
    config = saved(config_of(family, values), tmp_path)
    spec = spec_from_config(config, family)
    assert differences(config, spec) == []
    assert merge_config(config, spec) == config


@pytest.mark.parametrize(
    "name", [name for name in CONFIGS if CONFIGS[name][0] not in ("gemma2", "glm4", "olmo2")]
)
def test_args_bring_the_model_back(name, tmp_path):
    family, values = CONFIGS[name]
    spec = spec_from_config(saved(config_of(family, values), tmp_path), family)
    if unsupported_by_megatron(spec):
        with pytest.raises(SchemaError, match="Megatron"):
            args_of(spec)
        return
    args = args_of(spec)
    assert spec_from_args(args) == spec
    assert spec_from_args(args, family) == spec


def test_megatron_s_own_args_are_of_the_family_that_computes_the_same():
    expected = {
        "gpt2": "gpt2",
        "gpt_neox-sequential": "gpt_neox",
        "starcoder2": "starcoder2",
        "glm": "glm",
        "phi3": "llama",
    }
    for name, found in expected.items():
        family, values = CONFIGS[name]
        args = args_of(spec_from_config(config_of(family, values).to_dict(), family))
        del args["ckptx"]
        assert spec_from_args(args).family == found


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("gpt2", {"activation": "gelu_tanh", "add_bias_linear": True, "tied": True}),
        ("gpt2-untied", {"ffn_hidden_size": 128, "num_query_groups": 8, "kv_channels": 4}),
        ("gpt_neox", {"rotary_percent": 0.25, "extra": {"use_parallel_residual": True}}),
        ("gpt_neox-sequential", {"extra": {}, "activation": "gelu", "normalization": "LayerNorm"}),
        ("gemma", {"activation": "geglu_tanh", "gated": True, "norm_epsilon": 1e-4}),
        ("glm", {"rotary_percent": 0.5, "add_qkv_bias": True, "add_bias_linear": False}),
        ("starcoder2-no-bias", {"extra": {"sliding_window": 7}, "add_bias_linear": False}),
    ],
)
def test_configs_read_as_known(name, facts):
    family, values = CONFIGS[name]
    spec = spec_from_config(values, family)
    assert {key: getattr(spec, key) for key in facts} == facts


def test_published_configs_in_older_words():
    pythia = {"rotary_pct": 0.25, "rotary_emb_base": 20000, "use_parallel_residual": True}
    spec = spec_from_config(pythia, "gpt_neox")
    assert (spec.rotary_percent, spec.rotary_base) == (0.25, 20000.0)
    phi = {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [2.0]}}
    assert spec_from_config(phi, "phi3").rotary_scaling["rope_type"] == "longrope"
    # The first releases say "gelu" and compute the tanh form.
    assert spec_from_config({"hidden_act": "gelu"}, "gemma").activation == "geglu_tanh"
    assert spec_from_config({"partial_rotary_factor": 0.5}, "glm").rotary_percent == 0.5
    old_gemma2 = spec_from_config({"num_hidden_layers": 3}, "gemma2").extra["layer_types"]
    assert old_gemma2 == ["sliding_attention", "full_attention", "sliding_attention"]


def test_what_megatron_is_told_by_hand():
    def spec(name):
        return spec_from_config(CONFIGS[name][1], CONFIGS[name][0])

    assert notes(spec("gpt2")) == []
    assert "--no-bias-gelu-fusion" in launch_flags(spec("gpt2-exact"))
    assert "--no-bias-gelu-fusion" not in launch_flags(spec("gpt2"))
    assert "--apply-layernorm-1p" in launch_flags(spec("gemma"))
    assert "square root of hidden_size" in " ".join(notes(spec("gemma")))
    assert "without biases" in " ".join(notes(spec("starcoder2-no-bias")))
    assert "longrope" in " ".join(notes(spec("phi3-long")))


def test_a_contradiction_is_named_in_the_family_s_words():
    config = {"model_type": "gpt2", **CONFIGS["gpt2"][1], "dtype": "bfloat16"}
    spec = spec_from_config(config, "gpt2")
    other = replace(spec, activation="gelu", max_position_embeddings=128, tied=False)
    assert differences(config, other) == [
        "n_positions: config 64, source args 128",
        "tie_word_embeddings: config True, source args False",
        "activation_function: config gelu_new, source args gelu",
    ]
    assert spec_from_config(merge_config(config, other), "gpt2") == other
    neox = {"model_type": "gpt_neox", **CONFIGS["gpt_neox"][1]}
    trained = spec_from_config(CONFIGS["gpt_neox-sequential"][1], "gpt_neox")
    trained = replace(trained, rotary_percent=0.5)
    assert differences(neox, trained) == [
        "rotary_pct: config 0.25, source args 0.5",
        "use_parallel_residual: config True, source args False",
    ]
    assert spec_from_config(merge_config(neox, trained), "gpt_neox") == trained


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {"num_query_groups": 2}, "query groups"),
        ("phi3", {"kv_channels": 7}, "heads of a size of their own"),
        ("gemma", {"extra": {}}, "no layernorm_zero_centered_gamma"),
        ("gpt2", {"activation": "swiglu"}, "activation swiglu"),
        ("glm", {"rotary_scaling": None, "add_bias_linear": True}, "biases on qkv, attention"),
        ("gpt2", {"position_embedding_type": "rope"}, "rope positions"),
    ],
)
def test_what_a_family_cannot_say_is_refused(family, changes, message):
    spec = replace(spec_from_config(CONFIGS[family][1], family), **changes)
    with pytest.raises(SchemaError, match=message):
        config_from_spec(spec)


def test_an_activation_that_is_not_known_is_refused():
    with pytest.raises(SchemaError, match="activation_function is 'relu', family gpt2 is known"):
        spec_from_config({"activation_function": "relu"}, "gpt2")
