"""Hostile pickles, put where every loader reads one: refused or passed by, and never run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ckptx.cli import main as cli
from ckptx.containers import pickle_reader
from ckptx.errors import CkptxError, FormatError
from ckptx.registry import registry
from tests.work import at_most

from .conftest import ROOT
from .pickle_catalogue import CANARY, ODD, REFUSED, named, text

GOLDEN = ROOT / "tests" / "golden" / "deepspeed"


@pytest.fixture(autouse=True)
def _nothing_runs(tmp_path, monkeypatch):
    """Nothing is made in the working directory, nothing is imported."""
    place = tmp_path / "working directory"
    place.mkdir()
    monkeypatch.chdir(place)
    environment, modules = dict(os.environ), set(sys.modules)
    yield
    assert list(place.iterdir()) == []
    assert dict(os.environ).items() - environment.items() <= {
        ("PYTEST_CURRENT_TEST", os.environ.get("PYTEST_CURRENT_TEST"))
    }
    assert "antigravity" not in set(sys.modules) - modules


SINGING = [
    "os.system",
    "posix.system",
    "eval",
    "exec",
    "subprocess.Popen",
    "io.open",
    "INST",
    "OBJ",
]


def test_the_canary_sings(tmp_path):
    """What the catalogue calls runs where nobody looks: so its silence elsewhere says something."""
    data = [b"\x80\x02" + REFUSED[name] + b"." for name in SINGING]
    program = f"""
import os, pickle, sys, time
for name, data in zip({SINGING!r}, {data!r}):
    os.mkdir(name)
    os.chdir(name)
    made = pickle.loads(data)
    getattr(made, "wait", int)()
    os.chdir("..")
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, check=True)
    assert sorted(path.parent.name for path in tmp_path.rglob(CANARY)) == sorted(SINGING)


def test_there_are_many():
    assert len(REFUSED) >= 200
    assert len(ODD) >= 50


def wrapped(fragment: bytes) -> Iterator[bytes]:
    """Pickles of every protocol that hold what a fragment makes, or have thrown it away."""
    for prefix in (b"", b"\x80\2", b"\x80\4", b"\x80\5"):
        yield prefix + fragment + b"."
        yield prefix + b"]" + fragment + b"a."
        yield prefix + b"}" + text("model") + b"}" + text("x") + fragment + b"ss."
        yield prefix + fragment + b"0N."


@pytest.mark.parametrize("name", REFUSED)
def test_the_unpickler_refuses(name):
    for data in wrapped(REFUSED[name]):
        with pytest.raises(FormatError) as caught:
            pickle_reader.loads(data, file="a.pt")
        message = str(caught.value)
        assert message.startswith("a.pt: ")
        assert message.isprintable()
        assert len(message) < 500


