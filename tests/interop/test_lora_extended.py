"""Adapters that change what a model is: more rows in the vocabulary, another head; peft's merge."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptx

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "pad_token_id": 0,
}
ROWS = 40


def base_of(place, kind="Qwen2", **settings):
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    model.save_pretrained(place)
    return model


def trained(model, place, **settings):
    """An adapter of a model, with values in it, as peft saves it; the model it makes."""
    config = peft.LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, **settings)
    adapted = peft.get_peft_model(model, config)
    for number, parameter in enumerate(adapted.parameters()):
        if parameter.requires_grad:
            parameter.data += torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(number)
            )
    adapted.save_pretrained(place)
    return adapted.merge_and_unload()


def merged(tmp_path, **options):
    options = {"hf_base": tmp_path / "base", **options}
    report = ckptx.convert(tmp_path / "adapter", tmp_path / "out", to="hf", **options)
    return report, load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("kind", ["Qwen2", "Cohere"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", ["saved", "updated"])
def test_an_extended_vocabulary_is_that_of_the_adapter(how, tied, kind, tmp_path):
    if tied and how == "updated":
        pytest.skip("peft adds either update to the one tensor, and ckptx parts them")
    model = base_of(tmp_path / "base", kind, tie_word_embeddings=tied)
    model.resize_token_embeddings(ROWS)
    both = ["embed_tokens", "lm_head"]
    settings = {"target_modules": ["q_proj", "v_proj", *(both if how == "updated" else ())]}
    if how == "saved":
        settings["modules_to_save"] = both
    expected = trained(model, tmp_path / "adapter", task_type="CAUSAL_LM", **settings)
    report, found = merged(tmp_path)
    state = expected.state_dict()
    assert found["lm_head.weight"].shape[0] == ROWS
    assert all(torch.equal(found[name], state[name]) for name in found)
    assert found.keys() == state.keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == ROWS
    assert any("vocabulary was extended" in note for note in report.notes)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, state["lm_head.weight"])


def test_rows_of_one_half_alone_are_refused(tmp_path):
    model = base_of(tmp_path / "base", tie_word_embeddings=False)
    model.resize_token_embeddings(ROWS)
    saved = {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]}
    trained(model, tmp_path / "adapter", **saved)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    (head,) = [name for name in tensors if "lm_head" in name]
    tensors[head] = tensors[head][:36].clone()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ckptx.SchemaError, match=r"has (40|36) rows, and another .* of one model"):
        merged(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("task", "kind", "labels"),
    [("SEQ_CLS", "SequenceClassification", 1), ("TOKEN_CLS", "TokenClassification", 3)],
)
def test_a_head_that_the_adapter_holds_makes_a_model_of_its_class(task, kind, labels, tmp_path):
    base_of(tmp_path / "base")
    auto = getattr(transformers, f"AutoModelFor{kind}")
    model = auto.from_pretrained(tmp_path / "base", num_labels=labels)
    expected = trained(model, tmp_path / "adapter", task_type=task, target_modules=["q_proj"])
    report, found = merged(tmp_path)
    state = expected.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in found)
    loaded = auto.from_pretrained(tmp_path / "out")
    assert loaded.config.num_labels == labels
    assert torch.equal(loaded.score.weight, state["score.weight"])
    assert f"AutoModelFor{kind}" in report.facts.load_hint
    assert any("lm_head.weight" in str(drop) for drop in report.dropped)
    with pytest.raises(ckptx.CkptxError):
        ckptx.convert(tmp_path / "adapter", tmp_path / "core", to="core", hf_base=tmp_path / "base")


def without(place, words):
    """Take tensors out of an adapter's file."""
    file = place / "adapter_model.safetensors"
    kept = {name: one for name, one in load_file(file).items() if words not in name}
    assert len(kept) < len(load_file(file))
    save_file(kept, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("layers.1.self_attn.q_proj", r"no matrices of 'model\.layers\.1\.self_attn\.q_proj'"),
        ("layers.1.self_attn.q_proj.lora_B", r"q_proj' lacks lora_B\.weight; it is not whole"),
    ],
)
def test_a_part_of_an_adapter_is_told_without_its_base(words, message, tmp_path, run):
    model = base_of(tmp_path / "base")
    trained(model, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    assert run("inspect", tmp_path / "adapter")[0] == 0
    ckptx.convert(tmp_path / "adapter", tmp_path / "again", to="peft")
    without(tmp_path / "adapter", words)
    found = ckptx.inspect(tmp_path / "adapter")
    assert not found.healthy
    assert run("inspect", tmp_path / "adapter")[0] == 1
    with pytest.raises(ckptx.SchemaError, match=message):
        ckptx.convert(tmp_path / "adapter", tmp_path / "copy", to="peft")


@pytest.mark.parametrize(
    "pattern", [r".*\.(q_proj|v_proj)", r"model\.layers\.\d\.self_attn\.[qv]_.*"]
)
def test_what_a_pattern_means_must_be_there(pattern, tmp_path):
    model = base_of(tmp_path / "base")
    trained(model, tmp_path / "adapter", target_modules=pattern)
    merged(tmp_path)
    without(tmp_path / "adapter", "layers.1.")
    options = {"to": "hf", "hf_base": tmp_path / "base"}
    with pytest.raises(ckptx.SchemaError, match=r"names 'model\.layers\.1\.self_attn\.q_proj'"):
        ckptx.convert(tmp_path / "adapter", tmp_path / "no", **options)


def test_a_pattern_that_takes_forever_is_not_followed(tmp_path):
    model = base_of(tmp_path / "base")
    trained(model, tmp_path / "adapter", target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"target_modules": "(.+)+!"}
    path.write_text(json.dumps(config))
    merged(tmp_path)


def test_experts_that_are_named_must_be_there(tmp_path):
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = base_of(tmp_path / "base", "Mixtral", **sizes)
    named = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    expected = trained(model, tmp_path / "adapter", target_parameters=named, target_modules=[])
    _, found = merged(tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    state = expected.state_dict()
    assert found
    assert all(torch.allclose(back[name], state[name], atol=1e-6) for name in state)
    without(tmp_path / "adapter", "layers.1.")
    options = {"to": "hf", "hf_base": tmp_path / "base"}
    with pytest.raises(ckptx.SchemaError, match=r"names 'model\.layers\.1\..*experts"):
        ckptx.convert(tmp_path / "adapter", tmp_path / "no", **options)
