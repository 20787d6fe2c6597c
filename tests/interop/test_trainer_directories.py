"""Directories of Trainer with DeepSpeed: what was trained lies there twice, in two formats.

The states of DeepSpeed are made by hand; real ones of DeepSpeed itself are in tests/golden.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptx
from tests.formats import zero_by_hand
from tests.record.sources import _family

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def trained(tmp_path):
    """A checkpoint of Trainer: weights as the module has them, masters that say more."""
    base = _family("llama")(tmp_path / "base")
    masters = {n: one.float() + 2**-14 for n, one in load_file(base / "model.safetensors").items()}
    run = _family("llama")(tmp_path / "run")
    module = {name: tensor.bfloat16() for name, tensor in masters.items()}
    save_file(module, run / "model.safetensors", {"format": "pt"})
    return base, run, masters


def write_masters(run, masters):
    zero_by_hand.write(run, masters, 2, 2)


def test_the_masters_are_taken_where_they_are_the_whole_model(trained, tmp_path):
    _, run, masters = trained
    write_masters(run, masters)
    report = ckptx.convert(run, tmp_path / "out", to="hf")
    assert report.loader == "deepspeed"
    assert any("model.safetensors beside is for --from hf" in note for note in report.notes)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], masters[name]) for name in masters)
    report = ckptx.convert(run, tmp_path / "other", to="hf", from_="hf")
    assert any("--from deepspeed" in note for note in report.notes)
    found = load_file(tmp_path / "other" / "model.safetensors")
    assert all(torch.equal(found[name], masters[name].bfloat16()) for name in masters)


def test_masters_of_a_part_are_for_who_asks(trained, tmp_path):
    """Trainer leaves frozen weights out of DeepSpeed's states."""
    _, run, masters = trained
    write_masters(run, {name: one for name, one in masters.items() if "layers.0" in name})
    report = ckptx.convert(run, tmp_path / "out", to="hf")
    assert report.loader == "hf"
    assert any("fp32 masters of what was trained" in note for note in report.notes)
    with pytest.raises(ckptx.CkptxError, match="missing"):
        ckptx.convert(run, tmp_path / "no", to="hf", from_="deepspeed")


def test_an_adapter_goes_onto_the_base(tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = _family("llama")(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings)
    run = tmp_path / "checkpoint-2"
    adapted.save_pretrained(run)
    lora = {n: one.detach().clone() for n, one in adapted.state_dict().items() if "lora_" in n}
    write_masters(run, lora)
    expected = adapted.merge_and_unload().state_dict()
    for number, (options, loader) in enumerate(
        [({}, "peft"), ({"from_": "peft"}, "peft"), ({"from_": "deepspeed"}, "deepspeed")]
    ):
        out = tmp_path / f"out{number}"
        report = ckptx.convert(run, out, to="hf", hf_base=base, dtype="float32", **options)
        assert report.loader == loader
        other = "--from deepspeed" if loader == "peft" else "--from peft"
        assert any(other in note for note in report.notes)
        found = load_file(out / "model.safetensors")
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert "model.layers.0.self_attn.q_proj.weight" in found
