"""Changed, cut, swapped, dropped and doubled files of every trained format.

A mutation is refused in one line, or what is read is judged by torch: an element may differ from
the clean checkpoint only where `torch.load` or `torch.distributed.checkpoint`, reading the same
damaged files, differs, and then by the same bits. Files in each other's place are the worst: torch
has no idea of them, so the weights must be the clean ones, or there must be none.
"""

from __future__ import annotations

import argparse
import pickle
import random
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from ckptx.errors import CkptxError
from ckptx.registry import registry
from ckptx.testing.conversion import convert, values
from tests.oracles import fsdp, verl

from .scene import SEEDS

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "deepspeed"
ZERO = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))
CORE = {
    "target_tensor_parallel_size": 2,
    "target_pipeline_parallel_size": 2,
    "iteration": 7,
}
Change = tuple[bytes, bytes]
FILES = ("swap", "drop", "double", "turn")
BYTES = ("flip", "flip", "flip", "zero", "cut", "insert")


def arrays(tree: Any) -> Iterator[np.ndarray]:
    """Yield the tensors in what torch has read, in order, the shards of ranks as they are."""
    if isinstance(tree, torch.Tensor):
        local = getattr(tree, "_local_tensor", tree)
        yield local.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    elif isinstance(tree, dict):
        for key in tree:
            yield from arrays(tree[key])
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from arrays(value)


def storages(path: Path) -> Iterator[np.ndarray]:
    """Yield what lies in the data members of an archive, which torch's tensors are views of."""
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if "/data/" in member.filename:
                names = struct.unpack_from("<2H", content, member.header_offset + 26)
                start = member.header_offset + 30 + sum(names)
                yield np.frombuffer(content, np.uint8, member.file_size, start)


def changed(before: np.ndarray, after: np.ndarray) -> set[Change]:
    """Return old and new bits of each two bytes that differ; elements have as many or more."""
    if before.nbytes != after.nbytes:
        return {(b"size", b"size")}
    if before.nbytes % 2:
        before, after = np.append(before, 0), np.append(after, 0)
    old, new = before.view(np.uint16), after.view(np.uint16)
    return {(old[i].tobytes(), new[i].tobytes()) for i in np.flatnonzero(old != new)}


@dataclass
class Format:
    """A clean checkpoint, and how it is loaded."""

    loader: str
    path: Path

    def load(self, path: Path) -> dict[tuple[str, str], np.ndarray]:
        found = values(registry.loader(self.loader).load(path, {}))
        return {
            (message, key): np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            for message, tensors in found.items()
            for key, value in tensors.items()
        }

    def nameless(self, how: str) -> bool:
        """Return whether nothing in the files could tell that they are in each other's place."""
        moved = how.startswith(("swap", "turn"))
        doubled = self.path.name.startswith("universal") or "zero3" in self.path.name
        zero = self.path.name.startswith(("tp", "zero3", "universal"))
        return (moved or doubled) and (self.path.name == "core-torch" or zero)

    @cached_property
    def clean(self) -> dict[tuple[str, str], np.ndarray]:
        return self.load(self.path)

    @property
    def files(self) -> list[Path]:
        """What is mutated: everything but the config, whose numbers are nobody's to judge."""
        return sorted(p for p in self.path.rglob("*") if p.is_file() and p.suffix != ".json")


def by_torch(path: Path, damaged: Path) -> list[np.ndarray]:
    """Return what torch itself reads: of the whole directory, or of one file of a rank."""
    if damaged.suffix == ".distcp" or damaged.name == ".metadata":
        state: dict[str, Any] = {}
        planner, reader = _EmptyStateDictLoadPlanner(), FileSystemReader(damaged.parent)
        _load_state_dict(state, storage_reader=reader, planner=planner, no_dist=True)
        return list(arrays({key: state[key] for key in sorted(state)}))
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return list(arrays(torch.load(damaged, map_location="cpu", weights_only=True)))
        except pickle.UnpicklingError as error:
            if "weights_only" not in str(error):
                raise
            return list(storages(damaged))  # classes of DeepSpeed, which is not installed


def mutate(path: Path, files: list[Path], chance: random.Random) -> tuple[str, Path | None]:
    """Damage a checkpoint; return how, and the file if only its bytes were changed."""
    file = chance.choice(files)
    alike = [one for one in files if one.suffix == file.suffix and one != file]
    how = chance.choice(FILES if alike and chance.random() < 0.4 else BYTES)
    content = bytearray(file.read_bytes())
    spans = [len(content), min(len(content), 600), -min(len(content), 600)]
    span = chance.choice(spans)
    at = chance.randrange(abs(span)) + (len(content) + span if span < 0 else 0)
    other = chance.choice(alike) if alike else file
    match how:
        case "flip":
            content[at] ^= 1 << chance.randrange(8)
        case "zero":
            content[at : at + 8] = bytes(len(content[at : at + 8]))
        case "cut":
            del content[at:]
        case "insert":
            content[at:at] = chance.randbytes(chance.randrange(1, 9))
        case "drop":
            file.unlink()
            return how, None
        case "swap":
            file.write_bytes(other.read_bytes())
            other.write_bytes(content)
            return f"swap {file.name} with {other.name}", None
        case "double":
            file.write_bytes(other.read_bytes())
            return (
                f"{other.parent.name}/{other.name} in place of {file.parent.name}/{file.name}",
                None,
            )
        case "turn":
            found = [one.read_bytes() for one in [*alike, file]]
            for one, moved in zip([file, *alike], found, strict=True):
                one.write_bytes(moved)
            return "turn", None
    file.write_bytes(content)
    return how, file


