"""Side files: what plugins want beside a model's weights, and OpenVLA-OFT as their first user."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from ckptx.errors import PluginError
from ckptx.protocol.contracts import SideFile
from ckptx.protocol.hookspecs import hookimpl
from ckptx.registry import registry
from tests.interop.conversion import convert


class Projector(torch.nn.Module):
    """The module of OpenVLA-OFT, in small."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = torch.nn.Linear(3, 5)
        self.fc2 = torch.nn.Linear(5, 5)


class FilmedBlock(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = torch.nn.Linear(2, 2)
        self.scale = torch.nn.Linear(4, 2)
        self.shift = torch.nn.Linear(4, 2)


class Vla(torch.nn.Module):
    """A model with the parts that are loaded one by one."""

    def __init__(self, film: bool) -> None:
        super().__init__()
        self.vision_backbone = FilmedBlock() if film else torch.nn.Linear(2, 2)
        self.language_model = torch.nn.Linear(4, 4)
        self.proprio_projector = Projector()
        self.action_head = Projector()


OPENVLA = {"architectures": ["OpenVLAForActionPrediction"], "model_type": "openvla"}

OTHER = {"architectures": ["SomethingElse"], "model_type": "something"}


def write(place, model, config):
    """What RLinf saves of a model, and a base model with its config."""
    folder = place / "global_step_10" / "actor" / "model_state_dict"
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / "full_weights.pt")
    base = place / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(config))
    return {"hf_base": base}


@pytest.mark.parametrize("film", [True, False])
def test_modules_of_openvla_oft_load_from_their_own_files(film, tmp_path):
    model = Vla(film)
    base = write(tmp_path, model, OPENVLA)
    facts = convert(tmp_path / "global_step_10", tmp_path / "out", "hf", **base)
    modules = ["action_head", "proprio_projector", *(["vision_backbone"] if film else [])]
    files = sorted(path.name for path in (tmp_path / "out").glob("*.pt"))
    assert files == [f"{module}--10_checkpoint.pt" for module in modules]
    other = Vla(film)
    for module in modules:
        state = torch.load(tmp_path / "out" / f"{module}--10_checkpoint.pt", weights_only=True)
        getattr(other, module).load_state_dict(state)
        for name, tensor in getattr(model, module).state_dict().items():
            assert torch.equal(getattr(other, module).state_dict()[name], tensor)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == model.state_dict().keys()
    assert sum("checkpoint.pt holds" in note for note in facts.notes) == len(modules)


def test_dtypes_of_side_files_follow_the_weights(tmp_path):
    base = write(tmp_path, Vla(False), OPENVLA)
    convert(tmp_path / "global_step_10", tmp_path / "out", "hf", dtype="bfloat16", **base)
    state = torch.load(tmp_path / "out" / "action_head--10_checkpoint.pt")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


def test_other_models_have_no_side_files(tmp_path):
    base = write(tmp_path, Vla(True), OTHER)
    convert(tmp_path / "global_step_10", tmp_path / "out", "hf", **base)
    assert not list((tmp_path / "out").glob("*.pt"))


@dataclass(frozen=True, eq=False)
class Wanting:
    """An entry point whose module has the hook."""

    module: SimpleNamespace

    def load(self) -> SimpleNamespace:
        return self.module


@pytest.fixture
def wanted(monkeypatch):
    """A plugin that wants side files, beside those of ckptx."""

    def wanted(*files):
        hook = hookimpl(lambda config, names, iteration: list(files))
        plugin = Wanting(SimpleNamespace(side_files=hook))
        entry = registry.Entry("schema", "wanting", "wanting", "1", plugin)
        entries = {**registry.entries(), "schema_wanting": entry}
        monkeypatch.setattr(registry, "entries", lambda: entries)

    return wanted


def test_tensors_can_leave_the_weights(wanted, tmp_path):
    wanted(SideFile("parts/head.pt", {"a": "action_head.fc1.bias"}))
    model = Vla(False)
    base = write(tmp_path, model, OTHER)
    convert(tmp_path / "global_step_10", tmp_path / "out", "hf", **base)
    state = torch.load(tmp_path / "out" / "parts" / "head.pt")
    assert torch.equal(state["a"], model.action_head.fc1.bias)
    held = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert model.state_dict().keys() - held == {"action_head.fc1.bias"}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([SideFile("../x.pt", {})], "lies outside of the model's directory"),
        ([SideFile("/x.pt", {})], "lies outside of the model's directory"),
        ([SideFile("x.pt", {"a": "ghost"})], "the model has no 'ghost'"),
        ([SideFile("x.pt", {}), SideFile("x.pt", {})], "is asked for twice"),
    ],
)
def test_what_plugins_must_not_want(files, reason, wanted, tmp_path):
    wanted(*files)
    base = write(tmp_path, Vla(False), OTHER)
    with pytest.raises(PluginError, match=reason):
        convert(tmp_path / "global_step_10", tmp_path / "out", "hf", **base)
    assert not (tmp_path / "out").exists()
