"""Reward and value models: heads arrive complete, whatever wrote them, and Megatron says no."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file

from ckptx.errors import FormatError, SchemaError
from tests.formats import zero_by_hand

from .conversion import convert

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
HEADED = {
    "llama-sequence": ("Llama", "ForSequenceClassification", {"num_labels": 1}),
    "qwen2-token": ("Qwen2", "ForTokenClassification", {"num_labels": 1}),
    "qwen3-sequence": ("Qwen3", "ForSequenceClassification", {"num_labels": 3}),
}


def headed(kind: str) -> transformers.PreTrainedModel:
    """A model of transformers with a head of its own, and random weights."""
    name, ending, more = HEADED[kind]
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**SIZES, **more)
    return getattr(transformers, name + ending)(config)


class Around(torch.nn.Module):
    """A module around a whole model, or its backbone, with heads beside."""

    def __init__(self, attribute: str, model: torch.nn.Module, heads: dict[str, Any]) -> None:
        super().__init__()
        setattr(self, attribute, model)
        for name, head in heads.items():
            setattr(self, name, head)


class Pooling(torch.nn.Module):
    """Parameters as those of LightRFT's AttentionPooling: a query, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.query = torch.nn.Parameter(torch.randn(1, 1, 16))
        self.key = torch.nn.Linear(16, 16, bias=False)
        self.value = torch.nn.Linear(16, 16, bias=False)


def scalar_heads() -> dict[str, Any]:
    """The heads of LightRFT's ScalarRewardModelVL and ScalarRewardModelAL for one score."""
    score = torch.nn.Sequential(
        torch.nn.Linear(16, 16),
        torch.nn.RMSNorm(16),
        torch.nn.SiLU(),
        torch.nn.Linear(16, 1, bias=False),
    )
    scale = torch.nn.Parameter(torch.full((1,), 2.66))
    return {
        "preference_head": score,
        "preference_logit_scale": scale,
        "preference_attnpool": Pooling(),
    }


def summary() -> torch.nn.Module:
    """The value head of TRL."""
    head = torch.nn.Module()
    head.summary = torch.nn.Linear(16, 1)
    return head


def causal() -> transformers.PreTrainedModel:
    """The model that heads stand beside."""
    torch.manual_seed(5)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


WRAPPED = {
    "trl": lambda: Around("pretrained_model", causal(), {"v_head": summary()}),
    "value": lambda: Around("model", causal(), {"value_head": torch.nn.Linear(16, 1)}),
    "critic": lambda: Around("model", causal().model, {"score": torch.nn.Linear(16, 1)}),
    "srm": lambda: Around("model", causal().model, scalar_heads()),
}
KEPT = {"trl": "pretrained_model.", "value": "model.", "critic": "", "srm": ""}
"""What is taken off the names of each."""


def write(state, config, target, form):
    """Write a state dict in a form; return the source and options."""
    target.mkdir()
    beside = {"hf": target, "pytorch": target}.get(form, target / "huggingface")
    beside.mkdir(exist_ok=True)
    config.save_pretrained(beside)
    state = {name: tensor.clone() for name, tensor in state.items()}
    if form == "hf":
        save_file(state, target / "model.safetensors")
    elif form == "pytorch":
        torch.save(state, target / "model.pt")
        return target / "model.pt"
    elif form == "dcp":
        dcp.save({"model": state}, checkpoint_id=str(target))
    elif form == "verl":
        torch.save(state, target / "model_world_size_1_rank_0.pt")
        (target / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 1}))
    elif form == "deepspeed":
        stage = 3
        zero_by_hand.write(target, state, stage, 2, compute=torch.float32)
    return target


FORMS = ("hf", "pytorch", "dcp", "verl", "deepspeed")


@pytest.mark.parametrize("form", FORMS)
def test_a_class_with_a_head_is_what_it_was(form, tmp_path):
    model = headed("llama-sequence")
    source = write(model.state_dict(), model.config, tmp_path / "source", form)
    convert(source, tmp_path / "hf", "hf")
    found = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    assert_same(found.state_dict(), model.state_dict())
    tokens = torch.arange(1, 9)[None]
    assert torch.equal(found(tokens).logits, model.eval()(tokens).logits)


