"""transformers loads what we make of Megatron Core's checkpoints, and computes the same logits."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig

from tests.oracles import mcore
from tests.oracles.mcore import Layout

from .conversion import (
    CLOSE,
    FAMILIES,
    LAYOUTS,
    convert,
    difference,
    grid,
    meaning,
    sizes,
    strict_logits,
)

FORMATS = ("torch_dist", "torch")
# The spec, and the version whose names args have.
WRITERS = ("te 0.16", "te 0.15", "local 0.16")
PER_LAYER = {
    "singleton shards": {"singleton_local_shards": True},
    "layers apart": {"non_homogeneous_layers": True},
}


@pytest.mark.parametrize(
    ("family", "layout", "format", "writer"),
    grid(list(FAMILIES), list(LAYOUTS), FORMATS, WRITERS),
)
def test_same_logits(family, layout, format, writer, source_of, tmp_path):
    source, layout = source_of(family), LAYOUTS[layout]
    spec, args_names = writer.split()
    expected = mcore.write(
        source.megatron(spec, layout),
        layout,
        tmp_path / "core",
        source.tokens,
        format=format,
        args_names=args_names,
        args={"vocab_size": source.config.vocab_size},
    )
    # Without a config at hand: args alone say what the model is.
    convert(tmp_path / "core", tmp_path / "hf", "hf")
    found = strict_logits(tmp_path / "hf", source.tokens)
    assert difference(found, expected[..., : source.config.vocab_size]) <= CLOSE


@pytest.mark.parametrize("keys", PER_LAYER)
@pytest.mark.parametrize("family", ["llama", "llama-biases", "qwen2-tied", "qwen3"])
def test_keys_per_layer(family, keys, source_of, tmp_path):
    source, layout = source_of(family), Layout(tp=2, pp=2)
    expected = mcore.write(
        source.megatron("te", layout),
        layout,
        tmp_path / "core",
        source.tokens,
        content_metadata=PER_LAYER[keys],
        args={"vocab_size": source.config.vocab_size},
    )
    convert(tmp_path / "core", tmp_path / "hf", "hf")
    found = strict_logits(tmp_path / "hf", source.tokens)
    assert difference(found, expected[..., : source.config.vocab_size]) <= CLOSE


@pytest.mark.parametrize("family", FAMILIES)
def test_base_model_gives_the_config(family, source_of, tmp_path):
    source, layout = source_of(family), Layout(tp=2, pp=2)
    model = source.megatron("te", layout)
    expected = mcore.write(model, layout, tmp_path / "core", source.tokens)
    convert(tmp_path / "core", tmp_path / "hf", "hf", hf_base=source.directory)
    found = strict_logits(tmp_path / "hf", source.tokens)
    assert difference(found, expected[..., : source.config.vocab_size]) <= CLOSE
    assert meaning(tmp_path / "hf") == meaning(source.directory)


def test_weights_win_over_a_base_model_of_other_numbers(source_of, tmp_path):
    trained = source_of("llama")
    model = trained.megatron("te", Layout())
    expected = mcore.write(
        model, Layout(), tmp_path / "core", trained.tokens, args={"vocab_size": 131}
    )
    base = tmp_path / "base"
    base.mkdir()
    config = json.loads((trained.directory / "config.json").read_text())
    config |= {"rms_norm_eps": 1e-3, "eos_token_id": 7}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1234.0}
    (base / "config.json").write_text(json.dumps(config))
    facts = convert(tmp_path / "core", tmp_path / "hf", "hf", hf_base=base)
    found = strict_logits(tmp_path / "hf", trained.tokens)
    assert difference(found, expected[..., :131]) <= CLOSE
    assert AutoConfig.from_pretrained(tmp_path / "hf").eos_token_id == 7
    notes = " ".join(facts.notes)
    assert "rms_norm_eps: config 0.001, source args 1e-05" in notes
    assert "rope_theta: config 1234, source args 10000" in notes


def test_padding_of_an_unknown_vocabulary_is_kept(source_of, tmp_path):
    source = source_of("llama")
    model = source.megatron("te", Layout())
    expected = mcore.write(model, Layout(), tmp_path / "core", source.tokens)
    facts = convert(tmp_path / "core", tmp_path / "hf", "hf")
    assert "vocabulary is unknown, so all 256 rows are kept" in " ".join(facts.notes)
    assert difference(strict_logits(tmp_path / "hf", source.tokens), expected) <= CLOSE


def test_option_gives_the_true_vocabulary(source_of, tmp_path):
    source = source_of("qwen2-tied")
    model = source.megatron("te", Layout())
    expected = mcore.write(model, Layout(), tmp_path / "core", source.tokens)
    convert(tmp_path / "core", tmp_path / "hf", "hf", loader_options={"true_vocab_size": 131})
    found = strict_logits(tmp_path / "hf", source.tokens)
    assert difference(found, expected[..., :131]) <= CLOSE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_every_bit(dtype, source_of, tmp_path):
    """The logits are computed in float32 by both, from the halves that Megatron wrote."""
    source = source_of("qwen3")
    model = source.megatron("te", Layout(tp=2))
    half = type(model)(model.config, model.gpt, model.spec, dtype)
    mcore.write(half, Layout(tp=2), tmp_path / "half", source.tokens, args={"vocab_size": 131})
    convert(tmp_path / "half", tmp_path / "hf", "hf")
    assert AutoConfig.from_pretrained(tmp_path / "hf").dtype == dtype
    convert(tmp_path / "half", tmp_path / "wide", "core", dtype="float32", **sizes(Layout(tp=2)))
    expected = mcore.read(model, Layout(tp=2), tmp_path / "wide", source.tokens)
    found = strict_logits(tmp_path / "hf", source.tokens)
    assert difference(found, expected[..., :131]) <= CLOSE