@pytest.mark.parametrize("name", [*REFUSED, *ODD])
def test_truncated_at_every_byte(name):
    data = b"\x80\x02" + {**REFUSED, **ODD}[name] + b"."
    sizes = range(len(data)) if len(data) < 600 else [*range(100), len(data) // 2, len(data) - 1]
    for size in sizes:
        with pytest.raises(FormatError):
            pickle_reader.loads(data[:size], file="a.pt")


def archive(path: Path, pickled: bytes) -> None:
    """A file of ``torch.save`` with this pickle, and one storage of 64 bytes."""
    with zipfile.ZipFile(path, "w") as members:
        members.writestr("archive/data.pkl", pickled)
        members.writestr("archive/version", b"3\n")
        members.writestr("archive/data/0", bytes(64))


_KEYS = (
    *("model", "module", "args", "state_dict", "weight", "iteration", "checkpoint_version"),
    *("optimizer_state_dict", "param_shapes", "buffer_names", "shared_params", "ds_version"),
    *("dp_world_size", "mp_world_size", "frozen_param_shapes", "fsdp_version", "optimizer"),
    *("lr_scheduler", "rng_state", "language_model", "param", "model0", "fsdp_checkpoint"),
    *("num_experts", "ds_config", "global_steps", "rng", "state_dict_metadata", "storage_data"),
)


def shapes_of(fragment: bytes) -> Iterator[bytes]:
    """Pickles that have a fragment where readers look: as the whole, as an entry, as a tensor."""
    yield b"\x80\x02" + fragment + b"."
    yield b"\x80\x02}" + text("model.norm.weight") + fragment + b"s."
    yield b"\x80\x02}" + b"".join(text(key) + fragment + b"s" for key in _KEYS) + b"."
    for outer in ("model", "module"):
        inner = b"}" + text("model.norm.weight") + fragment + b"s" + text("args") + fragment + b"s"
        yield b"\x80\x02}" + text(outer) + inner + b"s" + text("args") + b"}s."
    args = b"}" + b"".join(text(key) + fragment + b"s" for key in ("num_layers", "hidden_size"))
    yield b"\x80\x02}" + text("args") + named("argparse", "Namespace") + b")R" + args + b"bs."


Setter = Callable[[bytes], None]


@pytest.fixture(scope="module")
def sources(tmp_path_factory, write_llama) -> dict[str, tuple[str, Path, Path]]:
    """Checkpoints of every loader that reads pickles: loader, source, and the file to replace."""
    place = tmp_path_factory.mktemp("sources")
    llama = write_llama(place / "llama")
    found: dict[str, tuple[str, Path, Path]] = {}

    def converted(name: str, *options: str) -> Path:
        with pytest.raises(SystemExit) as end:
            cli.main(["convert", str(llama), str(place / name), "--quiet", *options])
        assert not end.value.code
        return place / name

    def copied(source: Path, name: str) -> Path:
        return Path(shutil.copytree(source, place / name))

    dist = converted("dist", "--to", "core", "--iteration", "7")
    found["core: common.pt"] = "core", dist, dist / "iter_0000007" / "common.pt"
    again = copied(dist, "dist2")
    found["core: .metadata"] = "core", again, again / "iter_0000007" / ".metadata"
    ranks = converted("ranks", "--to", "core", "--ckpt-format", "torch", "--tp", "2")
    (rank,) = ranks.rglob("mp_rank_01/*.pt")
    found["core: a rank"] = "core", ranks, rank
    again = copied(ranks, "ranks2")
    (rank,) = again.rglob("mp_rank_00/*.pt")
    found["core: the first rank"] = "core", again, rank
    legacy = converted("legacy", "--to", "legacy")
    (rank,) = legacy.rglob("mp_rank_00/*.pt")
    found["legacy"] = "legacy", legacy, rank
    meta = converted("meta", "--to", "meta")
    found["meta"] = "meta", meta, meta / "consolidated.00.pth"
    pytorch = converted("pytorch", "--to", "pytorch")
    found["pytorch"] = "pytorch", pytorch, pytorch / "model.pt"
    dcp = converted("dcp", "--to", "dcp")
    found["dcp"] = "dcp", dcp, dcp / ".metadata"
    hf = place / "hf"
    hf.mkdir()
    shutil.copyfile(llama / "config.json", hf / "config.json")
    found["hf"] = "hf", hf, hf / "pytorch_model.bin"
    verl = place / "verl"
    verl.mkdir()
    torch.save({"model.norm.weight": torch.ones(4)}, verl / "model_world_size_2_rank_0.pt")
    found["verl"] = "verl", verl, verl / "model_world_size_2_rank_1.pt"
    alone = place / "verl2"
    alone.mkdir()
    found["verl: one rank"] = "verl", alone, alone / "model_world_size_1_rank_0.pt"
    shards = place / "local_shard_checkpoint"
    shards.mkdir()
    found["rlinf"] = "rlinf", shards, shards / "checkpoint_rank_0.pt"
    adapter = place / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    found["peft"] = "peft", adapter, adapter / "adapter_model.bin"
    for name in ("zero0_bf16", "zero2_bf16_groups", "zero3_bf16", "universal2"):
        directory = copied(GOLDEN / name, name)
        for kind in ("*model_states.pt", "*optim_states.pt", "fp32.pt"):
            for path in sorted(directory.rglob(kind))[:1]:
                found[f"deepspeed: {name}: {kind}"] = "deepspeed", directory, path
    return found


NAMES = [
    *("core: common.pt", "core: .metadata", "core: a rank", "core: the first rank", "legacy"),
    *("meta", "pytorch", "dcp", "hf", "verl", "verl: one rank", "rlinf", "peft"),
    *("deepspeed: zero0_bf16: *model_states.pt", "deepspeed: zero2_bf16_groups: *model_states.pt"),
    *("deepspeed: zero2_bf16_groups: *optim_states.pt", "deepspeed: zero3_bf16: *model_states.pt"),
    *("deepspeed: zero3_bf16: *optim_states.pt", "deepspeed: universal2: *model_states.pt"),
    "deepspeed: universal2: fp32.pt",
]


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[None]:
    """Put a file back, or take it away, after others have stood in its place."""
    before = path.read_bytes() if path.exists() else None
    try:
        yield
    finally:
        path.unlink() if before is None else path.write_bytes(before)


def put(path: Path, pickled: bytes) -> None:
    if path.name == ".metadata":
        path.write_bytes(pickled)
    else:
        archive(path, pickled)


EVERY = pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.full)])
"""Every how many hostile pickles; the unpickler meets them all every day."""


@EVERY
@pytest.mark.parametrize("place", NAMES)
def test_every_loader_refuses(place, step, sources):
    loader, source, path = sources[place]
    with replaced(path):
        for name, fragment in list(REFUSED.items())[NAMES.index(place) % step :: step]:
            for pickled in list(shapes_of(fragment))[:2]:
                put(path, pickled)
                with pytest.raises(CkptxError) as caught:
                    list(registry.loader(loader).load(source, {}))
                assert path.name in str(caught.value), name
                assert str(caught.value).isprintable(), name


@EVERY
@pytest.mark.parametrize("place", NAMES)
def test_no_loader_stumbles(place, step, sources):
    """Values that are inert and not what they seem: a `CkptxError`, or passed by."""
    loader, source, path = sources[place]
    stumbled = []
    with replaced(path):
        for name, fragment in list(ODD.items())[NAMES.index(place) % step :: step]:
            for number, pickled in enumerate(shapes_of(fragment)):
                put(path, pickled)
                try:
                    with at_most():
                        list(registry.loader(loader).load(source, {}))
                except CkptxError as error:
                    stumbled += [f"{name}, shape {number}: long"] * (len(str(error)) > 2000)
                except Exception as error:
                    stumbled.append(f"{name}, shape {number}: {error!r}")
    assert not stumbled, "\n".join(stumbled)
