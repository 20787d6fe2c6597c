"""Fixtures that execute file plans in memory with torch: an independent, slow writer."""

from __future__ import annotations

import contextlib
import os
import pickle
import zlib
from collections.abc import Mapping
from pathlib import Path

import pytest

from ckptx.storage.file_plan import Crc32, FilePlan
from ckptx.tensors.lazy import Filled, LazyTensor, Stored, Tiled

with contextlib.suppress(ImportError):  # without it the tests are skipped
    import torch


def eager(tensor: LazyTensor, files: Mapping[int, bytes]) -> torch.Tensor:
    """The elements of a lazy tensor, by torch."""
    dtype = getattr(torch, tensor.dtype)
    match tensor:
        case Filled():
            return torch.full(tensor.shape, tensor.value, dtype=dtype)
        case Tiled():
            whole = torch.zeros(tensor.shape, dtype=dtype)
            for origin, part in tensor.tiles:
                box = tuple(slice(o, o + n) for o, n in zip(origin, part.shape, strict=True))
                whole[box] = eager(part, files)
            return whole
        case Stored():
            if not tensor.numel:
                return torch.empty(tensor.shape, dtype=dtype)
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
            size = (last + 1) * dtype.itemsize
            data = bytearray(files[tensor.file][tensor.offset : tensor.offset + size])
            assert len(data) == size
            flat = torch.frombuffer(data, dtype=dtype)
            return flat.as_strided(tensor.shape, tensor.strides)
    raise AssertionError(tensor)


def execute(plan: FilePlan, files: Mapping[int, bytes]) -> bytes:
    """The bytes of a planned file; its regions must tile it in order."""
    out = b""
    spans = []
    for region in plan.regions:
        assert region.offset == len(out)
        match region.content:
            case bytes() as data:
                pass
            case Crc32(number):
                data = zlib.crc32(spans[number]).to_bytes(4, "little")
            case tensor:
                whole = eager(tensor, files).contiguous().reshape(-1)
                data = whole.view(torch.uint8).numpy().tobytes() if whole.numel() else b""
        assert len(data) == region.size
        spans.append(data)
        out += data
    assert len(out) == plan.size
    return out


def spool(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Stored], dict[int, bytes]]:
    """Lazy tensors with the values of real ones, and the file they lie in."""
    data = b"\xee" * 3  # misaligned on purpose
    lazy = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        strides = tensor.contiguous().stride()
        dtype = str(tensor.dtype).removeprefix("torch.")
        lazy[name] = Stored(dtype, tuple(tensor.shape), 0, len(data), strides)
        data += raw
    return lazy, {0: data}


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found, expected)]
    return found.numel() == 0 or torch.equal(*raw)


@pytest.fixture(name="eager")
def eager_fixture():
    return eager


@pytest.fixture(name="execute")
def execute_fixture():
    return execute


@pytest.fixture(name="spool")
def spool_fixture():
    return spool


@pytest.fixture(name="same")
def same_fixture():
    return same


class Touch:
    """An object whose pickle creates a file when it is run."""

    def __init__(self, sentinel: Path, how: str) -> None:
        self.sentinel = sentinel
        self.how = how

    def __reduce__(self):
        path, code = str(self.sentinel), f"open({str(self.sentinel)!r}, 'w')"
        if self.how == "pickle.loads":
            return pickle.loads, (pickle.dumps(Touch(self.sentinel, "eval")),)
        return {
            "os.system": (os.system, (f"touch {path}",)),
            "eval": (eval, (code,)),
            "exec": (exec, (code,)),
            "open": (open, (path, "w")),
            "os.mkdir": (os.mkdir, (path,)),
            "getattr": (getattr, ("", "join")),
            "map": (map, (eval, [code])),
        }[self.how]


@pytest.fixture
def bomb(tmp_path):
    """Makes hostile objects; fails when one of them ran."""
    sentinel = tmp_path / "executed"
    yield lambda how: Touch(sentinel, how)
    assert not sentinel.exists()
