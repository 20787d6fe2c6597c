"""LoRA adapters that cannot be merged: one line says why, and nothing is written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptx.errors import CkptxError

from .conversion import convert

adapters = pytest.importorskip("tests.oracles.adapters", reason="peft is not installed")

PROJECTION = "base_model.model.model.layers.1.self_attn.q_proj"
A, B = f"{PROJECTION}.lora_A.weight", f"{PROJECTION}.lora_B.weight"


def another_base(tensors, config):
    for key in (key for key in list(tensors) if "q_proj.lora_A" in key):
        tensors[key] = torch.ones(8, 48)


def other_ranks(tensors, config):
    tensors[A] = torch.ones(6, 64)


def half_a_pair(tensors, config):
    del tensors[B]


def no_tensor(tensors, config):
    tensors.clear()


def not_gathered(tensors, config):
    for key in list(tensors):
        tensors[key] = torch.empty(0)


def one_layer_alone(tensors, config):
    del tensors[A], tensors[B]


def a_module_of_which_nothing_is_there(tensors, config):
    config["target_modules"] = ["q_proj", "v_proj"]


def no_base_weight(tensors, config):
    for one in ("A", "B"):
        key = PROJECTION.replace("layers.1", "layers.9") + f".lora_{one}.weight"
        tensors[key] = tensors[f"{PROJECTION}.lora_{one}.weight"].clone()


def not_saved(tensors, config):
    config["modules_to_save"] = ["lm_head"]


def unknown_tensor(tensors, config):
    tensors[f"{PROJECTION}.lora_E"] = torch.ones(4)


def whole_numbers(tensors, config):
    tensors[A] = tensors[A].int()


def convolution(tensors, config):
    tensors[A] = torch.ones(8, 64, 3, 3)


def other_shape(tensors, config):
    tensors["base_model.model.model.norm.weight"] = torch.ones(65)


def head_of_a_task(tensors, config):
    tensors["base_model.model.score.weight"] = torch.ones(1, 64)
    config["task_type"] = "FEATURE_EXTRACTION"


def no_bias(tensors, config):
    tensors[f"{PROJECTION}.lora_B.bias"] = torch.ones(64)


def rows_without_indices(tensors, config):
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    tensors[name] = torch.ones(2, 64)


@pytest.fixture(scope="module")
def simple(base_of, tmp_path_factory):
    """An adapter of rank 8 of all query projections."""
    directory = tmp_path_factory.mktemp("simple") / "adapter"
    adapters.make(base_of("unknown"), directory, target_modules=["q_proj"], r=8)
    return directory


def said(**fields):
    def change(tensors, config):
        config |= fields

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (another_base, "the weight is [64, 64]: the adapter is of another base model"),
        (other_ranks, "has rank 8, A [6, 64] has rank 6"),
        (half_a_pair, "lacks lora_B.weight; it is not whole"),
        (no_tensor, "adapter_model.safetensors: holds no LoRA matrix: the adapter was not saved"),
        (not_gathered, "holds no LoRA matrix of any element: the adapter was not saved"),
        (one_layer_alone, "target_modules names 'model.layers.1.self_attn.q_proj', and the"),
        (a_module_of_which_nothing_is_there, "target_modules names 'model.layers.0.self_attn.v_p"),
        (no_base_weight, "the base has no 'model.layers.9.self_attn.q_proj.weight'"),
        (not_saved, "modules_to_save names 'lm_head', and the adapter holds nothing"),
        (unknown_tensor, "lora_E is not a part of LoRA that is known"),
        (whole_numbers, "expected float32, bfloat16, float16, found int32"),
        (convolution, "are those of a convolution, which is not merged here"),
        (other_shape, "'model.norm.weight' is [65], in the base [64]"),
        (head_of_a_task, "'score.weight', which the adapter changes: a head that the class of its"),
        (no_bias, "has a trained lora_bias and no bias in the base"),
        (rows_without_indices, "trainable_token_indices None do not say which rows"),
        (said(peft_type="IA3"), "peft_type 'IA3' is not known, only 'LORA'"),
        (said(lora_alpha=None), "lora_alpha is None, expected a number above 0"),
        (said(lora_alpha=0), "lora_alpha is 0, expected a number above 0"),
        (said(r=4), "says rank 4 for 'model.layers.0.self_attn.q_proj', its tensors have rank 8"),
        (said(alpha_pattern={"(": 1}), "alpha_pattern: '(':"),
        (said(rank_pattern=[4]), "rank_pattern is [4], not of a type that peft writes"),
        (said(init_lora_weights="pissa_niter_4"), "belongs to the residual of its base model"),
        (said(init_lora_weights="OLoRA"), "belongs to the residual of its base model"),
        (said(init_lora_weights="corda"), "belongs to the residual of its base model"),
        (said(init_lora_weights="sorcery"), "init_lora_weights 'sorcery' is not known"),
        (said(layer_replication=[[0, 2]]), "layer_replication is set"),
        (said(trainable_token_indices=[0], use_bdlora={"nblocks": 2}), "use_bdlora is set"),
        (said(target_parameters=["q_proj.weight", "q_proj.bias"]), "which is of which is unknown"),
    ],
)
def test_what_cannot_be_merged_is_one_line(damage, message, base_of, simple, tmp_path):
    base, adapter = base_of("unknown"), tmp_path / "adapter"
    shutil.copytree(simple, adapter)
    file, place = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    tensors, config = load_file(file), json.loads(place.read_text())
    damage(tensors, config)
    save_file(tensors, file, {"format": "pt"})
    place.write_text(json.dumps(config))
    with pytest.raises(CkptxError) as caught:
        convert(adapter, tmp_path / "hf", "hf", hf_base=base)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(adapter) in str(caught.value) or "lora_E" in message
    assert not (tmp_path / "hf").exists()


def test_an_adapter_alone_has_no_base(base_of, tmp_path):
    adapters.make(base_of("llama"), tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(CkptxError, match=r"without the model .*base\); give .* --hf-base"):
        convert(tmp_path / "adapter", tmp_path / "hf", "hf")
    convert(tmp_path / "adapter", tmp_path / "copy", "peft")
    name = "adapter_model.safetensors"
    assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def test_two_live_adapters_are_refused(base_of, tmp_path):
    model = adapters.make(base_of("llama"), target_modules=["q_proj"])
    model.add_adapter("other", model.peft_config["default"])
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with pytest.raises(CkptxError, match=r"another tensor are both .* only one adapter"):
        convert(tmp_path / "model.pt", tmp_path / "hf", "hf", loader_options={"lora_alpha": 8.0})


def test_options_without_an_adapter_are_refused(base_of, tmp_path):
    base = base_of("llama")
    with pytest.raises(CkptxError, match="holds no LoRA weights"):
        convert(base, tmp_path / "hf", "hf", loader_options={"lora_alpha": 8.0})
    with pytest.raises(CkptxError, match="holds no adapters, expected one to save"):
        convert(base, tmp_path / "hf", "peft")
    with pytest.raises(CkptxError, match=r"lacks adapter_config\.json"):
        convert(base, tmp_path / "hf", "hf", loader_options={"adapter": (str(base),)})
