"""Safetensors files: a JSON header, then row-major tensors without gaps.

    | u64 N | N bytes of JSON, padded with spaces | data: tensor, tensor, ... |
    0       8                                     8 + N                       file size

The header maps names to ``{"dtype": "BF16", "shape": [..], "data_offsets": [begin, end]}``, offsets
in bytes from the start of the data; ``__metadata__`` maps strings to strings.

Source: safetensors:safetensors/src/tensor.rs@v0.8.0. The checks are those of `Metadata::validate`
there, and duplicate names, which it leaves to the JSON parser.
"""

from __future__ import annotations

import json
import math
import reprlib
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptx.errors import FormatError, PlanError
from ckptx.storage.file_plan import FilePlan, Region
from ckptx.storage.location import Location
from ckptx.storage.source_file import SourceFile
from ckptx.tensors.dtypes import ITEMSIZE
from ckptx.tensors.lazy import MAX_AXES, LazyTensor, Stored, contiguous_strides

HEADER_LENGTH = struct.Struct("<Q")
MAX_HEADER = 100_000_000  # bytes; MAX_HEADER_SIZE upstream
ALIGNMENT = 8  # bytes; upstream pads the header so that the data starts aligned
METADATA_KEY = "__metadata__"

DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
    "C64": "complex64",
}
"""ckptx dtypes by safetensors name."""

