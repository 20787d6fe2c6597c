"""The manifest: where every tensor of a target came from, and its digest.

What a file holds besides tensors (their names, dtypes and places, a config, a tokenizer) has one
digest for the whole file, so that no byte of a target can change unseen.

It holds no absolute path, no time and nothing of the machine: equal input and options give an equal
manifest, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ckptx.conversion.proof import operations
from ckptx.protocol.contracts import SavePlan
from ckptx.protocol.messages import Begin
from ckptx.tensors.dtypes import ITEMSIZE
from ckptx.tensors.lazy import LazyTensor, Stored
from ckptx.tensors.pieces import leaves
from ckptx.writing.leaves import DIGESTS, LEAF, tensor_digest
from ckptx.writing.writer import writing

VERSION = 1
Range: TypeAlias = tuple[int, int]
"""Offset and size, in bytes, of a part of a file."""


def build(
    plan: SavePlan,
    begin: Begin,
    digests: Mapping[str, Mapping[int, str]],
    versions: Mapping[str, str],
    directory: Path,
    spool: str = "",
    kind: str = "xxh3_128",
) -> tuple[bytes, str]:
    """Return the manifest of a plan that was executed, and the digest of all its tensors.

    Args:
        plan: what was written.
        begin: the source; its paths are given relative to its root.
        digests: file to region number to digest (`ckptx.writing.writer.Written.digests`).
        versions: distribution to version, of ckptx and the plugins.
        directory: where the files are; what is no tensor of theirs is read again.
        spool: the path of the spool, which has no name of its own.
        kind: the digest of what is no tensor, a key of `ckptx.writing.leaves.DIGESTS`.

    Raises:
        CutShortError: a file that was written cannot be read.
    """
    names = [_source_name(path, begin.root, spool) for path in begin.files]
    files = {}
    whole = hashlib.sha256()
    for file in sorted(plan.files, key=lambda file: file.path):
        tensors = []
        for number, region in enumerate(file.regions):
            if not isinstance(region.content, LazyTensor):
                continue
            tensor = region.content
            entry = {
                "name": region.name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "offset": region.offset,
                "digest": digests.get(file.path, {}).get(number, ""),
            }
            digested = [value for key, value in entry.items() if key != "offset"]
            whole.update(json.dumps([file.path, *digested]).encode())
            sources = _sources(tensor, names)
            tensors.append({**entry, "sources": sources, "operations": list(operations(tensor))})
        taken = [(r.offset, r.size) for r in file.regions if isinstance(r.content, LazyTensor)]
        with writing(directory):
            rest = range_digest(directory / file.path, kind, gaps(taken, file.size))
        files[file.path] = {"bytes": file.size, "rest": rest, "tensors": tensors}
    digest = f"sha256:{whole.hexdigest()}"
    content = {
        "version": VERSION,
        "written_by": dict(sorted(versions.items())),
        "source": {"format": begin.format, "layout": begin.layout, **_accepted(begin, plan)},
        "digest": digest,
        "files": files,
    }
    return _dumped(content), digest


def same_conversion(one: bytes, other: bytes) -> bool:
    """Return whether two manifests are of one conversion, whatever the digests of tensors are."""
    try:
        return _undigested(one) == _undigested(other)
    except (ValueError, LookupError, TypeError, AttributeError):  # a damaged one is of none
        return False


def _undigested(content: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(content)
    del found["digest"]
    for file in found["files"].values():
        for tensor in file["tensors"]:
            del tensor["digest"]
    return found


def _accepted(begin: Begin, plan: SavePlan) -> dict[str, list[str]]:
    found = [*begin.accepted, *plan.accepted]
    return {"accepted": found} if found else {}


def gaps(taken: Iterable[Range], size: int) -> Iterator[Range]:
    """Yield the parts of a file of ``size`` bytes that are in none of the ranges ``taken``.

    Examples:
        >>> list(gaps([(8, 4), (0, 2), (12, 0)], 16))
        [(2, 6), (12, 4)]
    """
    position = 0
    for offset, length in sorted(taken):
        if offset > position:
            yield position, offset - position
        position = max(position, offset + length)
    if position < size:
        yield position, size - position


def range_digest(path: Path, kind: str, ranges: Iterable[Range]) -> str:
    """Return the digest of parts of a file, from those of leaves of 4 MiB of each.

    A file that is too short has a digest that equals none.

    Raises:
        OSError: the file cannot be read.
    """
    leaves = []
    with path.open("rb") as file:
        for offset, length in ranges:
            file.seek(offset)
            for start in range(0, length, LEAF):
                wanted = min(LEAF, length - start)
                data = file.read(wanted)
                if len(data) < wanted:
                    return f"{kind}:the file ends too early"
                leaves.append(DIGESTS[kind](data))
    return tensor_digest(kind, leaves)


def _dumped(content: dict[str, Any]) -> bytes:
    """Return the manifest as JSON with one line per tensor: readable, and small enough."""
    files = content.pop("files")
    blocks = []
    for path, file in files.items():
        rows = ",\n".join(f"    {json.dumps(tensor)}" for tensor in file["tensors"])
        listed = f"[\n{rows}\n   ]" if rows else "[]"
        about = f'"bytes": {file["bytes"]}, "rest": {json.dumps(file["rest"])}'
        blocks.append(f'  {json.dumps(path)}: {{{about}, "tensors": {listed}}}')
    head = json.dumps(content, indent=1).removesuffix("\n}")
    body = ",\n".join(blocks)
    return f'{head},\n "files": {{\n{body}\n }}\n}}\n'.encode()


def _source_name(path: str, root: str, spool: str) -> str:
    if path == spool:
        return "(spool)"
    relative = os.path.relpath(path, root or os.path.dirname(path))  # noqa: PTH120 - plain strings
    return os.path.basename(path) if relative.startswith("..") else relative  # noqa: PTH119


def _sources(tensor: LazyTensor, names: list[str]) -> list[dict[str, Any]]:
    """Return the byte ranges that a tensor reads, one per file: from its first byte to its last."""
    ranges: dict[int, tuple[int, int]] = {}
    for leaf in _stored(tensor):
        size = ITEMSIZE[leaf.dtype]
        last = sum((n - 1) * stride for n, stride in zip(leaf.shape, leaf.strides, strict=True))
        start, stop = leaf.offset, leaf.offset + (last + 1) * size
        low, high = ranges.get(leaf.file, (start, stop))
        ranges[leaf.file] = min(low, start), max(high, stop)
    return [{"file": names[file], "bytes": list(span)} for file, span in sorted(ranges.items())]


def _stored(tensor: LazyTensor) -> Iterator[Stored]:
    if isinstance(tensor, Stored):  # the common case, without a walk
        yield from (tensor,) if tensor.numel else ()
    else:
        yield from (leaf for leaf in leaves(tensor) if isinstance(leaf, Stored) and leaf.numel)
