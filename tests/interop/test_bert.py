"""BERT: real Megatron Core agrees with transformers, through our files.

The classes are MegatronBertForPreTraining and MegatronBertForMaskedLM.
"""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptx.errors import ConversionError, SchemaError
from tests.oracles import bert, legacy, mcore
from tests.oracles.mcore import Layout

from .conversion import CLOSE, IMPLEMENTATIONS, TOKENS, convert, difference, sizes

KINDS = {
    "both-heads": (bert.PRETRAINING, {}),
    "untied": (bert.PRETRAINING, {"tie_word_embeddings": False}),
    "masked-lm": (bert.MASKED_LM, {}),
}
LAYOUTS = {
    "tp1": Layout(),
    "tp2-pp2": Layout(tp=2, pp=2),
    "tp4": Layout(tp=4),
    "pp4": Layout(pp=4),
}
FORMATS = ("torch_dist", "torch")
SAMPLE = {
    ("both-heads", "tp2-pp2", "torch_dist", "te"),
    ("both-heads", "tp2-pp2", "torch", "local"),
    ("both-heads", "pp4", "torch", "te"),
    ("untied", "tp2-pp2", "torch", "te"),
    ("masked-lm", "tp4", "torch_dist", "local"),
}
GRID = [
    pytest.param(*case, marks=[] if case in SAMPLE else [pytest.mark.full])
    for case in itertools.product(KINDS, LAYOUTS, FORMATS, IMPLEMENTATIONS)
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The directory of a model, its config and its logits, written once."""
    found = {}

    def make(name):
        if name not in found:
            directory = tmp_path_factory.mktemp(name) / "hf"
            kind, overrides = KINDS[name]
            config = bert.write(directory, kind, **overrides)
            found[name] = directory, config, bert.logits(directory, TOKENS)
        return found[name]

    return make


@pytest.mark.parametrize(("kind", "layout", "format", "spec"), GRID)
def test_to_megatron_and_back(kind, layout, format, spec, written, tmp_path):
    directory, config, expected = written(kind)
    binary, layout = kind != "masked-lm", LAYOUTS[layout]
    options = {"ckpt_format": format, "saver_transformer_impl": IMPLEMENTATIONS[spec]}
    convert(directory, tmp_path / "core", "core", **options, **sizes(layout))
    model = bert.mcore_model(config, spec=spec, pad_to=128 * layout.tp, binary=binary)
    found = mcore.read(model, layout, tmp_path / "core", TOKENS, format=format)
    assert difference(bert.without_padding(found, 131, binary), expected) <= CLOSE
    convert(tmp_path / "core", tmp_path / "back", "hf")
    assert torch.equal(bert.logits(tmp_path / "back", TOKENS), expected)


@pytest.mark.parametrize(("kind", "layout", "format", "spec"), GRID)
def test_from_megatron(kind, layout, format, spec, written, tmp_path):
    """The weights alone say that it is a BERT; the args are those of any model."""
    directory, config, _ = written(kind)
    binary, layout = kind != "masked-lm", LAYOUTS[layout]
    expected = mcore.write(
        bert.mcore_model(config, spec=spec, pad_to=128 * layout.tp, binary=binary),
        layout,
        tmp_path / "core",
        TOKENS,
        format=format,
        args={"vocab_size": 131, "bert_binary_head": binary, "bias_gelu_fusion": False},
    )
    base = None if binary else directory  # Megatron's args: no types without binary head
    convert(tmp_path / "core", tmp_path / "hf", "hf", hf_base=base)
    found = bert.logits(tmp_path / "hf", TOKENS)
    assert difference(found, bert.without_padding(expected, 131, binary)) <= CLOSE


@pytest.mark.parametrize("act", ["gelu", "gelu_new"])
@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2), Layout(tp=4), Layout(pp=2, vpp=2)], ids=str)
def test_legacy(layout, act, tmp_path):
    """A legacy model's head takes the tanh form of gelu with its layers, as transformers' does."""
    bert.write(tmp_path / "source", hidden_act=act)
    expected = bert.logits(tmp_path / "source", TOKENS)
    convert(tmp_path / "source", tmp_path / "legacy", "legacy", **sizes(layout))
    found = legacy.logits(tmp_path / "legacy", TOKENS)
    assert difference(bert.without_padding(found, 131), expected) <= CLOSE
    convert(tmp_path / "legacy", tmp_path / "back", "hf")
    assert torch.equal(bert.logits(tmp_path / "back", TOKENS), expected)


def test_legacy_to_core(written, tmp_path):
    directory, config, expected = written("both-heads")
    convert(directory, tmp_path / "legacy", "legacy", **sizes(Layout(tp=2, pp=2)))
    layout = Layout(tp=4, pp=2)
    convert(tmp_path / "legacy", tmp_path / "core", "core", **sizes(layout))
    model = bert.mcore_model(config, pad_to=512)
    found = mcore.read(model, layout, tmp_path / "core", TOKENS)
    assert difference(bert.without_padding(found, 131), expected) <= CLOSE


def test_the_hint_names_the_script_and_what_it_does_not_restore(written, tmp_path):
    directory, *_ = written("masked-lm")
    facts = convert(
        directory, tmp_path / "core", "core", saver_transformer_impl="local", ckpt_format="torch"
    )
    assert facts.load_hint.startswith("pretrain_bert.py ")
    assert "--spec local --bert-no-binary-head" in facts.load_hint
    assert any(note.startswith("2 token types without a binary head") for note in facts.notes)


def test_bert_with_norms_behind_is_refused(tmp_path):
    """Between formats that keep its names it passes."""
    from transformers import BertConfig, BertForMaskedLM

    sizes_ = {key: bert.SIZES[key] for key in bert.SIZES if key != "layer_norm_eps"}
    BertForMaskedLM(BertConfig(**sizes_)).save_pretrained(tmp_path / "bert")
    for saver in ("core", "legacy"):
        with pytest.raises(SchemaError, match="BertForMaskedLM: normalises after attention"):
            convert(tmp_path / "bert", tmp_path / saver, saver)
    convert(tmp_path / "bert", tmp_path / "kept.pt", "pytorch")


def test_a_model_without_token_types_has_no_hugging_face_form(written, tmp_path):
    _, config, _ = written("masked-lm")
    model = bert.mcore_model(config, binary=False)
    model.gpt["num_tokentypes"] = 0
    args = {"vocab_size": 131, "bert_binary_head": False, "bias_gelu_fusion": False}
    expected = mcore.write(model, Layout(), tmp_path / "core", TOKENS, args=args)
    with pytest.raises(SchemaError, match="no token types"):
        convert(tmp_path / "core", tmp_path / "hf", "hf")
    layout = Layout(tp=2, pp=2)
    convert(tmp_path / "core", tmp_path / "cut", "core", **sizes(layout))
    found = mcore.read(model, layout, tmp_path / "cut", TOKENS)
    assert difference(found[..., :131], expected[..., :131]) <= CLOSE


def test_an_older_file_repeats_bias_and_positions(written, tmp_path):
    """transformers 4 saved what is tied, and numbers that are no weights."""
    directory, _, expected = written("both-heads")
    shutil.copytree(directory, tmp_path / "old")
    file = tmp_path / "old" / "model.safetensors"
    weights = load_file(file)
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"].clone()
    words = weights["bert.embeddings.word_embeddings.weight"]
    weights["cls.predictions.decoder.weight"] = words.clone()
    weights["bert.embeddings.position_ids"] = torch.arange(32)[None]
    save_file(weights, file, {"format": "pt"})
    convert(tmp_path / "old", tmp_path / "core", "core", **sizes(Layout(tp=2, pp=2)))
    convert(tmp_path / "core", tmp_path / "back", "hf")
    assert torch.equal(bert.logits(tmp_path / "back", TOKENS), expected)
    weights["cls.predictions.decoder.bias"][7] += 1
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ConversionError, match="differs"):
        convert(tmp_path / "old", tmp_path / "other", "core")
