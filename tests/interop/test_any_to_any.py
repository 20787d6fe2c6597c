"""Any format to any other: who owns the target computes what the source's owner did.

The sources are written by the frameworks themselves (those of DeepSpeed by hand, as it lays them
out), and every target is run: by transformers, by real megatron-core, by the legacy model in eager
torch, by Meta's, or loaded into an FSDP 2 model by torch.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ckptx.registry import registry
from tests.formats import zero_by_hand
from tests.oracles import fsdp, legacy, mcore, meta, rlinf, verl
from tests.oracles.mcore import Layout

from .conversion import CLOSE, convert, difference, sizes, strict_logits

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

TP2_PP2 = Layout(tp=2, pp=2)


def zero(stage, world):
    def write(source, target):
        state = load_file(source.directory / "model.safetensors")
        zero_by_hand.write(target, state, stage, world, compute=torch.float32)

    return write


def in_one_file(source, target):
    target.mkdir()
    model = AutoModelForCausalLM.from_pretrained(source.directory)
    torch.save({"state_dict": model.state_dict()}, target / "checkpoint.pt")


SOURCES = {
    "hf": lambda source, target: target.symlink_to(source.directory),
    "zero2": zero(2, 3),
    "zero3": zero(3, 4),
    "dcp": lambda source, target: fsdp.save(source.directory, target, 2, ("app", "model")),
    "verl": lambda source, target: verl.save(source.directory, target, 3),
    "rlinf": lambda source, target: rlinf.save(source.directory, target / "actor", 2),
    "pytorch": in_one_file,
}


def of_hf(target, source):
    return strict_logits(target, source.tokens)


def of_core(format):
    def logits(target, source):
        found = mcore.read(None, TP2_PP2, target, source.tokens, format=format)
        return found[..., : source.config.vocab_size]

    return logits


def of_legacy(target, source):
    return legacy.logits(target, source.tokens)[..., : source.config.vocab_size]


def of_fsdp(target, source):
    """Let torch load it into a sharded model, and run what it gathers."""
    return of_state(fsdp.load(target, source.directory, 2, ()), source)


def of_pytorch(target, source):
    return of_state(torch.load(target / "model.pt", weights_only=True), source)


def of_state(state, source):
    model = AutoModelForCausalLM.from_pretrained(source.directory, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        model.load_state_dict(state)
        return model.eval()(source.tokens).logits


def of_meta(target, source):
    return meta.logits(target, source.tokens)


TARGETS = {
    "hf": ("hf", {}, of_hf),
    "core": ("core", {"ckpt_format": "torch_dist", **sizes(TP2_PP2)}, of_core("torch_dist")),
    "core-torch": ("core", {"ckpt_format": "torch", **sizes(TP2_PP2)}, of_core("torch")),
    "legacy": ("legacy", sizes(TP2_PP2), of_legacy),
    "dcp": ("dcp", {"shards": 2}, of_fsdp),
    "pytorch": ("pytorch", {}, of_pytorch),
    "meta": ("meta", {}, of_meta),
}

SAMPLE = {
    *(("zero2", "core"), ("verl", "legacy"), ("hf", "dcp"), ("rlinf", "core-torch")),
    *(("zero3", "dcp"), ("dcp", "pytorch"), ("pytorch", "meta"), ("verl", "hf")),
}
PAIRS = [
    pytest.param(*pair, marks=[] if pair in SAMPLE else [pytest.mark.full])
    for pair in itertools.product(SOURCES, TARGETS)
    if pair != ("hf", "hf")
]


@pytest.mark.parametrize(("origin", "destination"), PAIRS)
def test_the_owner_of_the_target_computes_the_same(origin, destination, source_of, tmp_path):
    source = source_of("llama")
    place = tmp_path / "source"
    SOURCES[origin](source, place)
    saver, options, logits = TARGETS[destination]
    given = place / "checkpoint.pt" if origin == "pytorch" else place
    base = None if origin == "hf" else source.directory
    convert(given, tmp_path / "target", saver, hf_base=base, **options)
    assert difference(logits(tmp_path / "target", source), source.logits) <= CLOSE


@pytest.mark.parametrize("format", ["torch_dist", pytest.param("torch", marks=pytest.mark.full)])
@pytest.mark.parametrize("destination", ["dcp", pytest.param("pytorch", marks=pytest.mark.full)])
def test_from_real_megatron(format, destination, source_of, tmp_path):
    source = source_of("qwen2")
    model = source.megatron("te", TP2_PP2)
    expected = mcore.write(model, TP2_PP2, tmp_path / "core", source.tokens, format=format)
    saver, options, logits = TARGETS[destination]
    base = {"hf_base": source.directory}
    convert(tmp_path / "core", tmp_path / "target", saver, **base, **options)
    assert registry.detect(tmp_path / "target") == saver
    found = logits(tmp_path / "target", source)
    assert difference(found, expected[..., : source.config.vocab_size]) <= CLOSE
