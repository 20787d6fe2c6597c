"""Megatron Core loads what we make of transformers' checkpoints, and computes the same logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.oracles import hf, mcore
from tests.oracles.mcore import Layout

from .conversion import (
    CLOSE,
    FAMILIES,
    IMPLEMENTATIONS,
    LAYOUTS,
    convert,
    difference,
    grid,
    sizes,
    strict_logits,
)

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


@pytest.mark.parametrize("format", FORMATS)
def test_parts_of_another_dtype_load(format, source_of, tmp_path, run):
    """Megatron loads norms in bfloat16 beside the rest in float32, as the numbers that they are."""
    source = source_of("qwen3")
    rounded = shutil.copytree(source.directory, tmp_path / "rounded")
    tensors = load_file(rounded / "model.safetensors")
    for name in tensors:
        if "norm" in name:
            tensors[name] = tensors[name].bfloat16().float()
    save_file(tensors, rounded / "model.safetensors", {"format": "pt"})
    expected = hf.logits(rounded, source.tokens)
    assert difference(expected, source.logits) > CLOSE
    options = ("--to", "core", "--tp", 2, "--pp", 2, "--ckpt-format", format, "--quiet")
    place = tmp_path / "core"
    assert run("convert", source.directory, place, *options, "--dtype", "*norm*=bf16")[0] == 0
    found = mcore.read(None, LAYOUTS["tp2-pp2"], place, source.tokens, format=format)
    assert difference(found[..., : source.config.vocab_size], expected) <= CLOSE


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


def as_hub_snapshot(source, directory):
    """A model as the hub's cache keeps it: links to files that are named by their digest."""
    blobs, snapshot = directory / "blobs", directory / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(source.directory.iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs", str(number)))
    return snapshot


def as_pickled_shards(source, directory):
    """A model as transformers saved it before safetensors: pickles and their index."""
    directory.mkdir()
    shutil.copyfile(source.directory / "config.json", directory / "config.json")
    weights = list(hf.weights(source.directory).items())
    homes = {}
    for number, shard in enumerate((weights[::2], weights[1::2]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save(dict(shard), directory / file)
        homes |= {name: file for name, _ in shard}
    index = {"metadata": {"total_size": 0}, "weight_map": homes}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return directory


@pytest.mark.parametrize("arrange", [as_hub_snapshot, as_pickled_shards])
def test_other_arrangements_of_the_files(arrange, source_of, tmp_path):
    source, layout = source_of("qwen3"), Layout(tp=2, pp=2)
    convert(arrange(source, tmp_path / "hf"), tmp_path / "core", "core", **sizes(layout))
    found = mcore.read(None, layout, tmp_path / "core", source.tokens)
    assert difference(found[..., : source.config.vocab_size], source.logits) <= CLOSE


@pytest.mark.parametrize("equal", [True, False])
def test_tied_model_with_an_output_weight_of_its_own(equal, source_of, tmp_path):
    source, layout = source_of("qwen2-tied"), Layout(tp=2, pp=2)
    weights = hf.weights(source.directory)
    output = weights["model.embed_tokens.weight"] * (1 if equal else 2)
    directory = tmp_path / "hf"
    shutil.copytree(source.directory, directory)
    save_file(weights | {"lm_head.weight": output}, directory / "model.safetensors")
    facts = convert(directory, tmp_path / "core", "core", **sizes(layout))
    found = mcore.read(None, layout, tmp_path / "core", source.tokens)
    # The output layer is linear, so twice its weight is twice the logits.
    expected = source.logits * (1 if equal else 2)
    assert difference(found[..., : source.config.vocab_size], expected) <= CLOSE
    args = mcore.checkpoint_args(tmp_path / "core")
    assert args.untie_embeddings_and_output_weights is not equal
    assert ("no longer tied" in " ".join(facts.notes)) is not equal
    # Back again: transformers ties by the config, which says what is in the files.
    convert(tmp_path / "core", tmp_path / "back", "hf")
    assert difference(strict_logits(tmp_path / "back", source.tokens), expected) <= CLOSE