def judge(clean: Format, place: Path, seed: int) -> str:
    """Mutate and load a copy; return what is wrong with the result, or nothing."""
    path = Path(shutil.copytree(clean.path, place / f"mutated-{seed}"))
    files = [path / file.relative_to(clean.path) for file in clean.files]
    how, damaged = mutate(path, files, random.Random(seed))
    what = f"{how} {damaged.relative_to(path) if damaged else ''}"
    try:
        found = clean.load(path)
    except CkptxError as error:
        return f"{what}: {str(error)!r} is not one line" if "\n" in str(error) else ""
    finally:
        keep = damaged and damaged.exists()
        again = damaged if keep else None
        read: list[np.ndarray] | str = "not read"
        if again is not None:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    read = by_torch(path, again)
            # torch has no exception of its own for what is damaged
            except (Exception, CheckpointException) as error:
                read = f"torch refuses it: {' '.join(str(error).split())[-100:]}"
        shutil.rmtree(path)
    if found.keys() != clean.clean.keys():
        # A changed name is another name, which no schema takes; a file elsewhere is a lost one.
        allowed = damaged or clean.nameless(how)
        return "" if allowed else f"{what}: {sorted(found.keys() ^ clean.clean.keys())[:3]}"
    own = set().union(*(changed(clean.clean[key], found[key]) for key in found))
    if not own:
        return ""
    if damaged is None:
        return "" if clean.nameless(how) else f"{what}: {len(own)} other values"
    if isinstance(read, str):
        return f"{what}: {len(own)} other values; {read}"
    before = by_torch(clean.path, clean.path / damaged.relative_to(path))
    if len(before) != len(read):
        return f"{what}: torch reads other tensors"
    theirs = set().union(*(changed(a, b) for a, b in zip(before, read, strict=True)))
    return "" if own <= theirs else f"{what}: {len(own)} other values, torch's are {len(theirs)}"


@pytest.fixture(scope="session")
def formats(tmp_path_factory, write_llama) -> Callable[[str], Format]:
    """Make a clean checkpoint of a format, once."""
    place = tmp_path_factory.mktemp("clean")
    made: dict[str, Format] = {}

    def make(name: str) -> Format:
        kind, _, how = name.partition(" ")
        target = place / name.replace(" ", "-")
        model = place / "hf"
        if not model.exists():
            write_llama(model, vocab_size=40)
        match kind:
            case "deepspeed":
                return Format("deepspeed", GOLDEN / how)
            case "core":
                options = {**CORE, "ckpt_format": how}
                hf = registry.loader("hf")
                return Format("core", convert(hf, model, registry.saver("core"), target, options))
            case "dcp":
                fsdp.save(model, target, 2, ("model",))
                shutil.copy(model / "config.json", target)
                return Format("dcp", target)
            case "verl":
                verl.save(model, target, 2, how)
                return Format("verl", target)
        target.mkdir()
        shutil.copy(model / "config.json", target)
        state = load_file(model / "model.safetensors")
        torch.save(state, target / "pytorch_model.bin")
        return Format("pytorch", target)

    def once(name: str) -> Format:
        if name not in made:
            made[name] = make(name)
        return made[name]

    return once


KINDS = ["core torch_dist", "core torch", "dcp", "verl fsdp", "pytorch", "deepspeed"]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_are_refused_or_read_as_torch_does(formats, tmp_path, kind, seed):
    """Each seed is twenty mutations."""
    chance = random.Random(seed)
    faults = []
    for number in range(20 * seed, 20 * seed + 20):
        name = f"deepspeed {chance.choice(ZERO)}" if kind == "deepspeed" else kind
        if fault := judge(formats(name), tmp_path, number):
            faults.append(f"{name}, mutation {number}: {fault}")
    assert not faults, "\n".join(faults)


@pytest.fixture
def ranked(formats, tmp_path) -> Format:
    """A checkpoint with the ranks of processes in its args, as Megatron's own have them."""
    clean = formats("core torch")
    path = Path(shutil.copytree(clean.path, tmp_path / "ranked"))
    for file in path.rglob("*.pt"):
        tp, pp = map(int, file.parent.name.split("_")[2:])
        state = torch.load(file, weights_only=False)
        state["args"].rank = tp + 4 * pp  # two data-parallel ranks between the stages
        torch.save(state, file)
    return Format("core", path)


def test_ranks_in_the_args_tell_files_in_each_others_place(ranked, formats):
    assert ranked.clean.keys() == formats("core torch").clean.keys()
    files = sorted(ranked.path.rglob("*.pt"))
    for one, other in [(0, 2), (1, 3), (0, 1), (0, 3)]:
        first, second = files[one].read_bytes(), files[other].read_bytes()
        files[one].write_bytes(second)
        files[other].write_bytes(first)
        with pytest.raises(CkptxError) as caught:
            ranked.load(ranked.path)
        assert "\n" not in str(caught.value)
        files[one].write_bytes(first)
        files[other].write_bytes(second)


def test_a_copy_in_place_of_another_rank_is_named(formats, tmp_path):
    path = Path(shutil.copytree(formats("core torch").path, tmp_path / "doubled"))
    files = sorted(path.rglob("*.pt"))
    files[2].write_bytes(files[0].read_bytes())
    with pytest.raises(CkptxError, match=r"mp_rank_01_000/.*: is a copy of .*mp_rank_00_000"):
        formats("core torch").load(path)
