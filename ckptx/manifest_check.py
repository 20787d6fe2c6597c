"""Compare one checkpoint with the manifest that was made when it was written.

Every tensor's bytes are read where the manifest says they lie, and digested again: whether a copy
is whole is known without the original.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ckptx.errors import FormatError
from ckptx.lazy import ITEMSIZE
from ckptx.manifest import VERSION
from ckptx.publish import MANIFEST
from ckptx.writer import DIGESTS, LEAF, tensor_digest

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
        return {"file": self.file, "name": self.name, "kind": self.kind, "detail": self.detail}


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
            line = (
                f"{one.kind:<9} {one.file}: {one.name}" if one.name else f"{one.kind:<9} {one.file}"
            )
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
    """One tensor of a manifest."""

    file: str
    name: str
    offset: int
    nbytes: int
    digest: str


def check(target: Path, manifest: Path) -> ManifestCheck:
    """Compare the tensors of a checkpoint with a manifest.

    ``target`` is the directory, or the one file, that was written; a Megatron root stands for its
    iteration directory that holds the files.

    Raises:
        FormatError: the manifest is none, is of another version, or has no digests.
    """
    content = _read(manifest)
    root = _root(target, content["files"])
    damages: list[Damage] = []
    entries: list[_Entry] = []
    for path, file in content["files"].items():
        damage = _file_damage(root / path, path, file["bytes"])
        if damage is not None:
            damages.append(damage)
        else:
            entries += _entries(manifest, path, file["tensors"])
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda entry: _digest(root / entry.file, entry), entries)
        damages += [
            Damage(entry.file, entry.name, "digest", f"expected {entry.digest}, found {digest}")
            for entry, digest in zip(entries, found, strict=True)
            if digest != entry.digest
        ]
    return ManifestCheck(
        str(target),
        str(manifest),
        len(content["files"]),
        sum(len(file["tensors"]) for file in content["files"].values()),
        sum(entry.nbytes for entry in entries),
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
    found: Mapping[str, Any] = content
    return found


def _root(target: Path, files: Mapping[str, Any]) -> Path:
    """Return the directory that the paths of a manifest are relative to."""
    if target.is_file():
        return target.parent
    first = next(iter(files), "")
    if (target / first).exists():
        return target
    below = [one for one in sorted(target.iterdir()) if one.is_dir() and (one / first).exists()]
    return below[0] if len(below) == 1 else target


def _file_damage(path: Path, name: str, size: int) -> Damage | None:
    if not path.is_file():
        return Damage(name, "", "missing", f"the file is not there, expected {size:,} bytes")
    found = path.stat().st_size
    if found != size:
        return Damage(name, "", "size", f"{found:,} bytes, expected {size:,}")
    return None


def _entries(manifest: Path, path: str, tensors: Any) -> Iterator[_Entry]:
    for tensor in tensors:
        try:
            size = ITEMSIZE[tensor["dtype"]]
            for length in tensor["shape"]:
                size *= length
            entry = _Entry(
                path, str(tensor["name"]), int(tensor["offset"]), size, str(tensor["digest"])
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{manifest}: {path}: an entry without {error}") from error
        kind, _, digest = entry.digest.partition(":")
        if kind not in DIGESTS or not digest:
            raise FormatError(
                f"{manifest}: {path}: {entry.name!r} has no digest: a Megatron-style module wrote "
                "it"
            )
        yield entry


def _digest(path: Path, entry: _Entry) -> str:
    """Return the digest of the bytes that an entry is about, from those of its 4 MiB leaves."""
    kind = entry.digest.partition(":")[0]
    leaves = []
    with path.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        left = entry.nbytes
        while left:
            data = file.read(min(LEAF, left))
            while data and len(data) < min(LEAF, left):
                more = file.read(min(LEAF, left) - len(data))
                if not more:
                    break
                data += more
            if not data:
                return f"{kind}:the file ends too early"
            leaves.append(DIGESTS[kind](data))
            left -= len(data)
    return tensor_digest(kind, leaves)
