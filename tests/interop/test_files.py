"""The files: read by the libraries whose formats they are, and the same after a round."""

from __future__ import annotations

import json
import pickle
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from transformers import AutoModelForCausalLM

from ckptx.schemas.conventions.mcore import MCORE
from tests.oracles import hf, mcore
from tests.oracles.mcore import Layout
from tests.schemas.named import spec_from_config

from .conversion import (
    CLOSE,
    FAMILIES,
    IMPLEMENTATIONS,
    LAYOUTS,
    contents,
    convert,
    difference,
    sizes,
    strict_logits,
)

GRIDS = [("tp2-pp2", "pp2-vpp2"), ("tp4", "tp2-pp2-layout"), ("pp3-embedding-loss", "tp2")]
BESIDE = {
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"chat_template": "{{ messages }}"}\n',
    "chat_template.jinja": b"{{ messages }}\n",
    "modeling_custom.py": b"raise SystemExit('carried, never imported')\n",
    "tokenizer.model": bytes(range(256)),
    "LICENSE.txt": b"as is\n",
}


@pytest.fixture
def published(source_of, tmp_path):
    """A model as it is published, with its small files: by family, dtype and shard size."""

    def publish(family: str, dtype: torch.dtype, shard_size: str | None):
        model = AutoModelForCausalLM.from_pretrained(source_of(family).directory, dtype=dtype)
        directory = tmp_path / "published"
        model.save_pretrained(directory)
        if shard_size is not None:
            shard(directory, list(model.state_dict()), shard_size)
        for name, content in BESIDE.items():
            (directory / name).write_bytes(content)
        return directory

    return publish


def shard(directory: Path, order: list[str], size: str) -> None:
    """Make shards in the order of the model, as transformers 4 and so most published models do."""
    weights = load_file(directory / "model.safetensors")
    weights = {name: weights[name] for name in order if name in weights}
    (directory / "model.safetensors").unlink()
    split = split_torch_state_dict_into_shards(weights, max_shard_size=size)
    assert split.is_sharded
    for file, names in split.filename_to_tensors.items():
        save_file({name: weights[name] for name in names}, directory / file, {"format": "pt"})
    total = {"total_parameters": sum(tensor.numel() for tensor in weights.values())}
    index = {"metadata": split.metadata | total, "weight_map": split.tensor_to_filename}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize("shard_size", [None, "100KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "layouts", "format"),
    [
        ("llama", GRIDS[0], "torch_dist"),
        ("qwen2-tied", GRIDS[1], "torch"),
        ("llama-biases", GRIDS[1], "torch_dist"),
        ("llama3-rope", GRIDS[2], "torch_dist"),
    ],
)
def test_round_through_two_layouts_is_byte_identical(
    family, layouts, format, dtype, shard_size, published, tmp_path
):
    before = published(family, dtype, shard_size)
    other = {"torch": "torch_dist", "torch_dist": "torch"}[format]
    one, two = (sizes(LAYOUTS[name]) for name in layouts)
    convert(before, tmp_path / "one", "core", ckpt_format=format, **one)
    convert(tmp_path / "one", tmp_path / "two", "core", ckpt_format=other, **two)
    convert(tmp_path / "two", tmp_path / "after", "hf", max_shard_size=shard_size or "5GB")
    expected = contents(before)
    found = contents(tmp_path / "after")
    assert list(found) == list(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("format", "layouts"),
    [
        pytest.param("torch_dist", GRIDS[0], marks=pytest.mark.full),
        pytest.param("torch", GRIDS[1], marks=pytest.mark.full),
        pytest.param("torch", GRIDS[2], marks=pytest.mark.full),
        ("torch_dist", ("tp2", "tp2-pp2-last1")),
    ],
)
def test_every_family_comes_back(family, format, layouts, source_of, tmp_path):
    before = source_of(family).directory
    one, two = (sizes(LAYOUTS[name]) for name in layouts)
    convert(before, tmp_path / "one", "core", ckpt_format=format, **one)
    convert(tmp_path / "one", tmp_path / "two", "core", **two)
    convert(tmp_path / "two", tmp_path / "after", "hf")
    assert contents(tmp_path / "after") == contents(before)


@pytest.mark.parametrize("family", ["qwen3", "llama-biases", "qwen2-tied"])
def test_rank_files_are_torchs(family, source_of, tmp_path):
    source, layout = source_of(family), LAYOUTS["tp2-pp2"]
    convert(source.directory, tmp_path, "core", ckpt_format="torch", **sizes(layout))
    files = sorted(tmp_path.rglob("*.pt"))
    names = [path.parent.name for path in files]
    assert names == [f"mp_rank_{tp:02}_{pp:03}" for tp in range(2) for pp in range(2)]
    for file in files:
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None
        # argparse.Namespace is what Megatron, too, allows besides torch's own list.
        with torch.serialization.safe_globals([Namespace]):
            state = torch.load(file, weights_only=True)
        assert state["args"].tensor_model_parallel_size == 2
        assert all(
            value is None or isinstance(value, torch.Tensor) for value in state["model"].values()
        )
    # Megatron's load_state_dict with strict=True, and nothing forgiven.
    found = mcore.read(None, layout, tmp_path, source.tokens, format="torch", strict=True)
    assert difference(found[..., :131], source.logits) <= CLOSE


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # on purpose: one process
def test_torchs_own_reader_reads_torch_dist(source_of, tmp_path):
    source = source_of("llama")
    convert(source.directory, tmp_path, "core", **sizes(LAYOUTS["tp2-pp2"]))
    metadata = FileSystemReader(tmp_path / "release").read_metadata()
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if hasattr(entry, "size")
    }
    dcp.load(
        tensors,
        storage_reader=FileSystemReader(tmp_path / "release"),
        planner=DefaultLoadPlanner(flatten_state_dict=False),
        no_dist=True,
    )
    weights = hf.weights(source.directory)
    assert torch.equal(
        tensors["embedding.word_embeddings.weight"][:131], weights["model.embed_tokens.weight"]
    )
    layers = [
        torch.cat([weights[f"model.layers.{n}.mlp.{half}_proj.weight"] for half in ("gate", "up")])
        for n in range(4)
    ]
    assert torch.equal(tensors["decoder.layers.mlp.linear_fc1.weight"], torch.stack(layers))
    down = [weights[f"model.layers.{n}.mlp.down_proj.weight"] for n in range(4)]
    assert torch.equal(tensors["decoder.layers.mlp.linear_fc2.weight"], torch.stack(down))
    with (tmp_path / "release" / ".metadata").open("rb") as file:
        assert pickle.load(file).storage_data  # as Megatron reads it: plain pickle


