"""Logits of DeepSpeed's checkpoints, gathered by real DeepSpeed where it is installed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")
from ckptx.errors import FormatError
from ckptx.registry.source import Source
from ckptx.verification.frameworks import child, deepspeed_side
from ckptx.verification.frameworks.backends import prepare
from ckptx.verification.frameworks.logits import Inputs, compare_logits
from ckptx.verification.frameworks.worker import SideError

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "deepspeed"
DEEPSPEED = "DeepSpeed's gatherer and transformers"
SIZES = {"tp2_zero1": {"num_attention_heads": 4, "num_key_value_heads": 2}}
TIED = ("zero2_bf16_groups", "zero3_bf16", "universal2", "tp2_zero1")
GATHERED = ("zero2_bf16_groups", "zero2_fp16_round_robin", "zero3_bf16", "zero3_hpz")
REFUSED = {
    "zero1_bf16_frozen": "it leaves out 3 of the model's weights: 'model.embed_tokens.weight'",
    "zero0_bf16": "TypeError: 'NoneType' object is not iterable",
    "bf16_optimizer": "is not a zero checkpoint",
    "tp2_zero1": "Expected 2 of '*_optim_states.pt'",
    "universal2": "can't find *_optim_states.pt files",
}
needs_deepspeed = pytest.mark.skipif(not child.installed("deepspeed"), reason="needs deepspeed")


@pytest.fixture(autouse=True)
def leaves_nothing(tmp_path, monkeypatch):
    """Whatever happens, nothing is left in the temporary folder nor in shared memory."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    shared = Path("/dev/shm")
    before = {one.name for one in shared.iterdir() if one.owner() == shared.owner()}
    yield
    assert not [one for one in folder.iterdir() if one.name.startswith("ckptx")]
    assert not {one.name for one in shared.glob("*deepspeed*")} - before


def checkpoint(case, directory):
    """What DeepSpeed wrote, with its config."""
    shutil.copytree(GOLDEN / case, directory)
    config = json.loads((GOLDEN / "model" / "config.json").read_text())
    config |= SIZES.get(case, {}) | {"tie_word_embeddings": case in TIED}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def gathered_live(case, directory, config):
    """The directory of transformers with the weights that the ranks gathered from the engine."""
    directory.mkdir()
    shutil.copy(config / "config.json", directory)
    weights = {
        name: tensor.float() for name, tensor in load_file(f"{GOLDEN / case}.safetensors").items()
    }
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def pair(case, tmp_path):
    own = checkpoint(case, tmp_path / "deepspeed")
    return own, gathered_live(case, tmp_path / "hf", own)


@needs_deepspeed
@pytest.mark.parametrize(
    "case", [GATHERED[0], *(pytest.param(one, marks=pytest.mark.full) for one in GATHERED[1:])]
)
def test_deepspeed_gathers_what_the_engine_had(case, tmp_path):
    own, live = pair(case, tmp_path)
    found = compare_logits(own, live, atol=0)
    assert found.equal, found.render(80)
    assert found.frameworks == (DEEPSPEED, "transformers")
    assert not found.notes


@needs_deepspeed
@pytest.mark.full
@pytest.mark.parametrize("case", REFUSED)
def test_what_deepspeed_does_not_gather_is_converted_and_noted(case, tmp_path):
    own, live = pair(case, tmp_path)
    found = compare_logits(own, live, atol=0)
    assert found.equal, found.render(80)
    assert found.frameworks == ("transformers", "transformers")
    (note,) = found.notes
    assert note.startswith(
        "A: run by transformers from the directory that ckptx has made of deepspeed (DeepSpeed's "
        "own gatherer refuses it: "
    )
    assert REFUSED[case] in note
    assert "this proves less" in note


@needs_deepspeed
@pytest.mark.full
def test_a_wrong_conversion_differs(tmp_path):
    own, live = pair("zero3_bf16", tmp_path)
    weights = load_file(live / "model.safetensors")
    gate, up = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up"))
    weights[gate], weights[up] = weights[up], weights[gate]
    save_file(weights, live / "model.safetensors", {"format": "pt"})
    assert not compare_logits(own, live).equal


def left_out(state):
    del state["model.norm.weight"]


