"""The manifest: where every tensor of a target came from, and its digest.

It holds no absolute path, no time and nothing of the machine: equal input and options give an equal
manifest, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from ckptx.lazy import ITEMSIZE, LazyTensor, Stored
from ckptx.pieces import leaves
from ckptx.plan import SavePlan
from ckptx.proof import operations
from ckptx.protocol import Begin

VERSION = 1


def build(
    plan: SavePlan,
    begin: Begin,
    digests: Mapping[str, Mapping[int, str]],
    versions: Mapping[str, str],
    spool: str = "",
) -> tuple[bytes, str]:
    """Return the manifest of a plan that was executed, and the digest of all its tensors.

    Args:
        plan: what was written.
        begin: the source; its paths are given relative to its root.
        digests: file to region number to digest (`ckptx.writer.Written.digests`).
        versions: distribution to version, of ckptx and the plugins.
        spool: the path of the spool, which has no name of its own.
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
            said = [value for key, value in entry.items() if key != "offset"]
            whole.update(json.dumps([file.path, *said]).encode())
            sources = _sources(tensor, names)
            tensors.append({**entry, "sources": sources, "operations": list(operations(tensor))})
        files[file.path] = {"bytes": file.size, "tensors": tensors}
    digest = f"sha256:{whole.hexdigest()}"
    content = {
        "version": VERSION,
        "written_by": dict(sorted(versions.items())),
        "source": {"format": begin.format, "layout": begin.layout},
        "digest": digest,
        "files": files,
    }
    return _dumped(content), digest


def _dumped(content: dict[str, Any]) -> bytes:
    """Return the manifest as JSON with one line per tensor: readable, and small enough."""
    files = content.pop("files")
    blocks = []
    for path, file in files.items():
        rows = ",\n".join(f"    {json.dumps(tensor)}" for tensor in file["tensors"])
        listed = f"[\n{rows}\n   ]" if rows else "[]"
        blocks.append(f'  {json.dumps(path)}: {{"bytes": {file["bytes"]}, "tensors": {listed}}}')
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
