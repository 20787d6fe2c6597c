"""LLaVA: transformers and real Megatron Core compute the same from what is converted."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from tests.oracles import llava
from tests.oracles.mcore import Layout

from .conversion import CLOSE, IMPLEMENTATIONS, convert, difference, sizes

FORMATS = ("torch_dist", "torch")
LAYOUTS = {
    "tp1": Layout(),
    "tp2": Layout(tp=2),
    "pp2": Layout(pp=2),
    "tp2-pp2": Layout(tp=2, pp=2),
}


@pytest.fixture(scope="module")
def source_of(tmp_path_factory):
    """A model of transformers, what it computes and its config."""

    @cache
    def written(tower, language="llama"):
        directory = tmp_path_factory.mktemp(f"{tower}-{language}") / "hf"
        config = llava.write(directory, llava.config(tower, language))
        return directory, config, llava.computed(directory)

    return written


def same(found, expected):
    """Nothing of what both have computed differs; the vocabulary may be padded."""
    for name in {"logits", "projected"} & set(found) & set(expected):
        here, there = found[name], expected[name]
        if name == "projected":
            here, there = (one if len(one) == 2 else one.transpose(0, 1) for one in (here, there))
        rows = min(here.shape[-1], there.shape[-1])
        assert difference(here[..., :rows], there[..., :rows]) <= CLOSE, name


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_megatron_computes_what_transformers_does(tower, layout, format, source_of, tmp_path):
    directory, config, expected = source_of(tower)
    layout = LAYOUTS[layout]
    convert(directory, tmp_path / "core", "core", ckpt_format=format, **sizes(layout))
    model = llava.megatron(config, tp=layout.tp)
    found = llava.megatron_reads(model, layout, tmp_path / "core", format=format)
    same(found, expected)


def written_by_megatron(tower, config, layout, directory, format, **args):
    """A checkpoint of Megatron's own, whose args say no size of the tower."""
    # Megatron's SigLIP ends with its norm, as its model_provider builds it.
    model = llava.megatron(config, tp=layout.tp, features_before_norm=False)
    return llava.megatron_writes(model, layout, directory, format=format, args=args)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_transformers_computes_what_megatron_does(tower, layout, format, source_of, tmp_path):
    _, config, _ = source_of(tower)
    layout = LAYOUTS[layout]
    expected = written_by_megatron(tower, config, layout, tmp_path / "core", format)
    # Without a config at hand: args and shapes alone say what the model is, but for the number of
    # the image's token, which is the tokenizer's.
    facts = convert(tmp_path / "core", tmp_path / "hf", "hf")
    same(llava.computed(tmp_path / "hf", image_token=llava.IMAGE), expected)
    assert ("takes no part in the output" in " ".join(facts.notes)) is (tower == "clip")


def held(directory):
    """Every tensor of a checkpoint with a file per rank, by rank and name."""
    files = sorted(directory.rglob("model_optim_rng.pt"))
    models = {f.parent.name: torch.load(f, weights_only=False)["model"] for f in files}
    return {
        (rank, name): tensor
        for rank, model in models.items()
        for name, tensor in model.items()
    }


@pytest.mark.parametrize("layers", ["te", "local"])
@pytest.mark.parametrize("tower", llava.TOWERS)
def test_our_ranks_hold_what_megatrons_hold(tower, layers, tmp_path):
    """Megatron writes one model in three ways; cutting one of them anew gives the others."""
    model = llava.tower(tower, local_layers=layers == "local", projection_norm=layers == "te")
    two = replace(model, gpt={**model.gpt, "vocab_size": 256})
    for name, layout, format in (
        ("whole", Layout(), "torch_dist"),
        ("ranks", Layout(tp=2, pp=2), "torch"),
    ):
        llava.megatron_writes(two, layout, tmp_path / name, format=format, images=None)
    options = {"saver_transformer_impl": IMPLEMENTATIONS[layers], **sizes(Layout(tp=2, pp=2))}
    convert(tmp_path / "whole", tmp_path / "ours", "llava", ckpt_format="torch", **options)
    ours, theirs = held(tmp_path / "ours"), held(tmp_path / "ranks")
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert (ours[name] is None) is (tensor is None), name
        if tensor is not None:
            assert torch.equal(ours[name], tensor), name
            assert ours[name].dtype == tensor.dtype
    # And back to one whole, which Megatron loads as it is.
    options = {"saver_transformer_impl": IMPLEMENTATIONS[layers], **sizes(Layout())}
    convert(tmp_path / "ranks", tmp_path / "back", "llava", ckpt_format="torch_dist", **options)
    found = llava.megatron_reads(two, Layout(), tmp_path / "back", images=None)
    expected = llava.megatron_reads(two, Layout(), tmp_path / "whole", images=None)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
