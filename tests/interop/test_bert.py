"""BERT: real Megatron Core agrees with transformers' MegatronBert, through our files."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.oracles import bert, mcore
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