def left_over(state):
    state["model.norm.bias"] = torch.zeros(8)


def of_another_shape(state):
    state["model.norm.weight"] = torch.zeros(7)


def untied(state):
    state["lm_head.weight"] = state["lm_head.weight"] + 1


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (left_out, "leaves out 1 of the model's weights: 'model.norm.weight'"),
        (left_over, "finds 1 tensors that the model has not: 'model.norm.bias'"),
        (of_another_shape, "size mismatch for model.norm.weight"),
        (untied, "lm_head.weight are tied in the model, and differ"),
    ],
)
def test_names_and_shapes_are_those_of_the_model(damage, said, tmp_path):
    own = checkpoint("zero3_bf16", tmp_path / "deepspeed")
    state = load_file(f"{GOLDEN / 'zero3_bf16'}.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    damage(state)
    with pytest.raises((SideError, RuntimeError), match=said):
        deepspeed_side.filled(str(own), state)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_one_name_of_tied_weights_is_enough(name, tmp_path):
    own = checkpoint("zero3_bf16", tmp_path / "deepspeed")
    state = load_file(f"{GOLDEN / 'zero3_bf16'}.safetensors")
    embeddings = state.pop("model.embed_tokens.weight")
    model = deepspeed_side.filled(str(own), state | {name: embeddings})
    assert torch.equal(model.lm_head.weight, embeddings.float())
    assert torch.equal(model.model.embed_tokens.weight, embeddings.float())


def test_without_deepspeed_the_note_says_so(tmp_path, monkeypatch):
    own = checkpoint("zero3_bf16", tmp_path / "deepspeed")
    installed = child.installed
    monkeypatch.setattr(child, "installed", lambda name: name != "deepspeed" and installed(name))
    (tmp_path / "scratch").mkdir()
    side = prepare(Source(own), tmp_path / "scratch", "a")
    assert side.framework == "transformers"
    assert "(deepspeed is not installed: pip install 'ckptx[deepspeed]')" in side.notes[0]
    assert "this proves less" in side.notes[0]


def test_without_a_config_there_is_no_model(tmp_path):
    own = checkpoint("zero3_bf16", tmp_path / "deepspeed")
    (own / "config.json").unlink()
    (tmp_path / "scratch").mkdir()
    with pytest.raises(FormatError, match=r"deepspeed: holds no config.json, .* give --hf-base"):
        prepare(Source(own), tmp_path / "scratch", "a")


class _Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def hostile(directory, canary):
    """Put a call into the pickle of one rank's optimizer."""
    (path,) = directory.glob("global_step3/*_rank_1_*optim_states.pt")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    path.unlink()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            own = pickle.dumps(_Canary(canary), 2) if name.endswith("data.pkl") else data
            archive.writestr(name, own)


def test_a_hostile_pickle_never_comes_to_deepspeed(tmp_path, monkeypatch):
    own = checkpoint("zero3_bf16", tmp_path / "deepspeed")
    hostile(own, tmp_path / "canary")
    asked = []
    monkeypatch.setattr(child, "ask", lambda *a, **_: asked.append(a))
    with pytest.raises(FormatError, match=r"the pickle calls 'posix\.mkdir'"):
        compare_logits(own, own, inputs=Inputs(tokens=2))
    assert not asked
    assert not (tmp_path / "canary").exists()


@needs_deepspeed
def test_a_hostile_pickle_is_not_run_in_deepspeeds_process_either(tmp_path):
    own = checkpoint("zero3_bf16", tmp_path / "deepspeed")
    hostile(own, tmp_path / "canary")
    np.save(tmp_path / "tokens.npy", np.zeros((1, 2), np.int64))
    job = {"directory": str(own), "root": str(own), "tag": "global_step3"}
    job |= {"tokens": str(tmp_path / "tokens.npy"), "out": str(tmp_path / "logits.npy")}
    answer = child.ask("deepspeed_side", job)
    assert answer == {"refused": "the pickles hold posix.mkdir, which is not unpickled for it"}
    assert not (tmp_path / "canary").exists()
    monkey = tmp_path / "global"
    pickle.loads(pickle.dumps(_Canary(monkey), 2))  # the proof that the canary would sing
    assert monkey.is_dir()
