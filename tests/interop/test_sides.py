"""Whatever ``convert`` reads, ``verify``, ``inspect`` and ``print-tensor`` read, by its options."""

from __future__ import annotations

import json

import click
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from ckptx.cli.main import command
from ckptx.conversion import megatron_modules
from tests.oracles import adapters, hf, rlinf

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "llama"
    hf.llama(directory, num_hidden_layers=2, vocab_size=96)
    return directory


@pytest.fixture
def run(capsys):
    """Run a command; return its exit code, stdout and stderr."""

    def ran(*words):
        megatron_modules.install()
        code = command().main([str(word) for word in words], "ckptx", standalone_mode=False)
        return code or 0, *capsys.readouterr()

    return ran


@pytest.fixture
def containers(model, tmp_path):
    """A DCP directory of two models: ``model``, and ``ema`` with another norm."""
    weights = load_file(model / "model.safetensors")
    other = weights | {"model.norm.weight": weights["model.norm.weight"] + 1}
    dcp.save({"model": weights, "ema": other}, checkpoint_id=str(tmp_path / "dcp"))
    return tmp_path / "dcp"


def test_a_container_of_either_side(containers, model, run):
    verify = ("verify", "--json", containers, containers, "--hf-base", model)
    equal, out, _ = run(*verify, "--container", "model")
    assert (equal, json.loads(out)["equal"]) == (0, True)
    equal, out, _ = run(*verify, "--a.container", "model", "--b.container=ema")
    (difference,) = json.loads(out)["differences"]
    assert (equal, difference["name"]) == (1, "final norm: weight")
    # What is said of one side counts more than what is said of both.
    assert run(*verify, "--container", "ema", "--a.container", "model")[0] == 1
    # An option that only one loader has concerns that side.
    assert run("verify", model, containers, "--container", "model", "--b.hf-base", model)[0] == 0
    assert run("verify", model, containers, "--container", "ema")[0] == 1


def test_a_container_of_the_checkpoint_that_is_shown(containers, run):
    for container, step in (("model", 0), ("ema", 1)):
        given = (containers, "model.norm.weight", "--container", container, "--json")
        values = json.loads(run("print-tensor", *given)[1])["values"]
        assert values == pytest.approx([1 + step] * len(values), abs=0.5)
        assert run("inspect", containers, "--container", container)[0] == 0


def test_an_adapter_on_its_base(model, run, tmp_path):
    adapters.make(model, tmp_path / "peft", target_modules=EVERY, r=4)
    weights = adapters.merged(model, [tmp_path / "peft"], tmp_path / "merged")
    assert run("verify", tmp_path / "peft", tmp_path / "merged", "--hf-base", model)[0] == 0
    assert run("verify", tmp_path / "peft", tmp_path / "merged", "--a.hf-base", model)[0] == 0
    _, out, _ = run("inspect", tmp_path / "peft", "--json")
    assert all("lora_" in one["name"] for one in json.loads(out)["tensors"])
    _, out, _ = run("inspect", tmp_path / "peft", "--json", "--hf-base", model)
    shown = {one["name"]: tuple(one["shape"]) for one in json.loads(out)["tensors"]}
    assert shown == {name: tuple(tensor.shape) for name, tensor in weights.items()}


def test_local_shards_of_rlinf(model, run, tmp_path):
    rlinf.save(model, tmp_path / "step", 2, "fsdp2", "local_shard")
    (shards,) = tmp_path.rglob("local_shard_checkpoint")
    assert run("verify", model, shards, "--hf-base", model)[0] == 0
    assert run("inspect", shards, "--hf-base", model)[0] == 0


def test_names_that_no_side_has_are_refused(model, run):
    with pytest.raises(click.UsageError, match=r"--container belongs to .* not chosen"):
        run("verify", model, model, "--container", "model")
    with pytest.raises(click.NoSuchOption, match=r"--a\.container"):
        run("verify", model, model, "--a.container", "model")


def test_renamed_weights_of_one_side(model, run, tmp_path):
    weights = load_file(model / "model.safetensors")
    torch.save({f"policy.{name}": one for name, one in weights.items()}, tmp_path / "a.pt")
    given = ("verify", tmp_path / "a.pt", model, "--a.hf-base", model)
    assert run(*given, "--a.strip-prefix", "policy.")[0] == 0