@pytest.mark.parametrize("kind", HEADED)
def test_every_class_loads_by_its_auto_class(kind, tmp_path):
    model = headed(kind)
    model.save_pretrained(tmp_path / "source")
    facts = convert(tmp_path / "source", tmp_path / "hf", "hf")
    auto = f"AutoModel{HEADED[kind][1]}"
    assert auto in facts.load_hint
    found = getattr(transformers, auto).from_pretrained(tmp_path / "hf")
    assert_same(found.state_dict(), model.state_dict())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", WRAPPED)
def test_heads_beside_a_model_pass_through(kind, form, tmp_path):
    """The config is the base model's, which knows no head: nothing is dropped, nothing filled."""
    torch.manual_seed(9)
    model = WRAPPED[kind]()
    state = model.state_dict()
    source = write(state, causal().config, tmp_path / "source", form)
    facts = convert(source, tmp_path / "hf", "hf")
    expected = {name.removeprefix(KEPT[kind]): tensor for name, tensor in state.items()}
    assert_same(load_file(tmp_path / "hf" / "model.safetensors"), expected)
    assert any("the head of a reward or value model" in note for note in facts.notes)
    assert any("was taken off the names" in note for note in facts.notes) == bool(KEPT[kind])


@pytest.mark.parametrize("form", FORMS)
def test_a_model_in_a_module_is_the_model(form, tmp_path):
    """LightRFT's generative reward model has no head: it is a whole model below ``model.``."""
    state = Around("model", causal(), {}).state_dict()
    source = write(state, causal().config, tmp_path / "source", form)
    facts = convert(source, tmp_path / "core", "core", target_tensor_parallel_size=2)
    assert any("'model.' was taken off the names" in note for note in facts.notes)
    convert(tmp_path / "core", tmp_path / "hf", "hf")
    assert_same(load_file(tmp_path / "hf" / "model.safetensors"), causal().state_dict())


@pytest.mark.parametrize("target", ["core", "legacy"])
def test_megatron_is_refused_by_name(target, tmp_path):
    model = headed("llama-sequence")
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(SchemaError, match="LlamaForSequenceClassification: Megatron has no place"):
        convert(tmp_path / "source", tmp_path / "target", target)
    source = write(WRAPPED["srm"]().state_dict(), causal().config, tmp_path / "srm", "pytorch")
    with pytest.raises(SchemaError, match=r"'preference_.*no place for the head"):
        convert(source, tmp_path / "target", target)
    assert not (tmp_path / "target").exists()


def test_an_unknown_tensor_is_no_head(tmp_path):
    """What is not at the top of a model goes along by name, and Megatron has no place for it."""
    state = {**causal().state_dict(), "model.layers.0.extra_head.weight": torch.ones(3)}
    source = write(state, causal().config, tmp_path / "source", "hf")
    with pytest.raises(SchemaError, match=r"model\.layers\.0\.extra_head\.weight"):
        convert(source, tmp_path / "core", "core")
    facts = convert(source, tmp_path / "hf", "hf")
    assert any("extra_head.weight': no part of" in note for note in facts.notes)
    assert_same(load_file(tmp_path / "hf" / "model.safetensors"), state)
    options = {"loader_options": {"ignore": ("*.extra_head.*",)}}
    facts = convert(source, tmp_path / "other", "core", **options)
    (drop,) = [one for one in facts.dropped if "extra_head" in one["name"]]
    assert (drop["reason"], drop["bytes"]) == ("--ignore *.extra_head.*", 12)
    with pytest.raises(FormatError, match=r"--ignore 'x\.\*' is the pattern of no tensor"):
        convert(source, tmp_path / "no", "hf", loader_options={"ignore": ("x.*",)})


@pytest.mark.parametrize("form", FORMS)
def test_tensors_without_elements_were_not_gathered(form, tmp_path):
    """Under ZeRO-3 a state dict holds every name, and of each weight nothing."""
    state = {name: torch.zeros(0) for name in causal().state_dict()}
    source = write(state, causal().config, tmp_path / "source", form)
    for config in ("known", "none"):
        if config == "none":
            for place in tmp_path.rglob("config.json"):
                place.unlink()
        with pytest.raises(FormatError, match="under ZeRO-3 weights must be gathered"):
            convert(source, tmp_path / "hf", "hf", no_config=True)


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
