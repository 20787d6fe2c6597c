"""Hugging Face directories through the kit, and what is peculiar to them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from ckptx.containers.safetensors import read_header
from ckptx.errors import CkptxError, FormatError, SchemaError
from ckptx.hf_models.weights import read_weights
from ckptx.protocol.messages import PASSTHROUGH
from ckptx.registry import registry
from ckptx.testing import faults
from ckptx.testing.contracts import (
    Checkpoint,
    LoaderTests,
    SaverTests,
    assert_equal,
    assert_equal_arrays,
    assert_one_line,
    assert_same_files,
)
from ckptx.testing.conversion import convert, end_of, loaded, loaded_by_name, save, values
from ckptx.testing.models import (
    MIXTURES,
    MODELS,
    OLMOE,
    PADDED,
    TinyModel,
    messages,
    tiny,
    without_family,
    write_config,
    write_hf,
    write_safetensors,
)
from ckptx.testing.tagged import tagged

from .by_hand import torch_of

HF_LOADER, HF_SAVER = registry.loader("hf"), registry.saver("hf")
INDEX = "model.safetensors.index.json"


class TestOneFile(LoaderTests, SaverTests):
    loader, saver = HF_LOADER, HF_SAVER
    models = (*MODELS, *PADDED, *MIXTURES, OLMOE)

    def write(self, directory: Path, model: TinyModel) -> Checkpoint:
        return Checkpoint(write_hf(directory, model), model.canonical(padded=False))

    def option_sets(self):
        return [{}, {"max_shard_size": "1KB"}, {"max_shard_size": "300"}]


class TestShards(LoaderTests):
    loader = HF_LOADER
    models = MODELS[:1]

    def write(self, directory: Path, model: TinyModel) -> Checkpoint:
        return Checkpoint(write_hf(directory, model, shards=3), model.canonical())


class TestPickles(LoaderTests):
    """``pytorch_model.bin``, whole and in shards, made by torch."""

    loader = HF_LOADER
    models = (MODELS[0], MODELS[5], MODELS[6])
    shards = 1

    def write(self, directory: Path, model: TinyModel) -> Checkpoint:
        write_config(directory, model)
        tensors = {name: torch_of(array) for name, array in model.hf().items()}
        homes = {}
        for number in range(self.shards):
            suffix = f"-{number + 1:05d}-of-{self.shards:05d}" if self.shards > 1 else ""
            name = f"pytorch_model{suffix}.bin"
            part = {key: tensors[key] for key in list(tensors)[number :: self.shards]}
            torch.save(part, directory / name)
            homes.update(dict.fromkeys(part, name))
        if self.shards > 1:
            index = json.dumps({"metadata": {}, "weight_map": homes})
            (directory / "pytorch_model.bin.index.json").write_text(index)
        return Checkpoint(directory, model.canonical(padded=False))


class TestPickleShards(TestPickles):
    models = MODELS[:1]
    shards = 2


class TestUnknownFamily(LoaderTests):
    loader = HF_LOADER
    models = (without_family(MODELS[0]),)

    def write(self, directory: Path, model: TinyModel) -> Checkpoint:
        return Checkpoint(write_hf(directory, model), {PASSTHROUGH: model.hf()})


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_there_and_back_is_the_same_file(model, tmp_path):
    source = write_hf(tmp_path / "source", model)
    once = convert(HF_LOADER, source, HF_SAVER, tmp_path / "once" / "model")
    assert_equal_arrays(_by_name(once), model.hf(), "weights")
    assert (once / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    twice = convert(HF_LOADER, once, HF_SAVER, tmp_path / "twice" / "model")
    assert_same_files(once, twice)


def test_shards_hold_at_most_their_size_and_the_index_says_where(tmp_path):
    model = MODELS[0]
    target = save(HF_SAVER, messages(model, tmp_path), tmp_path / "t", {"max_shard_size": "2KB"})
    index = json.loads((target / INDEX).read_bytes())
    shards = sorted(path.name for path in target.glob("*.safetensors"))
    assert len(shards) > 3
    assert sorted(set(index["weight_map"].values())) == shards
    assert sorted(index["weight_map"]) == sorted(model.hf())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in model.hf().values())
    for shard in shards:
        entries = read_header(target / shard).entries
        assert {name for name, home in index["weight_map"].items() if home == shard} == set(entries)
        assert len(entries) == 1 or sum(e.end - e.begin for e in entries.values()) <= 2000


def test_one_file_is_a_source(tmp_path):
    model = MODELS[0]
    directory = write_hf(tmp_path, model)
    assert_equal(loaded(HF_LOADER, directory / "model.safetensors"), model.canonical())


TIED = tiny("qwen2", "tied", tied=True)


def _write_tied(directory, lm_head):
    write_config(directory, TIED)
    arrays = {**TIED.hf(), "lm_head.weight": lm_head}
    write_safetensors(directory / "model.safetensors", arrays)
    return directory


def test_an_equal_copy_of_tied_embeddings_is_dropped_by_name(tmp_path):
    source = _write_tied(tmp_path / "s", TIED.hf()["model.embed_tokens.weight"])
    sent = list(HF_LOADER.load(source, {}))
    assert_equal(values(sent), TIED.canonical())
    assert [drop.name for drop in end_of(sent).dropped] == ["lm_head.weight"]
    assert sent[0].parts["language"].tied
    target = convert(HF_LOADER, source, HF_SAVER, tmp_path / "t")
    assert_equal_arrays(_by_name(target), TIED.hf(), "weights")


def test_a_different_copy_of_tied_embeddings_is_kept_and_said(tmp_path):
    own = tagged("another", "bfloat16", (37, 16))
    source = _write_tied(tmp_path / "s", own)
    sent = list(HF_LOADER.load(source, {}))
    expected = {**TIED.canonical(), "output layer": {"weight": own}}
    assert_equal(values(sent), expected)
    assert "no longer tied" in end_of(sent).notes[0]
    target = convert(HF_LOADER, source, HF_SAVER, tmp_path / "t")
    assert_equal_arrays(_by_name(target), {**TIED.hf(), "lm_head.weight": own}, "weights")
    assert json.loads((target / "config.json").read_bytes())["tie_word_embeddings"] is False


def test_a_copy_that_differs_in_one_bit_differs(tmp_path):
    own = TIED.hf()["model.embed_tokens.weight"].copy()
    own.view(np.uint8)[-1, -1] ^= 1
    sent = list(HF_LOADER.load(_write_tied(tmp_path, own), {}))
    assert not sent[0].parts["language"].tied


def test_rotary_frequencies_are_dropped_by_name(tmp_path):
    model = MODELS[0]
    write_config(tmp_path, model)
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(4)]
    extra = {name: tagged(name, "float32", (1,)) for name in names}
    write_safetensors(tmp_path / "model.safetensors", {**extra, **model.hf()})
    sent = list(HF_LOADER.load(tmp_path, {}))
    assert [drop.name for drop in end_of(sent).dropped] == names
    assert_equal(values(sent), model.canonical())


def _unlisted(directory):
    index = json.loads((directory / INDEX).read_bytes())
    index["weight_map"].pop("model.norm.weight")
    (directory / INDEX).write_text(json.dumps(index))


def _misplaced(directory):
    index = json.loads((directory / INDEX).read_bytes())
    home = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.norm.weight"] = next(
        shard for shard in index["weight_map"].values() if shard != home
    )
    (directory / INDEX).write_text(json.dumps(index))


def _escaping(directory):
    index = json.loads((directory / INDEX).read_bytes())
    index["weight_map"]["model.norm.weight"] = "../other/model.safetensors"
    (directory / INDEX).write_text(json.dumps(index))


def _twice(directory):
    shard = directory / "model-00001-of-00002.safetensors"
    faults.drop(directory / "model-00002-of-00002.safetensors")
    faults.duplicate(shard, "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    "injure",
    [
        _unlisted,
        _misplaced,
        _escaping,
        _twice,
        lambda d: faults.drop(d / "model-00002-of-00002.safetensors"),
        lambda d: (d / INDEX).write_text("[]"),
        lambda d: (d / INDEX).write_text('{"weight_map": {}}'),
    ],
)
def test_an_index_that_does_not_fit_is_an_error(injure, tmp_path):
    directory = write_hf(tmp_path, MODELS[0], shards=2)
    injure(directory)
    with pytest.raises(CkptxError) as error:
        list(HF_LOADER.load(directory, {}))
    assert_one_line(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 32}, "embedding|dimensions"),
        ({"num_hidden_layers": 5}, "9 tensors are missing"),
        ({"num_hidden_layers": 3}, "9 tensors are not part of it"),
        ({"num_key_value_heads": 4}, "key"),
        ({"attention_bias": True}, "missing"),
        ({"intermediate_size": 17}, "mlp l0"),
    ],
)
def test_a_config_that_contradicts_the_weights_is_an_error(change, said, tmp_path):
    directory = write_hf(tmp_path, MODELS[0])
    config = json.loads((directory / "config.json").read_bytes()) | change
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(SchemaError, match=said) as error:
        list(HF_LOADER.load(directory, {}))
    assert_one_line(error.value)


def test_no_weights_is_an_error(tmp_path):
    write_config(tmp_path, MODELS[0])
    with pytest.raises(FormatError, match="holds no weights"):
        list(HF_LOADER.load(tmp_path, {}))


def test_a_vocabulary_that_is_too_small_is_not_made_up(tmp_path):
    model = tiny("llama", vocab_size=37, rows=30)
    with pytest.raises(SchemaError, match="30 rows, the vocabulary is 37"):
        HF_SAVER.plan(iter(messages(model, tmp_path)), {})


def test_a_config_is_made_where_none_came_along(tmp_path):
    model = MODELS[8]
    target = save(HF_SAVER, messages(model, tmp_path, config=False), tmp_path / "t", {})
    assert_equal(loaded(HF_LOADER, target), model.canonical())
    config = json.loads((target / "config.json").read_bytes())
    assert {key: config[key] for key in model.config() if key != "hidden_act"} == {
        key: value for key, value in model.config().items() if key != "hidden_act"
    }


def _by_name(directory):
    """The weights of a directory under their own names: without its config they pass through."""
    bare = directory.parent / f"{directory.name}-bare"
    bare.mkdir()
    for path in directory.glob("model*"):
        (bare / path.name).symlink_to(path)
    return loaded_by_name(HF_LOADER, bare)


class TestOneFileAndShards:
    """Of both transformers takes the file and others the shards; stale ones were left behind."""

    @pytest.fixture
    def directory(self, tmp_path, write_llama):
        """A model in two shards beside another in one file, told apart by its final norm."""
        other = write_llama(tmp_path / "other")
        found = write_llama(tmp_path / "model", shards=2)
        tensors = load_file(other / "model.safetensors")
        save_file(
            tensors | {"model.norm.weight": np.full(16, 7, "f4")}, found / "model.safetensors"
        )
        return found

    def test_both_are_refused(self, directory):
        with pytest.raises(FormatError, match="transformers takes the one file"):
            read_weights(directory)
        assert len(read_weights(directory / "model.safetensors").tensors) == 39

    def test_an_index_that_was_left_behind_is_not_read(self, directory):
        for shard in directory.glob("*-of-*"):
            shard.unlink()
        assert read_weights(directory).paths == [directory / "model.safetensors"]

    def test_a_file_in_the_index_is_a_shard(self, directory):
        names = load_file(directory / "model.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
        (directory / INDEX).write_text(json.dumps(index))
        assert read_weights(directory).paths == [directory / "model.safetensors"]

    def test_safetensors_go_before_shards_of_bin(self, directory):
        (directory / INDEX).rename(directory / "pytorch_model.bin.index.json")
        assert read_weights(directory).paths == [directory / "model.safetensors"]
