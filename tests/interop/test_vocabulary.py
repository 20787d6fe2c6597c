"""Under Hugging Face's names every row of a vocabulary was trained; padding is Megatron's."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
dcp = pytest.importorskip("torch.distributed.checkpoint")

BASE, TRAINED = 64, 72
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(params=[False, True], ids=["own head", "tied"])
def resized(request, tmp_path):
    """A base model, and the weights of its training with more rows, as trainers save them."""
    config = transformers.LlamaConfig(
        vocab_size=BASE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=request.param,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(TRAINED)
    with torch.no_grad():
        # Every row has a value of its own.
        rows = torch.arange(TRAINED * 32, dtype=torch.float32).reshape(TRAINED, 32)
        model.model.embed_tokens.weight.copy_(rows)
        if not request.param:
            model.lm_head.weight.copy_(-rows)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    dcp.save({"model": state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    torch.save(state, tmp_path / "full.pt")
    (tmp_path / "hf").mkdir()
    save_file({k: v.numpy() for k, v in state.items()}, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf/config.json").write_bytes((tmp_path / "base/config.json").read_bytes())
    return tmp_path


@pytest.mark.parametrize("source", ["dcp", "full.pt", "hf"])
def test_rows_beyond_the_config_are_kept(source, resized, run):
    options = () if source == "hf" else ("--hf-base", resized / "base")
    code, out, err = run("convert", resized / source, resized / "out", "--to", "hf", *options)
    assert code == 0, err
    assert f"has {TRAINED} rows, and config.json said {BASE}" in " ".join(out.split())
    assert "padding" not in out
    assert json.loads((resized / "out/config.json").read_text())["vocab_size"] == TRAINED
    found = {}
    for file in (resized / "out").glob("*.safetensors"):
        found |= load_file(file)
    np.testing.assert_array_equal(
        found["model.embed_tokens.weight"], np.arange(TRAINED * 32).reshape(TRAINED, 32)
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(resized / "out")
    assert model.get_output_embeddings().weight.shape[0] == TRAINED


def test_they_pass_through_megatron(resized, run):
    base = ("--hf-base", resized / "base")
    code, _, err = run(
        "convert", resized / "dcp", resized / "m", "--to", "core", "--tp", "2", *base
    )
    assert code == 0, err
    code, out, err = run("convert", resized / "m", resized / "back", "--to", "hf")
    assert code == 0, err
    assert f"rows {TRAINED} to 255" in " ".join(out.split())  # Megatron's own padding
    code, out, err = run("verify", resized / "back", resized / "full.pt", "--b.hf-base", *base[1:])
    assert code == 0, out + err


def test_a_model_and_its_cut_copy_differ(resized, run):
    (resized / "cut").mkdir()
    weights = load_file(resized / "hf" / "model.safetensors")
    cut = {name: one[:BASE] if one.shape[0] == TRAINED else one for name, one in weights.items()}
    save_file(cut, resized / "cut" / "model.safetensors")
    (resized / "cut/config.json").write_bytes((resized / "base/config.json").read_bytes())
    assert run("verify", resized / "hf", resized / "cut")[0] == 1
    code, out, _ = run("inspect", resized / "hf")
    assert code == 0
    assert f"vocabulary {TRAINED}" in " ".join(out.split())


def test_fewer_rows_than_the_config_says_are_refused(resized, run):
    config = json.loads((resized / "hf/config.json").read_text())
    (resized / "hf/config.json").write_text(json.dumps(config | {"vocab_size": 80}))
    code, _, err = run("convert", resized / "hf", resized / "out", "--to", "core")
    assert code == 1
    assert f"model.embed_tokens.weight has {TRAINED} rows, and config.json says 80" in err
    assert "--true-vocab-size" not in err
