"""torchtitan: its names and its rotary order, read and written as its own adapter has them.

torchtitan does not run here. Llama is computed with rows in its order by Meta's model in eager
torch, which rotates neighbours as torchtitan does; for Qwen 3 its map of names is all there is.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from ckptx.errors import FormatError, SchemaError
from tests.oracles import hf, meta

from .conversion import CLOSE, TOKENS, contents, convert, difference, strict_logits

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

PARAMS = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 4,
    "norm_eps": 1e-5,
    "multiple_of": 32,
    "vocab_size": 131,
    "rope_theta": 500000.0,
}
LLAMA = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": meta.hidden_dim(PARAMS),
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 131,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
OLD = pytest.mark.parametrize("old", [False, True], ids=["today", "0.2"])


def titan(weights, old: bool):
    """Meta's names as torchtitan spells them."""
    if old:
        return dict(weights)
    return {
        re.sub(r"attention\.w([qkv])\.", r"attention.qkv_linear.w\1.", name).replace(
            "output.", "lm_head."
        ): tensor
        for name, tensor in weights.items()
    }


def loaded(directory, expected):
    """What torch loads of names and shapes that a model has, all of them."""
    state = {name: torch.full(shape, torch.nan) for name, shape in expected.items()}
    dcp.load(state, checkpoint_id=str(directory))
    saved = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    assert set(saved) == set(expected)
    return state


@OLD
def test_llama_computes_what_torchtitans_model_does(old, tmp_path):
    hf.llama(tmp_path / "config", **LLAMA)
    weights = meta.weights(PARAMS, 131)
    training = {
        "optimizer": {"state.norm.weight.exp_avg": torch.zeros(64), "param_groups.norm.lr": 0.1},
        "lr_scheduler": {"last_epoch": 3},
        "train_state": {"step": torch.tensor(3), "ntokens_seen": torch.tensor(99)},
    }
    state = {**titan(weights, old), **training}
    dcp.save(state, checkpoint_id=str(tmp_path / "step-30"))
    expected = meta.logits(meta.write(tmp_path / "meta", PARAMS, weights), TOKENS)
    facts = convert(tmp_path / "step-30", tmp_path / "hf", "hf", hf_base=tmp_path / "config")
    assert difference(strict_logits(tmp_path / "hf", TOKENS), expected) <= CLOSE
    dropped = {drop["name"] for drop in facts.dropped}
    assert {"optimizer", "lr_scheduler", "train_state"} <= dropped


@OLD
def test_torchtitans_model_computes_what_llama_does(old, tmp_path):
    hf.llama(tmp_path / "model", **LLAMA)
    names = "torchtitan-0.2" if old else "torchtitan"
    convert(tmp_path / "model", tmp_path / "dcp", "dcp", target_names=names)
    weights = meta.weights(PARAMS, 131)
    state = loaded(tmp_path / "dcp", {n: t.shape for n, t in titan(weights, old).items()})
    found = dict(zip(weights, state.values(), strict=True))
    computed = meta.logits(meta.write(tmp_path / "meta", PARAMS, found), TOKENS)
    assert difference(computed, hf.logits(tmp_path / "model", TOKENS)) <= CLOSE
    convert(tmp_path / "dcp", tmp_path / "back", "hf")
    assert contents(tmp_path / "back") == contents(tmp_path / "model")


def qwen(state, old: bool):
    """The names of `Qwen3StateDictAdapter`, by pieces of names."""
    below = "attention." if old else "attention.qkv_linear."
    pieces = [
        ("model.embed_tokens.", "tok_embeddings."),
        ("lm_head.", "output." if old else "lm_head."),
        *((f"self_attn.{part}_proj.", f"{below}w{part}.") for part in "qkv"),
        ("self_attn.o_proj.", "attention.wo."),
        ("self_attn.", "attention."),
        ("mlp.gate_proj.", "feed_forward.w1."),
        ("mlp.down_proj.", "feed_forward.w2."),
        ("mlp.up_proj.", "feed_forward.w3."),
        ("input_layernorm.", "attention_norm."),
        ("post_attention_layernorm.", "ffn_norm."),
        ("model.", ""),
    ]
    renamed = {}
    for name, tensor in state.items():
        for piece, other in pieces:
            name = name.replace(piece, other)
        renamed[name] = tensor
    return renamed


@OLD
@pytest.mark.parametrize("family", ["qwen3", "qwen3-tied"])
def test_qwen_3_keeps_its_rows(old, family, source_of, tmp_path):
    source = source_of(family)
    state = load_file(source.directory / "model.safetensors")
    if family == "qwen3-tied":
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    expected = qwen(state, old)
    names = "torchtitan-0.2" if old else "torchtitan"
    convert(source.directory, tmp_path / "dcp", "dcp", target_names=names)
    found = loaded(tmp_path / "dcp", {name: tensor.shape for name, tensor in expected.items()})
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    dcp.save(expected, checkpoint_id=str(tmp_path / "step-1"))
    convert(tmp_path / "step-1", tmp_path / "hf", "hf", hf_base=source.directory)
    assert contents(tmp_path / "hf") == contents(source.directory)


def test_the_config_says_in_which_order_rows_are(source_of, tmp_path):
    weights = titan(meta.weights(PARAMS, 131), False)
    dcp.save(weights, checkpoint_id=str(tmp_path / "step-1"))
    with pytest.raises(FormatError, match=r"has torchtitan's names.*give it with --hf-base"):
        convert(tmp_path / "step-1", tmp_path / "hf", "hf")
    with pytest.raises(SchemaError, match="family mistral has no torchtitan layout"):
        convert(tmp_path / "step-1", tmp_path / "hf", "hf", hf_base=source_of("mistral").directory)
    assert not (tmp_path / "hf").exists()
