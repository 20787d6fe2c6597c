"""Keys of a config that no schema knows, values that it does not say: refused or named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import ckptx
from ckptx.registry import registry
from ckptx.schemas.config.translate import TableConfig
from ckptx.schemas.config.unknown_keys import unknown_keys

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.k_proj.weight": (4, 8),
    "model.layers.0.self_attn.v_proj.weight": (4, 8),
    "model.layers.0.self_attn.o_proj.weight": (8, 8),
    "model.layers.0.mlp.gate_proj.weight": (12, 8),
    "model.layers.0.mlp.up_proj.weight": (12, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 12),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.0.post_attention_layernorm.weight": (8,),
    "model.norm.weight": (8,),
    "lm_head.weight": (16, 8),
}


def model(place: Path, without: tuple[str, ...] = (), **changes: object) -> Path:
    """A tiny Llama whose config is changed; every element of its weights has another value."""
    place.mkdir()
    config = {key: value for key, value in CONFIG.items() if key not in without} | changes
    (place / "config.json").write_text(json.dumps(config))
    start, tensors = 0, {}
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        tensors[name] = np.arange(start, start + size, dtype=np.float32).reshape(shape)
        start += size
    save_file(tensors, place / "model.safetensors")
    return place


def said(report: ckptx.Report, words: str) -> list[str]:
    return [note for note in report.notes if words in note]


@pytest.mark.parametrize("target", ["core", "legacy"])
def test_an_unknown_key_is_refused_towards_megatron(tmp_path, target):
    source = model(tmp_path / "hf", residual_multiplier=0.5)
    with pytest.raises(ckptx.SchemaError) as refused:
        ckptx.convert(source, tmp_path / "out", to=target)
    assert "residual_multiplier=0.5" in str(refused.value)
    assert "--accept-config-key residual_multiplier" in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["core", "legacy"])
def test_an_accepted_key_is_recorded(tmp_path, target):
    source = model(tmp_path / "hf", residual_multiplier=0.5)
    out = tmp_path / "out"
    report = ckptx.convert(source, out, to=target, accept_config_key=["residual_multiplier"])
    assert said(report, "residual_multiplier is 0.5 in config.json and was ignored")
    manifest = json.loads(next(out.rglob("*ckptx-manifest.json")).read_text())
    assert manifest["source"]["accepted"] == ["residual_multiplier"]


def test_accepting_a_key_that_is_known_or_absent(tmp_path):
    source = model(tmp_path / "hf", residual_multiplier=0.5)
    for key in ("hidden_size", "residual_multiplyer"):
        with pytest.raises(ckptx.CkptxError, match="it has residual_multiplier"):
            ckptx.convert(source, tmp_path / "out", to="core", accept_config_key=[key])


@pytest.mark.parametrize("target", ["hf", "dcp", "pytorch"])
def test_an_unknown_key_is_noted_elsewhere(tmp_path, target):
    source = model(tmp_path / "hf", residual_multiplier=0.5)
    report = ckptx.convert(source, tmp_path / "out", to=target)
    assert said(report, "residual_multiplier 0.5, which LlamaForCausalLM of transformers")


def test_an_unknown_key_of_a_config_beside_megatron_s_weights(tmp_path):
    """The weights are Megatron's: it is noted that the config at hand says more."""
    core = tmp_path / "core"
    ckptx.convert(model(tmp_path / "hf"), core, to="core")
    other = model(tmp_path / "other", residual_multiplier=0.5)
    report = ckptx.convert(core, tmp_path / "back", to="hf", hf_base=other)
    assert said(report, "residual_multiplier 0.5")


def test_null_says_nothing(tmp_path):
    source = model(tmp_path / "hf", residual_multiplier=None, use_cache=True, my_notes=None)
    report = ckptx.convert(source, tmp_path / "out", to="core")
    assert not said(report, "residual_multiplier")


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default", "rope_thetta": 5.0},
        {"full_attention": {"rope_type": "default", "rope_theta": 1e4}, "partial_factor": 0.5},
        {"full_attention": {"rope_type": "default", "partial_factor": 0.5}},
    ],
)
def test_an_unknown_key_of_a_rope_dictionary_is_refused(tmp_path, scaling):
    key = "rope_thetta" if "rope_thetta" in scaling else "partial_factor"
    source = model(tmp_path / "hf", rope_parameters=scaling)
    with pytest.raises(ckptx.SchemaError, match=key):
        ckptx.convert(source, tmp_path / "out", to="core")


