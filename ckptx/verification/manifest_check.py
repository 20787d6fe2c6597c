"""Compare one checkpoint with the manifest that was made when it was written.

Every tensor's bytes are read where the manifest says they lie, and digested again, and so is all
that lies between them: whether a copy is whole is known without the original.
"""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ckptx.conversion.manifest import VERSION, Range, gaps, range_digest
from ckptx.errors import FormatError
from ckptx.storage.partial import MANIFEST
from ckptx.tensors.dtypes import ITEMSIZE
from ckptx.writing.leaves import DIGESTS

_THREADS = 4


@dataclass(frozen=True, slots=True)
class Damage:
    """A file or tensor that is not as the manifest says: ``missing``, ``size`` or ``digest``."""

    file: str
    name: str
    kind: str
    detail: str

    def to_json(self) -> dict[str, str]:
        """Return everything as plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ManifestCheck:
    """Whether a checkpoint is what its manifest says. Sizes are in bytes."""

    target: str
    manifest: str
    files: int
    tensors: int
    nbytes: int
    damages: tuple[Damage, ...]

    @property
    def equal(self) -> bool:
        """Whether every tensor has the digest that the manifest says, and there is one."""
        return not self.damages and self.tensors > 0

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "equal": self.equal,
            "target": self.target,
            "manifest": self.manifest,
            "files": self.files,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "damages": [damage.to_json() for damage in self.damages],
        }

    def render(self, width: int, limit: int = 20) -> str:
        """Return the result as text, a line for each damage."""
        lines = []
        for one in self.damages[:limit]:
            line = f"{one.kind:<9} {one.file}" + (f": {one.name}" if one.name else "")
            whole = f"{line}  {one.detail}"
            lines += [whole] if len(whole) <= width else [line, f"{'':10}{one.detail}"]
        if len(self.damages) > limit:
            lines.append(f"... and {len(self.damages) - limit} more (--json lists all)")
        if self.equal:
            lines.append(f"equal to its manifest: {self.tensors} tensors, {self.nbytes:,} bytes")
        else:
            count = f"{len(self.damages)} of {self.tensors} tensors, {self.files} files"
            lines.append(f"not equal to its manifest: {count}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of a manifest; or, without a name, all that a file holds besides tensors."""

    file: str
    name: str
    ranges: tuple[Range, ...]
    digest: str


def check(target: Path, manifest: Path) -> ManifestCheck:
    """Compare the files of a checkpoint with a manifest.

    ``target`` is the directory, or the one file, that was written, whatever it is called now; a
    Megatron root stands for its iteration directory that holds the files.

    Raises:
        FormatError: the manifest is none, is of another version, or has no digests; or a file
            cannot be read.
    """
    content = _read(manifest)
    places = _places(target, content["files"])
    damages: list[Damage] = []
    entries: list[_Entry] = []
    for path, file in content["files"].items():
        size = file["bytes"]
        found = places[path].stat().st_size if places[path].is_file() else None
        if found is None:
            detail = f"the file is not there, expected {size:,} bytes"
            damages.append(Damage(path, "", "missing", detail))
        elif found != size:
            damages.append(Damage(path, "", "size", f"{found:,} bytes, expected {size:,}"))
        else:
            entries += _entries(manifest, path, file)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda entry: _digest(places[entry.file], entry), entries)
        for entry, digest in zip(entries, digests, strict=True):
            if digest != entry.digest:
                what = "" if entry.name else "what it holds besides tensors: "
                detail = f"{what}expected {entry.digest}, found {digest}"
                damages.append(Damage(entry.file, entry.name, "digest", detail))
    return ManifestCheck(
        str(target),
        str(manifest),
        len(content["files"]),
        sum(len(file["tensors"]) for file in content["files"].values()),
        sum(size for entry in entries if entry.name for _, size in entry.ranges),
        tuple(damages),
    )


def _read(manifest: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(manifest.read_bytes())
        version = content["version"]
        known = all(
            isinstance(path, str)
            and isinstance(file["bytes"], int)
            and isinstance(file["tensors"], list)
            for path, file in content["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{manifest}: not a manifest ({MANIFEST}): {error}") from error
    if version != VERSION or not known:
        raise FormatError(f"{manifest}: a manifest of version {version!r}, known is {VERSION}")
    for path in content["files"]:
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts:
            raise FormatError(f"{manifest}: {path!r} does not lie inside the checkpoint")
    return dict(content)


def _places(target: Path, files: Mapping[str, Any]) -> dict[str, Path]:
    """Return where each file of a manifest lies."""
    if target.is_file() and len(files) == 1:
        return dict.fromkeys(files, target)
    root = target.parent if target.is_file() else _root(target, files)
    return {path: root / path for path in files}


def _root(target: Path, files: Mapping[str, Any]) -> Path:
    """Return the directory that the paths of a manifest are relative to."""
    if any((target / path).exists() for path in files):
        return target
    first = next(iter(files), "")
    below = [one for one in sorted(target.iterdir()) if one.is_dir() and (one / first).exists()]
    return below[0] if len(below) == 1 else target


def _entries(manifest: Path, path: str, file: Mapping[str, Any]) -> Iterator[_Entry]:
    """Yield the tensors of a file, and what lies between them, which older manifests leave out.

    Raises:
        FormatError: an entry is not what a manifest has, lies outside the file, or has no digest.
    """
    taken: list[Range] = []
    for tensor in file["tensors"]:
        try:
            shape = [operator.index(length) for length in tensor["shape"]]
            size = math.prod(shape) * ITEMSIZE[tensor["dtype"]]
            offset = operator.index(tensor["offset"])
            entry = _Entry(path, str(tensor["name"]), ((offset, size),), str(tensor["digest"]))
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{manifest}: {path}: an entry without {error}") from error
        if min(shape, default=0) < 0 or not 0 <= offset <= offset + size <= file["bytes"]:
            raise FormatError(f"{manifest}: {path}: {entry.name!r} lies outside the file")
        taken.append((offset, size))
        yield _with_digest(manifest, entry)
    if "rest" in file:
        between = tuple(gaps(taken, file["bytes"]))
        yield _with_digest(manifest, _Entry(path, "", between, str(file["rest"])))


def _with_digest(manifest: Path, entry: _Entry) -> _Entry:
    kind, _, digest = entry.digest.partition(":")
    if kind not in DIGESTS or not digest:
        raise FormatError(
            f"{manifest}: {entry.file}: {entry.name!r} has no digest: a Megatron-style module "
            "wrote it"
        )
    return entry


def _digest(path: Path, entry: _Entry) -> str:
    """Return the digest of the bytes that an entry is about."""
    try:
        return range_digest(path, entry.digest.partition(":")[0], entry.ranges)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from error
