"""Meta's files: its own model, transformers and Megatron Core compute the same logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from tests.oracles import hf, mcore, meta
from tests.oracles.mcore import Layout

from .conversion import (
    CLOSE,
    LONG_TOKENS,
    TOKENS,
    convert,
    difference,
    meaning,
    sizes,
    strict_logits,
)

WORDS = 132
BASE = {"dim": 64, "n_layers": 4, "n_heads": 8, "norm_eps": 1e-5, "multiple_of": 32}
LLAMA3 = BASE | {"n_kv_heads": 4, "vocab_size": WORDS, "rope_theta": 500000.0}
MISTRAL = {
    "dim": 64,
    "n_layers": 4,
    "head_dim": 12,
    "hidden_dim": 96,
    "n_heads": 8,
    "n_kv_heads": 4,
    "norm_eps": 1e-5,
    "vocab_size": WORDS,
}


@dataclass(frozen=True)
class Release:
    """A kind of model: its params, its shards, and the family that transformers has for it."""

    params: dict[str, Any]
    by_width: bool = False
    counts: tuple[int, ...] = (1, 2, 4)
    theta: float = 10000.0

    @property
    def tokens(self) -> torch.Tensor:
        return LONG_TOKENS if self.params.get("use_scaled_rope") else TOKENS


RELEASES = {
    "llama1": Release(BASE | {"vocab_size": -1, "norm_eps": 1e-6}, by_width=True),
    "llama2": Release(
        BASE | {"vocab_size": -1, "multiple_of": 16, "ffn_dim_multiplier": 1.3, "n_kv_heads": 4},
        by_width=True,
    ),
    "llama3": Release(LLAMA3),
    "llama3.1": Release(LLAMA3 | {"use_scaled_rope": True}),
    "mistral": Release(MISTRAL | {"rope_theta": 1e6}, counts=(1,)),
    "mistral-window": Release(MISTRAL | {"sliding_window": 5}, counts=(1,)),
}
CASES = [(name, count) for name, release in RELEASES.items() for count in release.counts]


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """The directory of a release in a number of shards, and the logits of its own model."""

    @cache
    def written(name: str, count: int) -> tuple[Path, torch.Tensor]:
        release = RELEASES[name]
        directory = tmp_path_factory.mktemp("meta") / "model"
        whole = meta.weights(release.params, WORDS)
        if name.startswith("mistral"):
            meta.write_mistral(directory, release.params, whole)
        else:
            meta.write(directory, release.params, whole, shards=count, by_width=release.by_width)
        return directory, meta.logits(directory, release.tokens)

    return written


@pytest.mark.parametrize(("name", "count"), CASES)
def test_transformers_computes_what_metas_model_does(name, count, published, tmp_path):
    directory, expected = published(name, count)
    facts = convert(directory, tmp_path / "hf", "hf")
    found = strict_logits(tmp_path / "hf", RELEASES[name].tokens)
    assert difference(found, expected) <= CLOSE
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.max_position_embeddings == {
        "llama1": 2048,
        "llama2": 4096,
        "llama3": 16384,  # the vocabulary of the tiny model is not that of Llama 3
        "llama3.1": 131072,
    }.get(name, 32768)
    assert f"{config.max_position_embeddings} is assumed" in " ".join(facts.notes)
    assert config.vocab_size == WORDS
    if name == "llama3.1":
        assert config.rope_parameters["rope_type"] == "llama3"
        assert config.rope_parameters["factor"] == 8.0


@pytest.mark.parametrize(
    ("name", "count", "layout"),
    [
        ("llama1", 2, Layout(tp=2, pp=2)),
        ("llama2", 4, Layout()),
        ("llama3", 1, Layout(tp=4)),
        ("llama3.1", 2, Layout(pp=2, vpp=2)),
        ("mistral", 1, Layout(tp=2)),
        ("mistral-window", 1, Layout(tp=2, pp=2)),
    ],
)
def test_megatron_computes_what_metas_model_does(name, count, layout, published, tmp_path):
    pytest.importorskip("megatron.core")
    directory, expected = published(name, count)
    convert(directory, tmp_path / "core", "core", **sizes(layout))
    found = mcore.read(None, layout, tmp_path / "core", RELEASES[name].tokens)
    assert difference(found[..., :WORDS], expected) <= CLOSE
    # And back, in another number of shards, as if Megatron had trained it.
    other = {"target_shards": 1 if name.startswith("mistral") else 2}
    split = "width" if RELEASES[name].by_width else "vocabulary"
    convert(tmp_path / "core", tmp_path / "meta", "meta", embedding_split=split, **other)
    assert difference(meta.logits(tmp_path / "meta", RELEASES[name].tokens), expected) <= CLOSE


@pytest.mark.parametrize("split", ["width", "vocabulary", None])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("family", ["llama", "llama-mha", "llama3-rope"])
def test_metas_model_computes_what_transformers_does(family, count, split, source_of, tmp_path):
    source = source_of(family)
    even = tmp_path / "even"  # 131 words do not divide, and Meta's model does not pad
    if count > 1:
        with pytest.raises(ValueError, match="131 words of the vocabulary do not divide"):
            convert(source.directory, even, "meta", target_shards=count)
        write = hf.llama3_rope if family == "llama3-rope" else hf.llama
        write(even, vocab_size=WORDS, num_key_value_heads=source.config.num_key_value_heads)
        expected = hf.logits(even, source.tokens)
    else:
        even, expected = source.directory, source.logits
    options = {"target_shards": count, "embedding_split": split}
    convert(even, tmp_path / "meta", "meta", **options)
    files = sorted(path.name for path in (tmp_path / "meta").glob("*.pth"))
    assert files == [f"consolidated.{rank:02d}.pth" for rank in range(count)]
    assert difference(meta.logits(tmp_path / "meta", source.tokens), expected) <= CLOSE
    convert(tmp_path / "meta", tmp_path / "back", "hf")
    for name, tensor in hf.weights(even).items():
        assert torch.equal(hf.weights(tmp_path / "back")[name], tensor)
    assert meaning(tmp_path / "back") == meaning(even)


@pytest.mark.parametrize("family", ["mistral", "mistral-window"])
def test_mistrals_model_computes_what_transformers_does(family, source_of, tmp_path):
    source = source_of(family)
    convert(source.directory, tmp_path / "meta", "meta")
    assert not list((tmp_path / "meta").glob("*.pth"))
    assert difference(meta.logits(tmp_path / "meta", source.tokens), source.logits) <= CLOSE
    convert(tmp_path / "meta", tmp_path / "back", "hf")  # detected in spite of the config beside it
    assert difference(strict_logits(tmp_path / "back", source.tokens), source.logits) == 0


def test_tied_embeddings_are_stored_once_under_both_names(tmp_path):
    directory = tmp_path / "hf"
    hf.llama(directory, vocab_size=WORDS, tie_word_embeddings=True)
    expected = hf.logits(directory, TOKENS)
    for count, split in ((1, None), (2, "vocabulary"), (2, "width")):
        target = tmp_path / f"{count}-{split}"
        convert(directory, target, "meta", target_shards=count, embedding_split=split)
        assert difference(meta.logits(target, TOKENS), expected) <= CLOSE
        shard = torch.load(target / "consolidated.00.pth", weights_only=True)
        shared = shard["output.weight"].data_ptr() == shard["tok_embeddings.weight"].data_ptr()
        assert shared == (split != "width")
        (target / "config.json").unlink()  # the weights alone say that they are tied
        back = tmp_path / f"{count}-{split}-back"
        facts = convert(target, back, "hf")
        assert AutoConfig.from_pretrained(back).tie_word_embeddings
        assert "tied" in " ".join(facts.notes)
        assert difference(strict_logits(back, TOKENS), expected) <= CLOSE


def test_shards_are_cut_anew(published, tmp_path):
    directory, expected = published("llama2", 4)
    convert(directory, tmp_path / "kept", "meta")
    params, kept = meta.read(tmp_path / "kept")
    _, before = meta.read(directory)
    for ours, theirs in zip(kept, before, strict=True):
        del theirs["rope.freqs"]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert meta.hidden_dim(params) == meta.hidden_dim(RELEASES["llama2"].params)
    convert(directory, tmp_path / "one", "meta", target_shards=1)
    assert difference(meta.logits(tmp_path / "one", TOKENS), expected) <= CLOSE


@pytest.mark.parametrize(("kind", "size"), [("meta", "llama3"), ("hf", "llama3")])
def test_megatrons_own_command_line(kind, size, published, tmp_path):
    directory, expected = published("llama3", 2)
    source = directory
    if kind == "hf":
        source = tmp_path / "hf"
        convert(directory, source, "hf")
    done = _convert_py(
        *("--model-type", "GPT", "--loader", "llama_mistral", "--saver", "core"),
        *("--checkpoint-type", kind, "--model-size", size, "--tokenizer-model", "none"),
        *("--load-dir", source, "--save-dir", tmp_path / "core", "--bf16"),
        *("--target-tensor-parallel-size", 2, "--make-vocab-size-divisible-by", 8),
        *("--loader-transformer-impl", "local", "--true-vocab-size", WORDS),
    )
    assert done.returncode == 0, done.stderr
    args = mcore.checkpoint_args(tmp_path / "core")
    assert (args.params_dtype, args.padded_vocab_size) == (torch.bfloat16, 144)
    # In float32 again, Megatron computes what Meta's model computes from torch's rounding.
    rounded = {
        name: tensor.bfloat16().float()
        for name, tensor in meta.weights(RELEASES["llama3"].params, WORDS).items()
    }
    meta.write(tmp_path / "rounded", RELEASES["llama3"].params, rounded)
    convert(tmp_path / "core", tmp_path / "wide", "core", dtype="float32")
    found = mcore.read(None, Layout(tp=2), tmp_path / "wide", TOKENS)
    assert difference(found[..., :WORDS], meta.logits(tmp_path / "rounded", TOKENS)) <= CLOSE
    assert difference(found[..., :WORDS], expected) > CLOSE


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "count", "version"),
    [
        ("llama1", 1, "1"),
        ("llama1", 2, "1"),
        ("llama2", 4, "2"),
        ("llama3", 2, "3"),
        ("llama3.1", 4, "3.1"),
    ],
)
def test_weights_are_those_of_transformers_own_script(name, count, version, published, tmp_path):
    python = os.environ.get("CKPTX_TRANSFORMERS4_PYTHON")
    if not python:
        pytest.skip("CKPTX_TRANSFORMERS4_PYTHON names no Python with transformers 4.46 and torch")
    directory, _ = published(name, count)
    call = {
        "model_path": str(tmp_path / "theirs"),
        "input_base_path": str(directory),
        "llama_version": version,
        "vocab_size": WORDS,
        "num_shards": count,
    }
    program = (
        "from transformers.models.llama.convert_llama_weights_to_hf import write_model\n"
        f"write_model(**{call!r})\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    convert(directory, tmp_path / "ours", "hf", dtype="bfloat16")  # the script knows no other
    theirs, ours = hf.weights(tmp_path / "theirs"), hf.weights(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    said, wrote = (
        json.loads((tmp_path / d / "config.json").read_text()) for d in ("theirs", "ours")
    )
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_key_value_heads",
        "rope_theta",
        "rms_norm_eps",
    ):
        assert wrote[key] == said[key], key
    assert wrote["rope_scaling"] == said["rope_scaling"]


def _convert_py(*words: object) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(root / "convert.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
