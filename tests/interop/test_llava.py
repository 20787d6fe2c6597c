"""LLaVA: transformers and real Megatron Core compute the same from what is converted."""

from __future__ import annotations

from functools import cache

import pytest

from tests.oracles import llava
from tests.oracles.mcore import Layout

from .conversion import CLOSE, convert, difference, sizes

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