@pytest.mark.parametrize("spec", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["llama", "llama-biases", "qwen2", "qwen3", "qwen2-tied"])
def test_rules_stand_in_the_order_of_megatrons_parameters(family, spec, source_of, tmp_path):
    source = source_of(family)
    model = source.megatron(spec, Layout())
    mcore.write(model, Layout(), tmp_path, source.tokens, format="torch")
    (file,) = tmp_path.rglob("*.pt")
    state = torch.load(file, weights_only=False)["model"]
    theirs = [name for name in state if not name.endswith("_extra_state")]
    config = json.loads((source.directory / "config.json").read_text())
    layout = MCORE[f"mcore-{spec}"]
    assert layout.names(spec_from_config(config, config["model_type"])) == theirs


@pytest.mark.parametrize("family", ["llama", "qwen2-tied"])
def test_bfloat16_is_torchs_rounding(family, source_of, tmp_path):
    source = source_of(family)
    facts = convert(source.directory, tmp_path / "hf", "hf", dtype="bfloat16")
    found, before = hf.weights(tmp_path / "hf"), hf.weights(source.directory)
    assert list(found) == list(before)
    for name, tensor in before.items():
        assert torch.equal(
            found[name].view(torch.int16), tensor.to(torch.bfloat16).view(torch.int16)
        )
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    assert sum(len(names) for names in facts.inexact.values()) == len(before)


@pytest.mark.parametrize("format", ["torch_dist", "torch"])
@pytest.mark.parametrize(("dtype", "flag"), [("bfloat16", "bf16"), ("float16", "fp16")])
def test_args_say_the_dtype_that_was_written(dtype, flag, format, source_of, tmp_path):
    source, layout = source_of("qwen3"), LAYOUTS["tp2-pp2"]
    options = {"ckpt_format": format, **sizes(layout)}
    convert(source.directory, tmp_path / "core", "core", dtype=dtype, **options)
    args = mcore.checkpoint_args(tmp_path / "core", format=format)
    assert args.params_dtype == getattr(torch, dtype)
    assert {name: getattr(args, name) for name in ("bf16", "fp16")} == {
        "bf16": flag == "bf16",
        "fp16": flag == "fp16",
    }
    # Back in float32, Megatron computes what transformers computes from torch's rounding.
    model = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(getattr(torch, dtype)))
        expected = model.eval()(source.tokens).logits
    convert(tmp_path / "core", tmp_path / "wide", "core", dtype="float32", **options)
    found = mcore.read(None, layout, tmp_path / "wide", source.tokens, format=format)
    assert difference(found[..., :131], expected) <= CLOSE