def test_what_a_config_does_not_say_is_said(tmp_path):
    missing = ("rope_theta", "max_position_embeddings", "hidden_act")
    source = model(tmp_path / "hf", without=missing)
    report = ckptx.convert(source, tmp_path / "out", to="core")
    (note,) = said(report, "does not say")
    # LlamaConfig's: transformers src/transformers/models/llama/configuration_llama.py @ v5.23.0.
    for words in ("rope_theta 10000", "max_position_embeddings 2048", "hidden_act silu"):
        assert words in note
    whole = model(tmp_path / "whole", without=("rope_theta",), rope_parameters={"rope_theta": 5e5})
    assert not said(ckptx.convert(whole, tmp_path / "two", to="core"), "does not say")


FAMILIES = {
    family.name: family
    for family in registry.families().values()
    if isinstance(family.config, TableConfig)
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_key_of_transformers_own_class_is_known(name):
    transformers = pytest.importorskip("transformers")
    family = FAMILIES[name]
    known = [kind for kind in family.model_types if kind in transformers.CONFIG_MAPPING]
    assert known
    for kind in known:
        config = transformers.CONFIG_MAPPING[kind]()
        everything = {**transformers.PreTrainedConfig().to_dict(), **config.to_dict()}
        assert unknown_keys(everything, family.config.table) == {}


def test_every_key_of_a_llava_is_known():
    transformers = pytest.importorskip("transformers")
    for vision in (transformers.CLIPVisionConfig(), transformers.SiglipVisionConfig()):
        config = transformers.LlavaConfig(vision_config=vision).to_dict()
        family = registry.families()["llava"]
        assert family.composition is not None
        assert family.composition.from_config(config)["language"].unknown_keys == {}
        config["vision_config"]["window_size"] = config["spatial_merge"] = 2
        found = family.composition.from_config(config)["language"].unknown_keys
        assert found == {"vision_config.window_size": 2, "spatial_merge": 2}


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("starcoder2", "rms_norm_eps", 1e-3),
        ("gpt_neox", "rms_norm_eps", 1e-3),
        ("megatron-bert", "rms_norm_eps", 1e-3),
        ("gemma2", "hidden_act", "relu"),
    ],
)
def test_llama_s_word_for_a_renamed_key_is_unknown(name, key, value):
    config = registry.families()[name].config
    assert isinstance(config, TableConfig)
    assert unknown_keys({key: value}, config.table) == {key: value}


DAMAGED = {
    "generation_config.json": b'{"eos_token_id": 2,',
    "tokenizer_config.json": b"\0" * 40,
    "tokenizer.json": b"{" + b" " * (1 << 20) + b'"model": {',
    "vocab.json": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "tokenizer.model": b"",
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("target", ["hf", "core", "dcp"])
def test_a_damaged_file_beside_the_weights_is_refused(tmp_path, name, target):
    source = model(tmp_path / "hf")
    (source / name).write_bytes(DAMAGED[name])
    with pytest.raises(ckptx.FormatError, match=name):
        ckptx.convert(source, tmp_path / "out", to=target)
    assert not (tmp_path / "out").exists()
    base = model(tmp_path / "base")
    (base / name).write_bytes(DAMAGED[name])
    with pytest.raises(ckptx.FormatError, match=f"{name} .*--hf-base"):
        ckptx.convert(model(tmp_path / "whole"), tmp_path / "out", to=target, hf_base=base)


def test_a_target_that_transformers_cannot_load_is_refused(tmp_path):
    source = model(tmp_path / "hf")
    alone = source / "model.safetensors"
    (source / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(ckptx.PlanError, match=r"no config.json.*--hf-base.*--no-config"):
        ckptx.convert(alone, tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()
    report = ckptx.convert(alone, tmp_path / "out", to="hf", no_config=True)
    assert said(report, "transformers cannot load it")
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_config_without_model_type(tmp_path):
    transformers = pytest.importorskip("transformers")
    # The class tells a family that ckptx knows.
    source = model(tmp_path / "hf", without=("model_type",))
    ckptx.convert(source, tmp_path / "out", to="hf")
    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert type(loaded).__name__ == "LlamaConfig"
    other = model(tmp_path / "other", without=("model_type",), architectures=["OwnForCausalLM"])
    with pytest.raises(ckptx.PlanError, match=r"names no model_type.*--no-config"):
        ckptx.convert(other, tmp_path / "two", to="hf")
    ckptx.convert(other, tmp_path / "two", to="hf", no_config=True)
