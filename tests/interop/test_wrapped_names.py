"""Names that modules around a model have put on its tensors: real wrappers, every format."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp

import ckptx
from ckptx.hf_models.wrappers import unwrapped

transformers = pytest.importorskip("transformers")
CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}
FORMS = ("safetensors", "bin", "pt", "dcp")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*single process:UserWarning", "ignore::FutureWarning"
)


@pytest.fixture
def model():
    torch.manual_seed(5)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))


def wrapped(model, kind):
    """The model in wrappers that torch itself puts around it, or around its parts."""
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers

    if kind == "compiled":
        return torch.compile(model)
    if kind == "parallel, compiled":
        return torch.compile(torch.nn.DataParallel(model))
    layers = model.model.layers
    if kind == "checkpointed layers":
        for number, layer in enumerate(layers):
            layers[number] = wrappers.checkpoint_wrapper(layer)
    if kind == "compiled layers in a module":
        for number, layer in enumerate(layers):
            layers[number] = torch.compile(layer)
        around = torch.nn.Module()
        around._forward_module, around.calls = torch.nn.Module(), torch.nn.Module()
        around._forward_module.policy = model
        return around
    return model


def write(state, place, form, config):
    place.mkdir()
    config.save_pretrained(place)
    state = {name: tensor.clone() for name, tensor in state.items()}
    if form == "safetensors":
        save_file(state, place / "model.safetensors", {"format": "pt"})
    elif form == "bin":
        torch.save(state, place / "pytorch_model.bin")
    elif form == "pt":
        torch.save({"model": state}, place / "model.pt")
    else:
        dcp.save({"model": state}, checkpoint_id=place)
    return place / "model.pt" if form == "pt" else place


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "kind",
    ["compiled", "parallel, compiled", "checkpointed layers", "compiled layers in a module"],
)
def test_wrappers_come_off(kind, form, model, tmp_path):
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = wrapped(model, kind).state_dict()
    assert state.keys() != expected.keys() or kind == "checkpointed layers"
    source = write(state, tmp_path / "source", form, model.config)
    ckptx.convert(source, tmp_path / "out", to="hf")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_buffer_beside_the_module_keeps_no_prefix_on(form, model, tmp_path):
    """It is refused by its own name where there is no place for it, and nothing else is."""
    state = {f"policy.net.{name}": tensor for name, tensor in model.state_dict().items()}
    state["train_accuracy.total"] = torch.zeros(1)
    source = write(state, tmp_path / "source", form, model.config)
    with pytest.raises(ckptx.CkptxError, match=r"train_accuracy\.total") as error:
        ckptx.convert(source, tmp_path / "out", to="core")
    assert "'policy.net.' was taken off the names" in str(error.value)
    ckptx.convert(source, tmp_path / "out", to="core", ignore=["train_*"])
    found = ckptx.verify(tmp_path / "out", source, b_ignore=["train_*"])
    assert found.equal


@pytest.mark.parametrize("form", FORMS)
def test_a_prefix_can_be_stripped_of_any_format(form, tmp_path):
    """Of a model that no schema knows, whose names nobody can tell."""
    config = transformers.CohereConfig(**CONFIG)
    state = transformers.CohereForCausalLM(config).state_dict()
    state.pop("lm_head.weight")
    inside = {f"my.net.{name}": tensor for name, tensor in state.items()}
    source = write(inside, tmp_path / "source", form, config)
    ckptx.convert(source, tmp_path / "out", to="hf", strip_prefix=["my.net."])
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == state.keys()


def test_wrappers_in_an_adapter_come_off(model, tmp_path):
    peft = pytest.importorskip("peft")
    model.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {
        name.replace(".layers.0.", ".layers.0._fsdp_wrapped_module.")
        .replace(".layers.1.", ".layers.1._checkpoint_wrapped_module.")
        .replace("base_model.model.", "base_model.model._orig_mod.module."): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})
    ckptx.convert(tmp_path / "adapter", tmp_path / "out", to="hf", hf_base=tmp_path / "base")
    expected = adapted.merge_and_unload().state_dict()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_part_that_is_called_module_keeps_its_name():
    """LeViT's residual layers are called so, and model directories hold what models call it."""
    from ckptx.hf_models.wrappers import INSIDE

    name = "levit.encoder.stages.0.layers.0.module.queries_keys_values.linear.weight"
    assert unwrapped(name, INSIDE) == name
    assert unwrapped(f"module._orig_mod.{name}", INSIDE) == name
