"""Block-quantised weights: dequantised on the way, as eager torch does it, and named as inexact."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptx.errors import SchemaError
from tests.oracles import hf, mcore
from tests.oracles.mcore import Layout

from .conversion import CLOSE, Source, convert, difference
from .experts import KINDS, expert_sizes

BLOCK = (24, 16)
"""Divides neither the rows nor the columns of most matrices, as 128 does not divide V3's 576."""
SIZES = {"hidden_size": 72, "num_attention_heads": 4, "num_key_value_heads": 4}


def spread(scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return every block's scale at each of its elements."""
    rows, columns = BLOCK
    wide = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return wide[: shape[0], : shape[1]]


def quantise(directory, **config):
    """Quantise the linear layers of a model in place; return its weights as torch reads them."""
    file = directory / "model.safetensors"
    generator = torch.Generator().manual_seed(3)
    stored, meant = {}, {}
    for name, weight in load_file(file).items():
        meant[name] = stored[name] = weight if name.endswith("bias") else weight.bfloat16()
        if "proj" not in name or not name.endswith("weight"):
            continue
        grid = [-(-size // part) for size, part in zip(weight.shape, BLOCK, strict=True)]
        scales = torch.rand(grid, generator=generator) * 1e-3 + 2e-4
        values = (weight / spread(scales, weight.shape)).to(torch.float8_e4m3fn)
        stored |= {name: values, f"{name}_scale_inv": scales}
        meant[name] = values.float() * spread(scales, weight.shape)
    save_file(stored, file, {"format": "pt"})
    said = json.loads((directory / "config.json").read_text())
    said["quantization_config"] = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
    said |= {"dtype": "bfloat16", **config}
    (directory / "config.json").write_text(json.dumps(said))
    return stored, meant


@pytest.fixture
def model(tmp_path):
    """A quantised DeepSeek-V3, and its weights in float32."""
    hf.deepseek_v3(tmp_path / "model", **SIZES)
    _, meant = quantise(tmp_path / "model")
    return tmp_path / "model", meant


def test_a_vocabulary_with_more_rows_does_not_bring_the_quantisation_back(model, tmp_path):
    directory, _ = model
    path = directory / "config.json"
    said = json.loads(path.read_text())
    rows = said["vocab_size"]
    path.write_text(json.dumps(said | {"vocab_size": rows - 1}))
    convert(directory, tmp_path / "hf", "hf")
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["vocab_size"] == rows
    assert "quantization_config" not in written


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_values_are_those_of_torch(dtype, model, tmp_path):
    directory, meant = model
    facts = convert(directory, tmp_path / "hf", "hf", dtype=dtype)
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert sorted(found) == sorted(meant)
    for name, tensor in meant.items():
        kind = torch.float32 if name.endswith("bias") else getattr(torch, dtype or "bfloat16")
        assert torch.equal(found[name], tensor.to(kind)), name
    step = f"float8_e4m3fn * float32 -> {dtype or 'bfloat16'}"
    quantised = {name for name in meant if "proj" in name and name.endswith("weight")}
    assert set(facts.inexact[step]) == quantised
    said = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "quantization_config" not in said
    assert any("taken out" in note for note in facts.notes)


def test_megatron_computes_with_them(model, tmp_path):
    """Cut over ranks and experts, each of which needs other rows and columns of the scales."""
    directory, meant = model
    layout, kind = Layout(tp=2, pp=2, ep=2, etp=2), KINDS["te-grouped"]
    options = {**kind.options, **expert_sizes(layout)}
    convert(directory, tmp_path / "core", "core", dtype="float32", **options)
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file({n: t.float() for n, t in meant.items()}, plain / "model.safetensors")
    said = json.loads((directory / "config.json").read_text())
    del said["quantization_config"]
    (plain / "config.json").write_text(json.dumps(said))
    source = Source("plain", plain, hf.config(plain))
    found = mcore.read(kind.model(source, layout), layout, tmp_path / "core", source.tokens)
    assert difference(found[..., :131], source.logits) <= CLOSE


def test_other_families_are_quantised_the_same_way(tmp_path):
    hf.qwen3(tmp_path / "model", **SIZES)
    _, meant = quantise(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "core", "core", ckpt_format="torch")
    (file,) = (tmp_path / "core").rglob("*.pt")
    state = torch.load(file, weights_only=False)["model"]
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(state["decoder.layers.1.mlp.linear_fc2.weight"], meant[name].bfloat16())


NAME = "model.layers.1.mlp.up_proj.weight"


def without_scale(stored, config):
    del stored[f"{NAME}_scale_inv"]


def without_weight(stored, config):
    del stored[NAME]


def plain_weight(stored, config):
    stored[NAME] = stored[NAME].bfloat16()


def other_grid(stored, config):
    stored[f"{NAME}_scale_inv"] = stored[f"{NAME}_scale_inv"][:-1].contiguous()


def whole_numbers(stored, config):
    stored[f"{NAME}_scale_inv"] = stored[f"{NAME}_scale_inv"].int()


def no_config(stored, config):
    del config["quantization_config"]


def other_method(stored, config):
    config["quantization_config"]["quant_method"] = "awq"


def no_block(stored, config):
    del config["quantization_config"]["weight_block_size"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_scale, rf"'{NAME}' is float8_e4m3fn and has no '{NAME}_scale_inv'"),
        (without_weight, rf"'{NAME}_scale_inv' is a scale without '{NAME}'"),
        (plain_weight, rf"'{NAME}' is bfloat16, which is not quantised, and has a scale"),
        (other_grid, rf"'{NAME}_scale_inv': the scale is \[3, 5\], .* need \[4, 5\]"),
        (whole_numbers, "_scale_inv' is int32, expected float32"),
        (no_config, "the config has no quantization_config"),
        (other_method, "quant_method 'awq' is not known"),
        (no_block, "weight_block_size None, expected rows and columns"),
    ],
)
def test_what_does_not_fit_is_named(damage, message, tmp_path):
    directory = tmp_path / "model"
    hf.deepseek_v3(directory, **SIZES)
    stored, _ = quantise(directory)
    config = json.loads((directory / "config.json").read_text())
    damage(stored, config)
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(SchemaError, match=message):
        convert(directory, tmp_path / "hf", "hf")
    assert not (tmp_path / "hf").exists()
