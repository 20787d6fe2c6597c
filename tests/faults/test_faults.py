"""Faults at random places: the result is exact, or there is one line that says why there is none.

Each case is one seed; ``CKPTX_FAULTS=200`` runs more of each kind than the few of every day.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ckptx.writing import journal

from .scene import CORE, EVERY, LATE, PATIENCE, PUBLISHING, SEEDS, STEPS, Scene, digests


def lose_power(scene: Scene) -> dict[str, int]:
    """Undo, page by page and at random, what no sync has brought to the disk.

    Returns the bytes of each file up to the end of what was ever synced; it keeps at least these.
    """
    unsynced: dict[str, list[tuple[int, int]]] = {}
    begun: dict[tuple[str, str], int] = {}
    kept = scene.synced
    for line in scene.log.read_text().splitlines():
        kind, path, first, second = line.split("\t")
        writes = unsynced.setdefault(path, [])
        if kind == "write":
            writes.append((int(first), int(second)))
        elif kind == "begin":
            begun[path, first] = len(writes)
        else:
            count = begun.pop((path, first))
            kept[path] = max(kept.get(path, 0), *(sum(write) for write in writes[:count]), 0)
            writes[:count] = [(0, 0)] * count
    for path, writes in unsynced.items():
        if not Path(path).is_file() or "ckptx-partial" not in path:
            continue
        lasting = str(Path(path).parent) in kept or path in kept
        if not lasting and scene.random.random() < 0.5:
            Path(path).unlink()
            continue
        with Path(path).open("r+b") as file:
            for offset, size in writes:
                for page in range(offset, offset + size, 4096):
                    if scene.random.random() < 0.5:
                        file.seek(page)
                        file.write(bytes(min(4096, offset + size - page)))
            if writes and writes[-1][1] and scene.random.random() < 0.3:
                end = writes[-1][0] + scene.random.randrange(writes[-1][1])
                file.truncate(max(end, min(kept.get(path, 0), file.seek(0, os.SEEK_END))))
    return kept


def finish(scene: Scene, record: Path) -> None:
    """Run once more what was killed; it goes on from what its journal ``record`` says."""
    kept = journal.read(record)
    whole = bool(scene.whole())
    if whole and not scene.partials():
        return
    code = scene.run(*CORE, *EVERY)
    if code and whole:  # all was done but to remove the last of what was of use
        assert "exists; choose another" in scene.errors, scene.says("not continued")
        return
    assert code == 0, scene.says("not continued")
    assert "damaged" not in scene.errors, scene.says("recorded before it was on disk")
    resumed = "resuming" in scene.errors
    assert resumed == (whole or bool(kept and kept.durable)), scene.says("not resumed")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("power", [False, True], ids=["killed", "power-lost"])
def test_a_killed_conversion_is_continued_to_the_same_bytes(scene, sources, power, seed):
    record = scene.target / "release.ckptx-partial" / journal.NAME
    for attempt in range(3):
        role, victim = scene.random.choice(
            [
                ("saver", "self"),
                ("saver", "parent"),
                ("saver", "parent"),
                ("child", "self"),
                ("parent", "self"),
            ]
        )
        step = scene.random.randrange(1, 60)
        if role == "saver":
            step = scene.random.choice(
                [scene.random.randrange(1, STEPS), scene.random.choice(LATE)]
            )
        threads = str(scene.random.choice([1, 2, 4]))
        scene.log.unlink(missing_ok=True)
        arguments = (*CORE, *EVERY, "--threads", threads)
        code = scene.run(*arguments, fault=f"{role} {victim} {step}")
        if code == 0:
            break
        if code > 0:
            scene.check_refusal(before=attempt > 0)  # its partial directory may still be there
        if scene.whole():  # killed while it cleaned up: it is there, and whole
            break
        if power and scene.log.exists():
            synced = lose_power(scene).get(str(record), 0)
            found = journal.read(record)
            assert (found.end if found else 0) >= synced, scene.says("the journal is lost")
    finish(scene, record)
    scene.check_end(sources[1])


@pytest.mark.parametrize("seed", SEEDS)
def test_killed_while_the_target_appears(scene, sources, seed):
    """The rename of the target is followed by that of the tracker, and both by the cleaning."""
    scene.run(*CORE, *EVERY, fault=f"parent self {scene.random.choice(PUBLISHING)}")
    finish(scene, scene.target / "release.ckptx-partial" / journal.NAME)
    scene.check_end(sources[1])


@pytest.mark.parametrize("seed", SEEDS)
def test_killed_while_a_target_is_replaced(scene, sources, seed):
    """At any time the old target is there, or the new one, and each is whole."""
    release = scene.target / "release"
    release.mkdir(parents=True)
    (release / "old").write_bytes(b"precious")
    before = digests(release)
    after = {
        path.removeprefix("release/"): digest
        for path, digest in sources[1].items()
        if path.startswith("release/")
    }
    for _ in range(2):
        role, steps = scene.random.choice([("parent", PUBLISHING), ("saver", LATE)])
        step = scene.random.choice(steps)
        scene.run(*CORE, *EVERY, "--overwrite=foreign", fault=f"{role} self {step}")
        assert digests(release) in (before, after), scene.says("neither old nor new")
    assert scene.run(*CORE, *EVERY, "--overwrite=foreign") == 0, scene.says("not continued")
    scene.check_end(sources[1])


@pytest.mark.parametrize("seed", SEEDS)
def test_damage_in_what_was_kept_is_found(scene, sources, seed):
    scene.run(*CORE, *EVERY, fault=f"saver self {scene.random.choice(LATE)}")
    for path in scene.target.rglob("*.pt"):
        content = bytearray(path.read_bytes())
        for _ in range(20):
            content[scene.random.randrange(len(content))] ^= 1 << scene.random.randrange(8)
        path.write_bytes(content)
    for path in scene.target.rglob("journal"):
        content = bytearray(path.read_bytes())
        if scene.random.random() < 0.5:
            content[scene.random.randrange(len(content))] ^= 1 << scene.random.randrange(8)
        path.write_bytes(content[: scene.random.randrange(len(content) // 2, len(content) + 1)])
    assert scene.run(*CORE, *EVERY) == 0, scene.says("not continued")
    scene.check_end(sources[1])


@pytest.mark.parametrize("seed", SEEDS)
def test_another_source_or_plan_starts_over(scene, sources, seed):
    scene.run(*CORE, *EVERY, fault=f"saver self {scene.random.choice(LATE)}")
    file = scene.random.choice(sorted(scene.source.glob("*.safetensors")))
    if seed % 2:
        os.utime(file, ns=(1, 1))
        assert scene.run(*CORE, *EVERY) == 0, scene.says("refused")
        assert "resuming" not in scene.errors, scene.says("resumed another source")
        scene.check_end(sources[1])
    else:
        code = scene.run("--to", "core", "--tp", "1", "--pp", "1", "--ckpt-format", "torch", *EVERY)
        assert code == 0, scene.says("refused")
        assert "resuming" not in scene.errors, scene.says("resumed another plan")
        assert len(list(scene.target.rglob("*.pt"))) == 1
        scene.check_source()


@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_input_is_refused_or_converted_exactly(scene, seed):
    """Every number comes through safetensors' own reader on both sides."""
    files = sorted(scene.source.iterdir())
    for _ in range(scene.random.choice([1, 1, 3])):
        path = scene.random.choice(files)
        if not path.exists():
            continue
        content = bytearray(path.read_bytes())
        head = min(len(content), scene.random.choice([64, 2000, len(content)]))
        place = scene.random.randrange(head) if head else 0
        match scene.random.choice(["flip", "cut", "insert", "swap", "drop", "double", "zero"]):
            case "flip" if content:
                content[place] ^= 1 << scene.random.randrange(8)
            case "cut":
                del content[place:]
            case "insert":
                content[place:place] = scene.random.randbytes(scene.random.randrange(1, 9))
            case "zero":
                content[place : place + 8] = bytes(len(content[place : place + 8]))
            case "drop":
                path.unlink()
                continue
            case "swap":
                other = scene.random.choice([one for one in files if one.exists()])
                content, swapped = bytearray(other.read_bytes()), content
                other.write_bytes(swapped)
            case "double":
                other = scene.random.choice([one for one in files if one.exists()])
                content = bytearray(other.read_bytes())
        path.write_bytes(content)
    scene.before = digests(scene.source)
    if scene.run("--to", "hf", "--from", "hf", "--max-shard-size", "100GB"):
        scene.check_refusal()
    else:
        names = json.loads((scene.source / "model.safetensors.index.json").read_text())
        read = {n: load_file(scene.source / n) for n in set(names["weight_map"].values())}
        wanted = {name: one for tensors in read.values() for name, one in tensors.items()}
        found = {n: t for p in scene.target.glob("*.safetensors") for n, t in load_file(p).items()}
        for name, tensor in found.items():
            assert np.array_equal(tensor.view(np.uint8), wanted.pop(name).view(np.uint8))
        assert not wanted, scene.says("tensors are lost")
    scene.check_source()


