"""Legacy Megatron models, in eager torch as their ranks run them, agree with transformers.

Here the original cannot run: it is in no package. What its stand-in computes was compared with the
original, from the source trees of core_v0.12.3 and core_v0.16.1, on CPU.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from tests.oracles import hf, legacy, mcore
from tests.oracles.mcore import Layout

from .conversion import CLOSE, Source, convert, difference, sizes, strict_logits

FAMILIES = {
    "llama": (hf.llama, {}),
    "llama-biases": (hf.llama, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (hf.mistral, {}),
    "qwen2": (hf.qwen2, {}),
    "qwen2-tied": (hf.qwen2, {"tied": True}),
    "gpt2": (hf.gpt2, {}),
    "gpt2-untied-exact": (hf.gpt2, {"tie_word_embeddings": False, "activation_function": "gelu"}),
    "gpt_neox": (hf.gpt_neox, {}),
    "phi3": (hf.phi3, {}),
    "starcoder2": (hf.starcoder2, {}),
}
LAYOUTS = {
    "tp1": Layout(),
    "tp2-pp2": Layout(tp=2, pp=2),
    "tp4": Layout(tp=4),
    "pp2-vpp2": Layout(pp=2, vpp=2),
}
SAMPLE = {
    ("llama", "tp4"),
    ("llama-biases", "pp2-vpp2"),
    ("mistral", "tp1"),
    ("qwen2", "tp2-pp2"),
    ("qwen2-tied", "tp2-pp2"),
    ("gpt2", "pp2-vpp2"),
    ("gpt2-untied-exact", "tp4"),
    ("gpt_neox", "tp2-pp2"),
    ("phi3", "pp2-vpp2"),
    ("starcoder2", "tp2-pp2"),
}
GRID = [
    pytest.param(*case, marks=[] if case in SAMPLE else [pytest.mark.full])
    for case in itertools.product(FAMILIES, LAYOUTS)
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The model of a family, written once."""
    found = {}

    def make(name):
        if name not in found:
            directory = tmp_path_factory.mktemp(name) / "hf"
            write, overrides = FAMILIES[name]
            found[name] = Source(name, directory, write(directory, **overrides))
        return found[name]

    return make


@pytest.mark.parametrize(("family", "layout"), GRID)
def test_same_logits(family, layout, written, tmp_path):
    source, layout = written(family), LAYOUTS[layout]
    convert(source.directory, tmp_path / "legacy", "legacy", **sizes(layout))
    found = legacy.logits(tmp_path / "legacy", source.tokens)
    assert difference(found[..., : source.config.vocab_size], source.logits) <= CLOSE
    convert(tmp_path / "legacy", tmp_path / "hf", "hf")
    assert difference(strict_logits(tmp_path / "hf", source.tokens), source.logits) == 0


@pytest.mark.parametrize("spelling", ["old", "oldest"])
@pytest.mark.parametrize("version", [None, 1])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_old_files(family, version, spelling, written, tmp_path):
    """The stand-in reads a version's order in its own way, and the converter reads the same files.

    transformers computes the logits of what comes out.
    """
    source, layout = written(family), Layout(tp=2, pp=2)
    convert(source.directory, tmp_path / "new", "legacy", **sizes(layout))
    same = _aged(tmp_path / "new", tmp_path / "same", version, "new")
    assert difference(legacy.logits(same, source.tokens)[..., :131], source.logits) <= CLOSE
    old = _aged(tmp_path / "new", tmp_path / "old", version, spelling)
    convert(old, tmp_path / "hf", "hf", loader_options={"true_vocab_size": 131})
    assert difference(strict_logits(tmp_path / "hf", source.tokens), source.logits) <= CLOSE


def _aged(root: Path, target: Path, version: float | None, spelling: str) -> Path:
    """Write a checkpoint anew as an older Megatron would have."""
    args, _, _ = legacy.read(root)
    heads = args.num_attention_heads // args.tensor_model_parallel_size
    models = {}
    for path in root.glob("*/mp_rank_*/model_optim_rng.pt"):
        named = legacy.flat(torch.load(path, weights_only=False)["model"])
        for name in named:
            if "query_key_value" in name:
                named[name] = legacy.fused(named[name], heads, version)
        models[path.parent.name] = {"model": named}
    return legacy.write(target, args, models, version=version, spelling=spelling)


@pytest.mark.parametrize(("family", "format"), [("llama", "torch_dist"), ("gpt2", "torch")])
def test_legacy_to_core(family, format, written, tmp_path):
    """Real Megatron Core computes what the legacy model did."""
    source, layout = written(family), Layout(tp=2, pp=2)
    convert(source.directory, tmp_path / "legacy", "legacy", **sizes(Layout(tp=4)))
    options = {"ckpt_format": format, **sizes(layout)}
    convert(tmp_path / "legacy", tmp_path / "core", "core", **options)
    found = mcore.read(None, layout, tmp_path / "core", source.tokens, format=format)
    assert difference(found[..., : source.config.vocab_size], source.logits) <= CLOSE
    convert(tmp_path / "core", tmp_path / "again", "legacy", **sizes(Layout(pp=4)))
    found = legacy.logits(tmp_path / "again", source.tokens)
    assert difference(found[..., : source.config.vocab_size], source.logits) <= CLOSE