UNSUPPORTED_DTYPES = frozenset(
    {"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
)
"""Names that the format knows and ckptx does not convert."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a header; ``begin`` and ``end`` are bytes from the start of the *file*."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """The entries in header order, and ``__metadata__``."""

    path: Location
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def read_header(path: Location) -> Header:
    """Return the checked header of a safetensors file.

    Raises:
        FormatError: the file is anything but a complete, gapless safetensors file.
    """
    with SourceFile(path) as file:
        if file.size < HEADER_LENGTH.size:
            raise FormatError(
                f"{path}: expected a safetensors file, found only {file.size} bytes; copy it again"
            )
        file.refuse_pointer()
        (length,) = HEADER_LENGTH.unpack(file.read(0, HEADER_LENGTH.size))
        if length > MAX_HEADER:
            raise FormatError(
                f"{path}: expected a header of at most {MAX_HEADER} bytes, found a claim of "
                f"{length}; this is not a safetensors file"
            )
        if HEADER_LENGTH.size + length > file.size:
            raise FormatError(
                f"{path}: expected a header of {length} bytes, the file has {file.size}; "
                f"it is truncated, copy it again"
            )
        text = file.read(HEADER_LENGTH.size, length)
        size = file.size
    fields = _parse(path, text)
    metadata = _metadata(path, fields.pop(METADATA_KEY, {}))
    start = HEADER_LENGTH.size + length
    entries = {name: _entry(path, name, value, start) for name, value in fields.items()}
    _check_tiling(path, entries, start, size)
    return Header(Path(path), entries, metadata)


def tensors(path: Location, file_index: int) -> dict[str, Stored]:
    """Return every tensor of a file, by name, in header order.

    ``file_index`` is the file's place in the file table of the conversion.
    """
    return {
        name: Stored(
            entry.dtype, entry.shape, file_index, entry.begin, contiguous_strides(entry.shape)
        )
        for name, entry in read_header(path).entries.items()
    }


def plan_file(
    path: str, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None = None
) -> FilePlan:
    """Plan a safetensors file that holds the tensors in the order given.

    The header is byte for byte what the safetensors library writes for the same order (the library
    itself orders by falling element size, then name). ``metadata`` is ``{"format": "pt"}`` unless
    given: transformers refuses files without it.

    Raises:
        PlanError: a dtype or name cannot be expressed.
    """
    fields: dict[str, Any] = {METADATA_KEY: dict(metadata or {"format": "pt"})}
    position = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES or name == METADATA_KEY:
            raise PlanError(
                f"{path}: {name!r} of {tensor.dtype} cannot be stored as safetensors; "
                f"known dtypes: {', '.join(_NAMES)}"
            )
        fields[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (position, position + tensor.nbytes),
        }
        position += tensor.nbytes
    try:
        header = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise PlanError(f"{path}: a tensor name is not valid Unicode: {error}") from error
    header += b" " * (-len(header) % ALIGNMENT)
    if len(header) > MAX_HEADER:
        raise PlanError(
            f"{path}: the header would have {len(header)} bytes, readers accept {MAX_HEADER}; "
            f"write more, smaller files"
        )
    envelope = HEADER_LENGTH.pack(len(header)) + header
    regions = [Region(0, len(envelope), envelope)]
    offset = len(envelope)
    for name, tensor in tensors.items():
        if tensor.nbytes:
            regions.append(Region(offset, tensor.nbytes, tensor, name))
            offset += tensor.nbytes
    return FilePlan(path, offset, regions)


class _DuplicateKeyError(ValueError):
    """A JSON object names one key twice; parsers differ in which they keep."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, for `json.loads`; a name that is given twice is a ValueError."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise _DuplicateKeyError(f"{twice!r} is given twice")
    return fields


def _parse(path: Location, text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise FormatError(
            f"{path}: expected a header that starts with '{{', found {text[:8]!r}; "
            f"this is not a safetensors file"
        )
    try:
        fields = json.loads(text.decode(), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{path}: expected a header of JSON, found none that is valid ({error}); "
            f"the file is damaged, copy it again"
        ) from error
    return dict(fields)


def _metadata(path: Location, value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise FormatError(
            f"{path}: {METADATA_KEY} must map strings to strings; write the file again"
        )
    return value


def _naturals(value: object) -> tuple[int, ...] | None:
    """Return a list of non-negative integers as a tuple, None for anything else."""
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        return None
    return tuple(value)


def _entry(path: Location, name: str, value: object, start: int) -> Entry:
    def refuse(expected: str, found: object) -> FormatError:
        return FormatError(
            f"{path}: {name!r}: expected {expected}, found {reprlib.repr(found)}; "
            f"the header is damaged, copy or write the file again"
        )

    if not isinstance(value, dict) or not value.keys() >= {"dtype", "shape", "data_offsets"}:
        raise refuse("a dtype, a shape and data_offsets", value)
    code = value["dtype"]
    if not isinstance(code, str) or code not in DTYPES:
        if isinstance(code, str) and code in UNSUPPORTED_DTYPES:
            raise FormatError(
                f"{path}: {name!r}: found dtype {code}, which ckptx does not convert; "
                f"expected one of {', '.join(DTYPES)}"
            )
        raise refuse(f"a dtype of {', '.join(DTYPES)}", code)
    dtype = DTYPES[code]
    shape = _naturals(value["shape"])
    if shape is None or len(shape) > MAX_AXES:
        raise refuse(f"a shape of up to {MAX_AXES} non-negative integers", value["shape"])
    span = _naturals(value["data_offsets"])
    if span is None or len(span) != 2 or span[0] > span[1]:
        raise refuse("data_offsets [begin, end]", value["data_offsets"])
    begin, end = span
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    if end - begin != nbytes:
        raise refuse(f"{nbytes} bytes for {code} {list(shape)}", end - begin)
    return Entry(dtype, shape, start + begin, start + end)


def _check_tiling(path: Location, entries: Mapping[str, Entry], start: int, size: int) -> None:
    """Check that the tensors fill the file from ``start`` to ``size``, without gap or overlap."""
    position = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            kind = "overlaps the tensor before" if entry.begin < position else "leaves a gap before"
            raise FormatError(
                f"{path}: {name!r} {kind}: expected offset {position - start}, found "
                f"{entry.begin - start}; write the file again"
            )
        position = entry.end
    if position != size:
        raise FormatError(
            f"{path}: expected {position} bytes by the header, the file has {size}; "
            f"it is truncated or has a tail, copy it again"
        )