@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_rank_files_are_refused_or_converted(scene, sources, tmp_path, seed):
    """What is read from pickles of ranks; a changed weight is a changed weight, nothing else."""
    assert scene.run(*CORE) == 0, scene.errors
    shutil.rmtree(scene.source)
    scene.target.rename(scene.source)
    ranks = sorted(scene.source.rglob("*.pt"))
    path, other = scene.random.sample(ranks, 2)
    content = bytearray(path.read_bytes())
    match scene.random.choice(["flip", "flip", "cut", "swap", "drop", "double"]):
        case "flip":
            # The head is the pickle, the tail the directory of the zip; between them are weights.
            place = scene.random.choice([1, -1]) * scene.random.randrange(1, 3000)
            content[place] ^= 1 << scene.random.randrange(8)
            path.write_bytes(content)
        case "cut":
            path.write_bytes(content[: scene.random.randrange(len(content))])
        case "swap":
            path.write_bytes(other.read_bytes())
            other.write_bytes(content)
        case "drop":
            path.unlink()
        case "double":
            path.write_bytes(other.read_bytes())
    scene.before = digests(scene.source)
    if scene.run("--to", "hf"):
        scene.check_refusal()
    scene.check_source()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_limit_of_file_size(scene, sources, seed):
    limit = scene.random.randrange(1, 600_000)

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    if scene.run(*CORE, *EVERY, preexec_fn=small):
        scene.check_refusal()
        assert "File too large" in scene.errors, scene.says("another reason")
        assert scene.run(*CORE, *EVERY) == 0, scene.says("not continued")
    scene.check_end(sources[1])


@pytest.mark.parametrize("seed", SEEDS)
def test_source_vanishes_meanwhile(scene, sources, seed):
    process = scene.start(*CORE, *EVERY)
    time.sleep(scene.random.uniform(0.2, 1.0))
    aside = scene.place / "aside"
    scene.source.rename(aside)
    _, scene.errors = process.communicate(timeout=PATIENCE)
    aside.rename(scene.source)
    if process.returncode:
        scene.check_refusal()
        assert scene.run(*CORE, *EVERY) == 0, scene.says("not converted")
    scene.check_end(sources[1])


@pytest.mark.parametrize("seed", SEEDS)
def test_target_that_is_read_only(scene, sources, seed):
    scene.target.mkdir()
    folder = scene.random.choice([scene.place, scene.target])
    folder.chmod(0o555)

    def respect_permissions() -> None:
        for capability in (1, 2):  # linux include/uapi/linux/capability.h; root has both
            ctypes.CDLL(None).prctl(24, capability)

    code = scene.run(*CORE, preexec_fn=respect_permissions)
    folder.chmod(0o755)
    if code:
        assert re.search(r"error: .*writ", scene.errors), scene.says("no reason")
        scene.check_refusal()
        scene.check_source()
    else:
        scene.check_end(sources[1])
