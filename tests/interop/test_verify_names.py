"""`verify` of two models: what they are comes first, and one tensor has one name."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ckptx
from tests.record.sources import _family

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
TOWER = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
JAMBA = {
    "num_experts": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
}


def test_models_of_two_architectures_are_called_so_first(tmp_path, run):
    llama, qwen = (_family(name)(tmp_path / name) for name in ("llama", "qwen2-tied"))
    found = ckptx.verify(llama, qwen)
    assert found.architectures == "A is llama (LlamaForCausalLM), B is qwen2 (Qwen2ForCausalLM)"
    assert found.diagnoses == ()
    code, out, _ = run("verify", llama, qwen)
    assert code == 1
    assert "different architectures" in out.splitlines()[0]
    assert json.loads(run("verify", llama, qwen, "--json")[1])["architectures"]


def test_a_name_that_megatron_has_no_word_for_is_no_other_architecture(tmp_path):
    """Its args call a Mistral without windows what they call a Llama."""
    llama = _family("llama")(tmp_path / "llama")
    other = shutil.copytree(llama, tmp_path / "mistral")
    config = json.loads((other / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    config["sliding_window"] = None
    (other / "config.json").write_text(json.dumps(config))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + np.float32(1)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    found = ckptx.verify(llama, other)
    assert not found.equal
    assert found.architectures == ""


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Qwen2VL", {"text_config": {**TEXT, "rope_parameters": ROPE}, "vision_config": TOWER}),
        ("Jamba", {**TEXT, **JAMBA}),
    ],
)
def test_names_of_two_releases_are_the_same_tensors(kind, settings, tmp_path):
    transformers = pytest.importorskip("transformers")
    head = "ForConditionalGeneration" if kind == "Qwen2VL" else "ForCausalLM"
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, kind + head)(config)
    model.save_pretrained(tmp_path / "files")
    model.save_pretrained(tmp_path / "memory", save_original_format=False)
    names = [set(load_file(tmp_path / one / "model.safetensors")) for one in ("files", "memory")]
    assert names[0] != names[1]
    found = ckptx.verify(tmp_path / "files", tmp_path / "memory")
    assert found.equal
    assert found.compared == len(names[0])


def tied_without_a_schema(place):
    transformers = pytest.importorskip("transformers")
    config = transformers.CohereConfig(**TEXT, tie_word_embeddings=True)
    transformers.CohereForCausalLM(config).save_pretrained(place)
    return place


def test_a_tied_model_without_a_schema_comes_back_from_dcp(tmp_path):
    source = tied_without_a_schema(tmp_path / "hf")
    ckptx.convert(source, tmp_path / "dcp", to="dcp")
    report = ckptx.convert(tmp_path / "dcp", tmp_path / "back", to="hf")
    first, second = (load_file(tmp_path / one / "model.safetensors") for one in ("hf", "back"))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert any("lm_head.weight" in str(one) for one in report.facts.dropped)
    assert ckptx.verify(source, tmp_path / "back").equal
    assert ckptx.verify(source, tmp_path / "dcp").equal


def test_a_head_that_is_no_copy_is_kept(tmp_path):
    source = tied_without_a_schema(tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(1)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    report = ckptx.convert(source, tmp_path / "out", to="hf")
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert np.array_equal(kept["lm_head.weight"], tensors["lm_head.weight"])
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    assert any("no longer tied" in note for note in report.notes)
