"""A conversion that was really killed, committed, and continued by the program as it is now.

``partial.tar.xz`` holds what a killed conversion of `sources.large` has left beside its target.
A journal is of one plan, one release and of sources with their paths, inodes and times. The last
differ from place to place, so the head of the journal is sealed anew with those of the sources that
are written here; the digest of the plan and the versions stay as they were. A program that plans
otherwise, or pickles its plans under other module names, starts over, which is seen.

    python -m tests.record.resume        # kill one anew
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import xxhash

from .files import listed
from .program import ENTRY, ROOT, place, run_apart
from .sources import HERE, large

PARTIAL = HERE / "partial.tar.xz"
INJECTED = HERE.parent / "faults" / "injected"
PLACE = Path("target", "release.ckptx-partial")
OPTIONS = ("--to", "core", "--ckpt-format", "torch", "--tp", "2", "--pp", "2", "--threads", "1")
MAGIC = b"ckptx journal 1\n"


def sources_digest(files: list[Path]) -> str:
    """Return the digest of path, inode, size and times of sources, as the journal has it."""
    whole = hashlib.sha256()
    for path in files:
        status = path.stat()
        state = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        whole.update(repr((str(path), state)).encode())
    return whole.hexdigest()


def sealed_anew(journal: bytes, sources: str) -> bytes:
    """Return a journal whose head names other sources."""
    assert journal.startswith(MAGIC)
    found, at = MAGIC, len(MAGIC)
    seal = xxhash.xxh3_64_intdigest(MAGIC)
    while at + 4 <= len(journal):
        (size,) = struct.unpack_from("<I", journal, at)
        payload = journal[at + 4 : at + 4 + size]
        at += 4 + size + 8
        if found == MAGIC:
            payload = json.dumps({**json.loads(payload), "sources": sources}).encode()
        seal = xxhash.xxh3_64_intdigest(payload, seal)
        found += struct.pack("<I", len(payload)) + payload + struct.pack("<Q", seal)
    return found


def entries(is_wanted: Callable[[str], bool]) -> dict[str, str]:
    """Return how the partial directory is continued, and what comes of it."""
    if not is_wanted("continued") or not PARTIAL.exists():
        return {}
    with place() as where:
        source = large(where.root / "source")
        with tarfile.open(PARTIAL) as archive:
            archive.extractall(where.root, filter="data")
        journal = where.root / PLACE / "journal"
        digest = sources_digest([source / "model.safetensors"])
        journal.write_bytes(sealed_anew(journal.read_bytes(), digest))
        done = run_apart("convert", source, where.root / "target", *OPTIONS)
        whole = run_apart("convert", source, where.root / "whole", *OPTIONS)
        continued, anew = listed(where.root / "target"), listed(where.root / "whole")
        same = "the same bytes as a whole run" if continued == anew else "OTHER BYTES"
        return {
            "continued": f"{where.told(done.text())}{same}, exit {whole.code}\n{continued}",
        }


def kill() -> int:
    """Kill a conversion once its journal has records, and keep what it has left."""
    for step in range(20, 2000, 20):
        with place() as where:
            source = large(where.root / "source")
            words = ["convert", str(source), str(where.root / "target"), *OPTIONS]
            subprocess.run(
                [sys.executable, "-c", ENTRY, *words, "--quiet", "--journal-every", "100K"],
                env={
                    **os.environ,
                    "PYTHONPATH": f"{INJECTED}{os.pathsep}{ROOT}",
                    "CKPTX_FAULT": f"saver all {step}",
                    "CKPTX_FAULT_LOG": str(where.root / "log"),
                    "CKPTX_FAULT_SCENE": str(where.root),
                },
                start_new_session=True,
                check=False,
            )
            journal = where.root / PLACE / "journal"
            if journal.exists() and _records(journal) > 3:
                with tarfile.open(PARTIAL, "w:xz") as archive:
                    archive.add(where.root / PLACE, str(PLACE))
                return 0
    return 1


def _records(journal: Path) -> int:
    content = journal.read_bytes()
    at, count = len(MAGIC), 0
    while at + 4 <= len(content):
        at += 12 + struct.unpack_from("<I", content, at)[0]
        count += 1
    return count


if __name__ == "__main__":
    sys.exit(kill())
