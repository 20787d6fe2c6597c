"""Configs that leave ckptx: transformers 5 reads them as before, and 4.x finds its own words."""

from __future__ import annotations

import json

import pytest

import ckptx

transformers = pytest.importorskip("transformers")

TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 32,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES = {
    "llama": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3}},
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "head_dim": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        },
        {"num_experts": 4, "num_local_experts": 4, "rope_theta": 1e6},
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        {
            "rope_parameters": {
                "rope_theta": 5e4,
                "partial_rotary_factor": 0.5,
                "rope_type": "default",
            }
        },
        {"rotary_emb_base": 5e4, "rotary_pct": 0.5},
    ),
}


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("to", ["hf", "dcp"])
def test_a_config_of_transformers_5_has_the_words_of_4(family, to, tmp_path):
    name, own, old = CASES[family]
    architecture = getattr(transformers, name)
    config = architecture.config_class(**TINY, **own)
    architecture(config).save_pretrained(tmp_path / "source")
    ckptx.convert(tmp_path / "source", tmp_path / "target", to=to)
    if to == "dcp":  # where the config lies is the format's affair: take it back
        ckptx.convert(tmp_path / "target", tmp_path / "back", to="hf")
    target = tmp_path / ("back" if to == "dcp" else "target")
    written = json.loads((target / "config.json").read_text())
    assert {key: written[key] for key in old} == old
    before, after = (
        transformers.AutoConfig.from_pretrained(tmp_path / place).to_dict()
        for place in ("source", target.name)
    )
    for key in before.keys() - {"rope_parameters", "_name_or_path"}:
        assert after[key] == before[key], key
    assert after["rope_parameters"] == before["rope_parameters"]


def test_a_config_of_transformers_4_stays_byte_for_byte(tmp_path):
    architecture = transformers.LlamaForCausalLM
    architecture(architecture.config_class(**TINY)).save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config = {"rope_theta": 10000.0, **{k: v for k, v in config.items() if k != "rope_parameters"}}
    text = json.dumps(config)
    (tmp_path / "source" / "config.json").write_text(text)
    ckptx.convert(tmp_path / "source", tmp_path / "target", to="hf")
    assert (tmp_path / "target" / "config.json").read_text() == text
