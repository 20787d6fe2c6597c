"""Megatron Core loads what we make of transformers' checkpoints, and computes the same logits."""

from __future__ import annotations

import pytest

from tests.oracles import mcore
from tests.oracles.mcore import Layout

from .conversion import CLOSE, FAMILIES, IMPLEMENTATIONS, LAYOUTS, convert, difference, grid, sizes

FORMATS = ("torch_dist", "torch")


@pytest.mark.parametrize(
    ("family", "layout", "format", "spec"),
    grid(list(FAMILIES), list(LAYOUTS), FORMATS, list(IMPLEMENTATIONS)),
)
def test_same_logits(family, layout, format, spec, source_of, tmp_path):
    source, layout = source_of(family), LAYOUTS[layout]
    convert(
        source.directory,
        tmp_path / "core",
        "core",
        ckpt_format=format,
        saver_transformer_impl=IMPLEMENTATIONS[spec],
        **sizes(layout),
    )
    model = source.megatron(spec, layout)
    found = mcore.read(model, layout, tmp_path / "core", source.tokens, format=format)
    assert difference(found[..., : source.config.vocab_size], source.logits) <= CLOSE


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_alone_says_which_model_it_is(family, source_of, tmp_path):
    source, layout = source_of(family), LAYOUTS["tp2-pp2"]
    for format in FORMATS:
        directory = tmp_path / format
        convert(source.directory, directory, "core", ckpt_format=format, **sizes(layout))
        found = mcore.read(None, layout, directory, source.tokens, format=format)
        assert difference(found[..., : source.config.vocab_size], source.logits) <= CLOSE


@pytest.mark.parametrize("family", ["llama", "qwen2-tied"])
def test_torch_dist_loads_at_layouts_it_was_not_made_for(family, source_of, tmp_path):
    source = source_of(family)
    convert(source.directory, tmp_path / "core", "core", **sizes(Layout(tp=4, pp=2)))
    for layout in (Layout(), Layout(tp=2), Layout(pp=2, vpp=2), Layout(pp=4)):
        found = mcore.read(None, layout, tmp_path / "core", source.tokens)
        assert difference(found[..., : source.config.vocab_size], source.logits) <= CLOSE
    local = source.megatron("local", Layout())
    found = mcore.read(local, Layout(), tmp_path / "core", source.tokens)
    assert difference(found[..., : source.config.vocab_size], source.logits) <= CLOSE