@pytest.mark.parametrize("family", ["qwen3", "qwen2-tied", "llama-biases"])
def test_state_dict_of_torch_save(family, source_of, tmp_path):
    source = source_of(family)
    model = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float32)
    file = tmp_path / "state" / "model.pt"
    file.parent.mkdir()
    torch.save(model.state_dict(), file)
    # The file is all there is; --hf-base says what it is.
    convert(file, tmp_path / "hf", "hf", hf_base=source.directory)
    assert difference(strict_logits(tmp_path / "hf", source.tokens), source.logits) == 0
    convert(file, tmp_path / "core", "core", hf_base=source.directory, **sizes(Layout(tp=2)))
    found = mcore.read(None, Layout(tp=2), tmp_path / "core", source.tokens)
    assert difference(found[..., :131], source.logits) <= CLOSE


@pytest.mark.parametrize("family", ["qwen3", "qwen2-tied"])
def test_single_file_in_megatrons_names(family, source_of, tmp_path):
    """It is what one rank of Megatron holds, and says itself what it is."""
    source, file = source_of(family), tmp_path / "core.pt"
    convert(source.directory, file, "pytorch", target_layout="core")
    assert torch.load(file, weights_only=False)["args"].num_layers == 4
    convert(file, tmp_path / "core", "core", **sizes(LAYOUTS["tp2-pp2"]))
    found = mcore.read(None, LAYOUTS["tp2-pp2"], tmp_path / "core", source.tokens)
    assert difference(found[..., :131], source.logits) <= CLOSE


@pytest.mark.parametrize("through_core", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "qwen2-tied"])
def test_torch_loads_the_state_dict(family, through_core, source_of, tmp_path):
    source = source_of(family)
    before = source.directory
    if through_core:
        convert(before, tmp_path / "core", "core", **sizes(LAYOUTS["pp2-vpp2"]))
        before = tmp_path / "core"
    convert(before, tmp_path / "weights.pt", "pytorch")
    with zipfile.ZipFile(tmp_path / "weights.pt") as archive:
        assert archive.testzip() is None
    state = torch.load(tmp_path / "weights.pt", weights_only=True)
    model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32)
    result = model.load_state_dict(state, strict=not source.config.tie_word_embeddings)
    # transformers' own state dict names a tied weight twice, its files once.
    tied = ["lm_head.weight"] * source.config.tie_word_embeddings
    assert (result.missing_keys, result.unexpected_keys) == (tied, [])
    with torch.no_grad():
        assert difference(model.eval()(source.tokens).logits, source.logits) <= CLOSE


def test_shards_of_transformers_5_come_back_with_every_bit(source_of, tmp_path):
    """Its shards follow the names, ours the order of the model; the tensors are equal."""
    source = source_of("qwen3")
    model = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float32)
    model.save_pretrained(tmp_path / "before", max_shard_size="200KB")
    assert len(list((tmp_path / "before").glob("*.safetensors"))) > 1
    convert(tmp_path / "before", tmp_path / "core", "core", **sizes(LAYOUTS["tp2-pp2"]))
    convert(tmp_path / "core", tmp_path / "after", "hf", max_shard_size="200KB")
    expected, found = (hf.weights(tmp_path / name) for name in ("before", "after"))
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_safetensors_reads_every_shard(source_of, tmp_path):
    source = source_of("qwen3")
    convert(source.directory, tmp_path / "hf", "hf", max_shard_size="100KB")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    expected = hf.weights(source.directory)
    assert set(index["weight_map"]) == set(expected)
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "hf" / file, "pt") as shard:
            assert torch.equal(shard.get_tensor(name), expected[name])


def test_a_state_dict_with_names_of_memory_and_what_is_said_of_them(tmp_path):
    base, source = tmp_path / "base", tmp_path / "live"
    hf.mixtral(base, num_hidden_layers=2)
    source.mkdir()
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.save(model.state_dict(), source / "model.pt")
    facts = convert(source, tmp_path / "hf", "hf", hf_base=base)
    found, expected = hf.weights(tmp_path / "hf"), hf.weights(base)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert any("have the names of transformers 5 in memory" in note for note in facts.notes)
