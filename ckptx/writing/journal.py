r"""The journal of a conversion: which parts of its output are on disk, for a run that continues it.

Only what has been synced is recorded, so what the journal says holds after a power cut too. It is
append-only; each record's checksum is seeded with the one before, so that a torn or reordered tail
ends the journal and cannot be read as something else:

    magic (16 bytes)
    record*   payload length (4 bytes) | payload | xxh3-64 of the payload (8 bytes)

    first payload     JSON: the `Identity` of the conversion
    further payloads  all bytes durable so far (8 bytes), bytes of a digest (1 byte), then for each
                      leaf its number in the plan (8 bytes) and its digest

Numbers are little-endian. Leaves are those of `ckptx.writing.leaves`, counted in the order of the
plan.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import pickle
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import xxhash

from ckptx.errors import ConversionError
from ckptx.protocol.contracts import SavePlan
from ckptx.storage.file_plan import Crc32
from ckptx.storage.open_files import write_all
from ckptx.tensors import lazy
from ckptx.writing.lock import NO_LOCKS

NAME = "journal"
"""The file's name in the partial directory of a target."""
EVERY = 256 << 20
"""Bytes of output after which a conversion is made durable and recorded, unless asked otherwise."""
_MAGIC = b"ckptx journal 1\n"
_LENGTH = struct.Struct("<I")
_CHECKSUM = struct.Struct("<Q")
_NUMBER = struct.Struct("<Q")
_PATIENCE = 30.0  # seconds that the last system call of a killed writer may take
_BLOCK = 1 << 20  # bytes of a pickled plan that are hashed at once
_REGIONS = 256  # that are pickled at once
_CONTENTS = (  # what plans are full of
    *(lazy.Stored, lazy.Sliced, lazy.Tiled, lazy.Permuted, lazy.Split, lazy.Merged),
    *(lazy.Computed, Crc32),
)
_FIRST_NAMES: Mapping[str, tuple[type, ...]] = {
    "ckptx.lazy": (*_CONTENTS[:-1], lazy.Cast, lazy.Filled, lazy.Replicated),
    "ckptx.plan": (Crc32,),
}
_NAMING = threading.Lock()


@dataclass(frozen=True, slots=True)
class Identity:
    """What must be the same for one run to continue another; all are plain text."""

    plan: str
    """Digest of every output file, region and lazy tensor."""
    sources: str
    """Digest of path, inode, size and times of every source file."""
    versions: str
    """Of ckptx and the plugins."""
    digest: str
    """The hash of the leaves: ``"xxh3_128"``."""

    def difference(self, other: Identity) -> str:
        """Return in words what is not the same; empty if nothing is."""
        reasons = {
            "versions": "another version of ckptx or a plugin wrote it",
            "sources": "the source has changed since",
            "plan": "it was started with other options",
            "digest": "it has other digests",
        }
        differing = (name for name in reasons if getattr(self, name) != getattr(other, name))
        return next((reasons[name] for name in differing), "")


def identify(
    plan: SavePlan,
    files: Sequence[str],
    states: Mapping[str, Sequence[int]],
    versions: Mapping[str, str],
    digest: str,
) -> Identity:
    """Return the identity of a conversion.

    ``files`` are the source paths in the order in which the plan refers to them, ``states`` the
    inode, size and times of each.
    """
    sources = hashlib.sha256()
    for path in files:
        sources.update(repr((path, tuple(states[path]))).encode())
    return Identity(
        plan=_plan_digest(plan),
        sources=sources.hexdigest(),
        versions=", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        digest=digest,
    )


def _plan_digest(plan: SavePlan) -> str:
    """Return a digest of the output files that does not depend on which objects are shared."""
    whole = hashlib.sha256()
    sink = io.BytesIO()
    pickler = pickle.Pickler(sink, 5)
    pickler.fast = True  # without memory of what was pickled before: equal plans, equal bytes
    pickler.dispatch_table = {kind: _reducer(kind) for kind in _CONTENTS}
    with _named_as_before():
        for file in plan.files:
            pickler.dump((file.path, file.size))
            regions = iter(file.regions)
            while some := [tuple(region) for region in islice(regions, _REGIONS)]:
                pickler.dump(some)
                if sink.tell() > _BLOCK:
                    whole.update(sink.getbuffer())
                    sink.seek(0)
                    sink.truncate()
    whole.update(sink.getbuffer())
    pointers = sorted(plan.pointers.items())
    whole.update(repr((plan.directory, plan.single_file, pointers)).encode())
    return whole.hexdigest()


@contextmanager
def _named_as_before() -> Iterator[None]:
    """Let pickles name the modules in which the first journals found the contents of plans.

    A digest must not change because a module moves: what an earlier release left unfinished would
    be started over.
    """
    kinds = {kind: kind.__module__ for kinds in _FIRST_NAMES.values() for kind in kinds}
    with _NAMING:
        for name, renamed in _FIRST_NAMES.items():
            sys.modules[name] = sys.modules[kinds[renamed[0]]]
            for kind in renamed:
                kind.__module__ = name
        try:
            yield
        finally:
            for kind, module in kinds.items():
                kind.__module__ = module
            for name in _FIRST_NAMES:
                del sys.modules[name]


