"""Logits of two checkpoints, each computed by the real framework that owns it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptx.processes.interrupts import Interrupted
from ckptx.registry.source import Source
from ckptx.verification.frameworks.logits import (
    Inputs,
    LogitsComparison,
    compare_logits,
    measured,
)
from tests.interop.conversion import convert
from tests.oracles import hf, mcore
from tests.oracles.mcore import Layout

pytest.importorskip("transformers")
pytest.importorskip("megatron.core")
from ckptx.verification.frameworks import transformers_side
from ckptx.verification.frameworks.worker import SideError

CLOSE = 1e-5
TWO = {"target_tensor_parallel_size": 2}
MODELS = {"llama": (hf.llama, Layout(tp=2)), "mixtral": (hf.mixtral, Layout(tp=2, ep=2))}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Models written by transformers."""
    root = tmp_path_factory.mktemp("sources")
    return {name: (root / name, write(root / name)) for name, (write, _) in MODELS.items()}


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Whatever happens, nothing temporary is left."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    yield folder
    mcore_only = [one for one in folder.iterdir() if not one.name.startswith("mcore-oracle-")]
    assert not mcore_only


def verify(*args):
    return subprocess.run(
        [sys.executable, "-m", "ckptx", "verify", "--logits", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
    )


def swapped(source, target):
    """A copy whose first layer takes gate for up."""
    shutil.copytree(source, target)
    weights = load_file(source / "model.safetensors")
    gate, up = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up"))
    weights[gate], weights[up] = weights[up], weights[gate]
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


def test_a_conversion_computes_the_same(sources, tmp_path):
    source, _ = sources["llama"]
    convert(source, tmp_path / "core", "core", **TWO)
    done = verify(source, tmp_path / "core", "--logits-atol", CLOSE, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["frameworks"] == ["transformers", "megatron-core on a CPU"]
    assert answer["max_abs"] <= CLOSE
    assert answer["top1_agreement"] == 1
    assert np.shape(answer["tokens"]) == (2, 16)
    assert not answer["notes"]


@pytest.fixture
def apart(sources, tmp_path):
    """Two models that differ, 16 tokens, and the logits of both."""
    source, _ = sources["llama"]
    places = (source, swapped(source, tmp_path / "wrong"))
    tokens = torch.arange(16).reshape(2, 8) * 7
    return places, tokens, [hf.logits(place, tokens) for place in places]


def test_what_is_measured(apart):
    _, tokens, logits = apart
    a, b = (one.numpy() for one in logits)
    sides = ("a", "b", ("one", "other"), tokens.tolist())
    found = LogitsComparison(*sides, **measured(a, b), atol=1e-4)
    assert not found.equal
    assert_measured(found.to_json(), *logits)
    noted = replace(found, notes=("A: " + "a long remark " * 20,))
    assert max(map(len, noted.render(60).split("\n"))) <= 60


@pytest.mark.full
def test_swapped_projections_differ(sources, apart):
    places, _, _ = apart
    done = verify(*places, "--json", "--tokens", 8, "--seed", 3)
    assert done.returncode == 1, done.stderr
    answer = json.loads(done.stdout)
    tokens = torch.tensor(answer["tokens"])
    assert_measured(answer, *(hf.logits(place, tokens) for place in places))


def assert_measured(answer, a, b):
    assert answer["max_abs"] == pytest.approx(float((a - b).abs().max()), rel=1e-3)
    expected = torch.nn.functional.kl_div(
        b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none"
    )
    assert answer["mean_kl"] == pytest.approx(float(expected.sum(-1).mean()), rel=1e-2)
    same = (a.argmax(-1) == b.argmax(-1)).float().mean()
    assert answer["top1_agreement"] == pytest.approx(float(same))


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_what_megatron_wrote_computes_the_same(name, sources, tmp_path):
    _, config = sources[name]
    _, layout = MODELS[name]
    model = hf.mcore_model(config, spec="te", pad_to=256)
    mcore.write(model, layout, tmp_path / "core", torch.zeros(1, 2, dtype=torch.int64))
    convert(tmp_path / "core", tmp_path / "hf", "hf", loader_options={"true_vocab_size": 131})
    found = compare_logits(tmp_path / "core", tmp_path / "hf", atol=CLOSE)
    assert found.equal, found.render(80)
    assert found.vocab_size == 131
    assert found.frameworks == ("megatron-core on a CPU", "transformers")


@pytest.mark.full
@pytest.mark.parametrize("options", [{}, {"saver_transformer_impl": "local"}])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_mixtures_of_either_implementation(options, dtype, sources, tmp_path):
    source, _ = sources["mixtral"]
    convert(source, tmp_path / "core", "core", dtype=dtype, **TWO, **options)
    convert(source, tmp_path / "hf", "hf", dtype=dtype)
    found = compare_logits(tmp_path / "hf", tmp_path / "core", atol=CLOSE)
    assert found.equal, found.render(80)


@pytest.mark.full
@pytest.mark.parametrize(
    ("saver", "options", "framework"),
    [
        ("core", {"ckpt_format": "torch", **TWO}, "megatron-core on a CPU"),
        ("legacy", TWO, "megatron-core on a CPU"),
        ("dcp", {}, "transformers"),
        ("meta", {}, "transformers"),
    ],
)
def test_what_must_be_converted_first_is_noted(saver, options, framework, sources, tmp_path):
    source, _ = sources["llama"]
    convert(source, tmp_path / "other", saver, **options)
    other = Source(tmp_path / "other", hf_base=source)
    found = compare_logits(source, other, atol=CLOSE)
    assert found.equal, found.render(80)
    assert found.frameworks[1] == framework
    assert "this proves less" in found.notes[0]


def test_a_weight_that_is_not_there(sources, tmp_path):
    source, _ = sources["llama"]
    shutil.copytree(source, tmp_path / "hf")
    weights = load_file(source / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SideError, match=r"are missing, .*'model.norm.weight'"):
        transformers_side.run({"directory": str(tmp_path / "hf")})


@pytest.mark.full
def test_not_a_number_is_not_equal_to_itself(sources, tmp_path):
    source, _ = sources["llama"]
    shutil.copytree(source, tmp_path / "hf")
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    found = compare_logits(tmp_path / "hf", tmp_path / "hf", inputs=Inputs(tokens=2))
    assert not found.equal
    assert found.not_finite == (2 * 2 * 131,) * 2
    assert found.to_json()["max_abs"] is None
    assert "NaN or infinite" in found.render(80)


def test_stopping_leaves_nothing(sources, temporary):
    source, _ = sources["llama"]
    command = [sys.executable, "-m", "ckptx", "verify", "--logits", str(source), str(source)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(temporary.iterdir())) < 2:  # the comparison's folder, and the first process's
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.startswith(f"error: {Interrupted(signal.SIGTERM)}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--atol", "1"), "--atol does not go with --logits"),
        (("--prompt", "a"), "--prompt: neither side has a tokenizer; use --tokens"),
    ],
)
def test_bad_input_gets_one_line(arguments, said, sources):
    source, _ = sources["llama"]
    done = verify(source, source, *arguments)
    assert done.returncode in (1, 2)
    assert done.stderr == f"error: {said}\n"
