"""Carry objects from one pickle to another: what was read, as values that can be written.

Small states of a training (random generators, schedulers) are plain values, tensors and numpy
arrays. Anything else has a class whose meaning is unknown here, and is refused by its name.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

from ckptx.containers import torch_zip
from ckptx.containers.pickle_values import (
    Call,
    EnumValue,
    Global,
    Record,
    StubClass,
    TorchDtype,
    TorchSize,
)
from ckptx.errors import FormatError
from ckptx.storage.file_plan import Crc32, FilePlan
from ckptx.tensors.lazy import LazyTensor

_PLAIN = (type(None), bool, int, float, str, bytes, set, LazyTensor, EnumValue, TorchDtype)
_NUMPY = (
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype"),
)
"""What numpy 1 and 2 call to make arrays, their elements and their dtypes from a pickle."""
_CLASSES = ("numpy.ndarray",)


_MOST = 1_000_000
"""Values in a small state; a state of numpy's or Python's generator has some 600."""


def carried(value: Any, where: str) -> Any:
    """Return a value of a pickle as `ckptx.containers.pickle_writer.dumps` takes it.

    Raises:
        FormatError: it holds an object that is neither plain nor numpy's, or more than a small
            state does (a few bytes of pickle can be as many as they like); ``where`` goes before.
    """
    try:
        return _Carrier(where).carry(value)
    except RecursionError as error:
        found = "its values are nested too deeply, or hold themselves"
        raise FormatError(f"{where}: {found}") from error


class _Carrier:
    def __init__(self, where: str) -> None:
        self._where = where
        self._left = _MOST

    def carry(self, value: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise FormatError(f"{self._where}: holds more than {_MOST} values; no small state")
        carry = self.carry
        match value:
            case StubClass() if f"{value.module}.{value.name}" in _CLASSES:
                return Global(value.module, value.name)
            case Record() if f"{type(value).module}.{type(value).name}" in _NUMPY:
                made = Global(type(value).module, type(value).name)
                state = None if value.state is None else carry(value.state)
                return Call(made, tuple([carry(item) for item in value.args]), state)
            case OrderedDict():
                return OrderedDict((carry(key), carry(item)) for key, item in value.items())
            case dict():
                return {carry(key): carry(item) for key, item in value.items()}
            case list():
                return [carry(item) for item in value]
            case TorchSize():
                return value
            case tuple():
                return tuple([carry(item) for item in value])
        if isinstance(value, _PLAIN):
            return value
        kind = type(value)
        name = f"{kind.module}.{kind.name}" if isinstance(kind, StubClass) else kind.__name__
        raise FormatError(f"{self._where}: holds a {name}, which cannot be carried over")


def saved(name: str, value: Any, files: Sequence[str]) -> bytes:
    """Return the bytes of the file ``name`` that ``torch.save`` makes of a small value.

    Its tensors are read from ``files``, the file table that they refer to.
    """
    import numpy as np

    from ckptx.storage.gather import read
    from ckptx.storage.open_files import Files

    plan: FilePlan = torch_zip.plan_file(name, value)
    parts: list[bytes] = []
    with closing(Files(files)) as source:
        for region in plan.regions:
            content = region.content
            if isinstance(content, Crc32):
                checksum = zlib.crc32(parts[content.region], zlib.crc32(content.head))
                content = checksum.to_bytes(4, "little")
            elif isinstance(content, LazyTensor):
                content = np.ascontiguousarray(read(content, source)).tobytes()
            parts.append(content)
    return b"".join(parts)


def as_json(value: Any) -> Any:
    """Return a value that JSON can say, tuples as lists.

    Raises:
        TypeError: it cannot.
    """
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Mapping():
            if not all(isinstance(key, str | int) for key in value):
                raise TypeError("a key is neither a string nor a number")
            return {str(key): as_json(item) for key, item in value.items()}
        case list() | tuple():
            return [as_json(item) for item in value]
    raise TypeError(f"a {type(value).__name__} has no form in JSON")