def _reducer(kind: type) -> Callable[[Any], tuple[type, tuple[object, ...]]]:
    """Return how to pickle a dataclass in half the time: giants have millions."""
    values = attrgetter(*(field.name for field in fields(kind)))
    return lambda content: (kind, values(content))


@dataclass(slots=True)
class Recorded:
    """What a journal says, as far as it is whole."""

    identity: Identity
    leaves: dict[int, bytes] = field(default_factory=dict)
    """Number in the plan to digest."""
    durable: int = 0
    """Bytes of output that are on disk."""
    end: int = 0
    """Bytes of the journal that are whole."""
    seal: int = 0
    """The checksum of its last whole record."""


def read(path: Path) -> Recorded | None:
    """Return what the journal at ``path`` says; None if there is none, or its head is torn."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    records = _records(content)
    try:
        payload, end, seal = next(records)
        found = Recorded(Identity(**json.loads(payload)), end=end, seal=seal)
    except (StopIteration, TypeError, ValueError):
        return None
    for payload, end, seal in records:
        if (leaves := _unpacked(payload)) is None:
            break
        found.leaves.update(leaves)
        found.durable = _NUMBER.unpack_from(payload)[0]
        found.end, found.seal = end, seal
    return found


def _records(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield payload, end and checksum of each record, up to the first that is not whole."""
    if not content.startswith(_MAGIC):
        return
    end, seal = len(_MAGIC), xxhash.xxh3_64_intdigest(_MAGIC)
    while end + _LENGTH.size <= len(content):
        start = end + _LENGTH.size
        stop = start + _LENGTH.unpack_from(content, end)[0]
        payload = content[start:stop]
        seal = xxhash.xxh3_64_intdigest(payload, seal)
        if content[stop : stop + _CHECKSUM.size] != _CHECKSUM.pack(seal):
            return
        end = stop + _CHECKSUM.size
        yield payload, end, seal


def _packed(leaves: Mapping[int, bytes]) -> bytes:
    """Return leaves as they are recorded; a conversion has digests of one length."""
    width = len(next(iter(leaves.values()), b""))
    return bytes([width]) + b"".join(
        _NUMBER.pack(number) + digest for number, digest in leaves.items()
    )


def _unpacked(payload: bytes) -> dict[int, bytes] | None:
    """Return the leaves of a record; None if it is none of ours."""
    head = _NUMBER.size + 1
    if len(payload) < head:
        return None
    width = _NUMBER.size + payload[_NUMBER.size]
    if (len(payload) - head) % width:
        return None
    return {
        _NUMBER.unpack_from(payload, at)[0]: payload[at + _NUMBER.size : at + width]
        for at in range(head, len(payload), width)
    }


class Journal:
    """The journal of the run that writes; a context that leaves the file where it is.

    Args:
        path: the journal; what it says is continued if it is of this conversion.
        identity: of this conversion.
        every: bytes of output between two records.
        locks: whether it is locked.
    """

    def __init__(
        self, path: Path, identity: Identity, every: int = EVERY, *, locks: bool = True
    ) -> None:
        self.path = path
        self._locks = locks
        self.identity = identity
        self.every = max(1, every)
        self.leaves: Mapping[int, bytes] = {}
        """What earlier runs have recorded: leaf number to digest."""
        self.records = 0
        """Records that this run has written."""

    def __enter__(self) -> Journal:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(self.path, flags, 0o666)
        try:
            if self._locks:
                self._lock()
            found = read(self.path)
            if found is None or found.identity.difference(self.identity):
                os.ftruncate(self._descriptor, 0)
                self._end, self._seal = 0, xxhash.xxh3_64_intdigest(_MAGIC)
                self._append(_MAGIC)
                self._append_record(json.dumps(asdict(self.identity)).encode())
            else:
                os.ftruncate(self._descriptor, found.end)
                self.leaves = found.leaves
                self._end, self._seal = found.end, found.seal
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def record(self, leaves: Mapping[int, bytes], durable: int) -> None:
        """Record leaves that have been synced, and wait until the record is on disk, too.

        ``durable`` are all bytes of output on disk, these leaves among them.
        """
        self._append_record(_NUMBER.pack(durable) + _packed(leaves))
        os.fdatasync(self._descriptor)
        self.records += 1

    def _append_record(self, payload: bytes) -> None:
        seal = xxhash.xxh3_64_intdigest(payload, self._seal)
        self._append(_LENGTH.pack(len(payload)) + payload + _CHECKSUM.pack(seal))
        self._seal = seal

    def _append(self, content: bytes) -> None:
        write_all(self._descriptor, self._end, content)
        self._end += len(content)

    def _lock(self) -> None:
        """Wait for the writer of a killed run: its last system call may still be on its way."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno in NO_LOCKS:
                    return  # nobody could tell
                raise
            if time.monotonic() > deadline:
                raise ConversionError(
                    f"{self.path}: a process of the killed run has not ended; end it and run again"
                )
            time.sleep(0.05)
