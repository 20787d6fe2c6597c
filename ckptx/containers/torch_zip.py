"""The zip files of `torch.save`: a pickle, and one member per storage.

    <root>/data.pkl  .format_version  .storage_alignment  byteorder  data/0 ...  version
    <root>/.data/serialization_id

``root`` is the stem of the file's name, ``archive`` where torch wrote to a stream (the items of DCP
files). Tensors of the pickle refer to storages by key, with an offset and strides in elements.

Source: torch:torch/serialization.py, caffe2/serialize/inline_container.cc@v2.13.0.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from operator import is_not
from pathlib import PurePosixPath
from typing import Any

from ckptx.containers import pickle_reader, pickle_values
from ckptx.containers.pickle_values import Record, TensorRecord, TorchSize
from ckptx.containers.pickle_writer import dumps
from ckptx.containers.zip_archive import ArchiveWriter, Member, NewMember, read_members
from ckptx.errors import FormatError, PlanError
from ckptx.storage import gather
from ckptx.storage.file_plan import Crc32, FilePlan
from ckptx.storage.location import Location
from ckptx.storage.source_file import SourceFile
from ckptx.tensors.dtypes import ITEMSIZE
from ckptx.tensors.lazy import MAX_AXES, LazyTensor, Shape, Stored, contiguous_strides

ITEM_ROOT = "archive"
"""The root folder of archives that torch writes to a stream."""

_ZIP_MAGIC = b"PK\3\4"
# torch.serialization.MAGIC_NUMBER as a pickle of protocol 2: how files before torch 1.6 start.
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def stored_bytes(value: Any) -> int:
    """Return the bytes of all tensors in a nested structure, whose parts count once each."""
    return _stored_bytes(value, set())


def _stored_bytes(value: Any, seen: set[int]) -> int:
    if isinstance(value, Stored):
        return value.nbytes
    if not isinstance(value, Mapping | list | tuple) or id(value) in seen:
        return 0
    seen.add(id(value))
    entries = value.values() if isinstance(value, Mapping) else value
    return sum(_stored_bytes(entry, seen) for entry in entries)


def read(path: Location, file_index: int) -> Any:
    """Return what `torch.load` would return, with every tensor a `Stored` extent.

    Parameters are unwrapped, foreign objects are values of `ckptx.containers.pickle_values`.

    Args:
        path: the file.
        file_index: its place in the file table of the conversion.

    Raises:
        FormatError: the file is no torch file, is damaged or hostile, or from before torch 1.6.
    """
    with SourceFile(path) as file:
        return read_open(file, file_index)


def read_open(file: SourceFile, file_index: int, offset: int = 0, length: int | None = None) -> Any:
    """Return the value of the archive at ``[offset, offset + length)`` bytes of a file.

    It reaches to the end of the file unless ``length`` is given; see `read`.
    """
    members, value = read_records(file, offset, length)

    def extent(record: TensorRecord) -> Stored:
        start = storage_offset(file, record, members.get(f"data/{record.key}"))
        return Stored(record.dtype, record.shape, file_index, start, record.strides)

    try:
        return _Resolver(extent).resolve(value)
    except _TangledError as error:
        raise FormatError(f"{file.path}: {error}; no checkpoint is like that") from error


def read_records(
    file: SourceFile, offset: int, length: int | None
) -> tuple[dict[str, Member], Any]:
    """Return the members by name below the root, and the pickle with `TensorRecord` leaves."""
    _check_magic(file, offset)
    named = read_members(file, offset, length)
    roots = [name.removesuffix("data.pkl") for name in named if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise FormatError(
            f"{file.path}: expected one data.pkl, found {len(roots)}; "
            f"the archive was not written by torch.save"
        )
    members = {name[len(roots[0]) :]: m for name, m in named.items() if name.startswith(roots[0])}
    order = members.get("byteorder")
    found = b"little" if order is None else file.read(order.offset, min(order.size, 16))
    if found != b"little":
        raise FormatError(
            f"{file.path}: expected little-endian tensors, found byteorder {found!r}; "
            f"load and save the file with torch on a little-endian machine"
        )
    pickled = members["data.pkl"]
    if pickled.size > pickle_reader.MAX_PICKLE:
        raise FormatError(
            f"{file.path}: expected a data.pkl of at most {pickle_reader.MAX_PICKLE} bytes, "
            f"found {pickled.size}"
        )
    data = file.read(pickled.offset, pickled.size)
    return members, pickle_reader.loads(data, file=str(file.path))


def plan_file(path: str, value: Any) -> FilePlan:
    """Plan the file that ``torch.save(value, path)`` would write.

    ``value`` has lazy tensors at its leaves, stored row-major; one and the same object at several
    places is stored once. Bytes differ from torch's in the pickle's memo and the serialization id.

    Raises:
        PlanError: something in ``value`` cannot be pickled, or a dtype is unknown.
    """
    writer = ArchiveWriter(PurePosixPath(path).stem)
    pickled, storages = _pickled(value)
    _add_members(writer, pickled, storages, dict(_labels(value, "")))
    size, regions = writer.finish()
    return FilePlan(path, size, regions)


def small_file(path: str, value: Any) -> bytes:
    """Return the bytes of what `plan_file` plans; no tensor of ``value`` lies in a file."""
    writer = ArchiveWriter(PurePosixPath(path).stem, checksums=False)
    _add_members(writer, *_pickled(value))
    contents = (region.content for region in writer.finish()[1])
    return b"".join(
        gather.read(content, []).tobytes() if isinstance(content, LazyTensor) else content
        for content in contents
        if not isinstance(content, Crc32)
    )


def plan_files(files: Iterable[tuple[str, Any]]) -> Iterator[FilePlan]:
    """Plan the file that ``torch.save(value, path)`` would write for every pair of path and value.

    Thousands of ranks write values that differ in nothing but their tensors' contents. Such files
    share what is around the tensors: it is made once for all that follow one another.

    Raises:
        PlanError: see `plan_file`.
    """
    last: tuple[str, list[Any]] | None = None
    like = FilePlan("", 0, ())
    places: list[int] = []
    for path, value in files:
        outline: list[Any] = []
        tensors: dict[int, tuple[int, LazyTensor]] = {}
        _outline(value, outline, tensors)
        stem = PurePosixPath(path).stem
        held = [tensor for _, tensor in tensors.values() if tensor.nbytes]
        if last == (stem, outline) and len(places) == len(held):
            regions = list(like.regions)
            for number, tensor in zip(places, held, strict=True):
                regions[number] = regions[number]._replace(content=tensor)
            yield FilePlan(path, like.size, regions)
        else:
            last, like = (stem, outline), plan_file(path, value)
            places = [n for n, r in enumerate(like.regions) if isinstance(r.content, LazyTensor)]
            yield like


def _outline(value: Any, outline: list[Any], tensors: dict[int, tuple[int, LazyTensor]]) -> None:
    """Append all of a value but what its tensors hold; number these by identity, in order."""
    if isinstance(value, LazyTensor):
        number, _ = tensors.setdefault(id(value), (len(tensors), value))
        outline.append((value.dtype, value.shape, number))
    elif isinstance(value, Mapping):
        outline.append(type(value))
        for key, item in value.items():
            outline.append(key)
            _outline(item, outline, tensors)
        outline.append(None)
    else:
        outline.append(value)


def _labels(value: Any, place: str) -> Iterator[tuple[int, str]]:
    """Yield the identity of every tensor in nested dictionaries and its dotted path."""
    if isinstance(value, LazyTensor):
        yield id(value), place
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _labels(item, f"{place}.{key}" if place else str(key))


@dataclass(frozen=True, slots=True)
class Envelope:
    """The bytes around a tensor in an archive of its own."""

    prefix: bytes
    nbytes: int
    suffix: bytes


@lru_cache(maxsize=65536)
def plan_item(dtype: str, shape: Shape) -> Envelope:
    """Return what surrounds a row-major tensor as an item of a DCP file.

    The tensor's CRC-32 stays 0, which torch does not check. So the bytes depend on dtype and shape
    alone, and a million items of a few hundred shapes cost nothing.
    """
    strides = contiguous_strides(shape)
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    record = TensorRecord(dtype, shape, strides, 0, "0", nbytes)
    writer = ArchiveWriter(ITEM_ROOT, checksums=False)
    tensor = Stored(dtype, shape, 0, 0, strides)  # a place holder: only its size matters
    _add_members(writer, dumps(record), {"0": tensor})
    _, regions = writer.finish()
    parts = [region.content for region in regions]
    prefix, suffix = parts[0], parts[-1] if len(parts) > 1 else b""
    if not isinstance(prefix, bytes) or not isinstance(suffix, bytes):
        raise PlanError(f"an item of {dtype} {list(shape)} has no envelope")
    return Envelope(prefix, nbytes, suffix)


def plan_bytes_item(value: Any) -> bytes:
    """Return ``torch.save(value)`` as an item of a DCP file.

    Raises:
        PlanError: ``value`` holds a tensor with elements; that is an item of its own.
    """
    pickled, storages = _pickled(value)
    if any(tensor.nbytes for tensor in storages.values()):
        raise PlanError("an object item holds a tensor with elements; store it under its own key")
    return _bytes_item(pickled, tuple(storages.items()))


@lru_cache(maxsize=1024)
def _bytes_item(pickled: bytes, storages: tuple[tuple[str, LazyTensor], ...]) -> bytes:
    writer = ArchiveWriter(ITEM_ROOT)
    _add_members(writer, pickled, dict(storages))
    _, regions = writer.finish()
    return b"".join(region.content for region in regions if isinstance(region.content, bytes))


def _pickled(value: Any) -> tuple[bytes, dict[str, LazyTensor]]:
    """Return the pickle of a value and its storages by key."""
    storages: dict[str, LazyTensor] = {}
    keys: dict[int, str] = {}

    def record(tensor: LazyTensor) -> TensorRecord:
        key = keys.setdefault(id(tensor), str(len(keys)))  # ``value`` keeps the tensors alive
        storages[key] = tensor
        strides = contiguous_strides(tensor.shape)
        return TensorRecord(tensor.dtype, tensor.shape, strides, 0, key, tensor.nbytes)

    return dumps(value, record), storages


def _add_members(
    writer: ArchiveWriter,
    pickled: bytes,
    storages: Mapping[str, LazyTensor],
    labels: Mapping[int, str] | None = None,
) -> None:
    """Add the members of a torch file in torch's order; labels name tensors by their identity."""
    # torch hashes names and data; any 40 digits will do, and these depend on the content alone.
    digest = int.from_bytes(hashlib.sha256(pickled).digest(), "big") % 10**40
    before = {
        "data.pkl": pickled,
        ".format_version": b"1",
        ".storage_alignment": b"64",
        "byteorder": b"little",
    }
    after = {"version": b"3\n", ".data/serialization_id": b"%040d" % digest}
    for name, data in before.items():
        writer.add(NewMember(name, len(data), data))
    for key, tensor in storages.items():
        member = f"data/{key}"
        label = (labels or {}).get(id(tensor), member)
        writer.add(NewMember(member, tensor.nbytes, tensor, label))
    for name, data in after.items():
        writer.add(NewMember(name, len(data), data))


def _check_magic(file: SourceFile, offset: int) -> None:
    start = file.read(offset, min(len(_LEGACY_MAGIC), max(0, file.size - offset)))
    if start.startswith(_ZIP_MAGIC):
        return
    if start == _LEGACY_MAGIC:
        raise FormatError(
            f"{file.path}: expected a zip archive, found a file of torch before 1.6; re-save it: "
            f"torch.save(torch.load(path, map_location='cpu'), path)"
        )
    file.refuse_pointer()
    raise FormatError(
        f"{file.path}: expected a zip archive of torch.save at byte {offset}, found {start[:8]!r}; "
        f"the file is damaged or of another format"
    )


def _naturals(values: object) -> bool:
    return isinstance(values, tuple) and all(type(n) is int and n >= 0 for n in values)


def storage_offset(file: SourceFile, record: TensorRecord, storage: Member | None) -> int:
    """Return where in the file, in bytes, the first element of a tensor of a pickle is.

    Raises:
        FormatError: the tensor reaches beyond its storage, which may be missing, or its dtype is
            not one that ckptx converts.
    """
    where = f"{file.path}: tensor in storage data/{record.key!s:.40}"
    if record.dtype not in ITEMSIZE:
        raise FormatError(
            f"{where}: found dtype {record.dtype!s:.40}, which ckptx does not convert"
        )
    if storage is None:
        raise FormatError(f"{where}: the storage is not in the archive; copy the file again")
    if (
        not _naturals((*record.shape, *record.strides, record.storage_offset))
        or not len(record.shape) == len(record.strides) <= MAX_AXES
        or record.storage_nbytes != storage.size
    ):
        raise FormatError(
            f"{where}: expected {record.storage_nbytes} bytes and natural sizes and strides, found "
            f"{storage.size} bytes; the file is damaged"
        )
    if 0 in record.shape:
        return storage.offset
    last = sum((n - 1) * stride for n, stride in zip(record.shape, record.strides, strict=True))
    needed = (record.storage_offset + last + 1) * ITEMSIZE[record.dtype]
    if needed > storage.size:
        raise FormatError(
            f"{where}: {record.dtype} {list(record.shape)} needs {needed} bytes of its storage, "
            f"found {storage.size}; the file is damaged"
        )
    return storage.offset + record.storage_offset * ITEMSIZE[record.dtype]


MAX_DEPTH = 100
"""How deep containers of a pickle may nest; those of real checkpoints stay below 20."""
MAX_SHARED = 1_000_000
"""How many values may be met again where containers are shared, as a walk that knows no sharing
meets them."""


class _TangledError(ValueError):
    """The objects of a pickle cannot be walked as a tree."""


class _Resolver:
    """Replaces the `TensorRecord` leaves of a graph that may share itself.

    What it returns can be walked as a tree: it is not too deep, holds itself at most through a
    `Record`, and a few bytes of pickle have not become billions of values.
    """

    def __init__(self, extent: Callable[[TensorRecord], Stored]) -> None:
        self._extent = extent
        # By identity; holds the objects too, lest their ids be used again.
        self._done: dict[int, tuple[Any, Any]] = {}
        # How many values a container holds as a tree; of one that is not done, minus the number of
        # records that it was met in.
        self._sizes: dict[int, int] = {}
        self._met = self._shared = self._depth = self._records = 0

    def resolve(self, value: Any) -> Any:
        """Return ``value`` with extents for tensors; containers are changed in place.

        Raises:
            FormatError: an extent is none.
            _TangledError: the graph is too deep, too large or holds itself.
        """
        kind = type(value)
        if kind is TensorRecord:
            return self._extent(value)
        if not isinstance(value, dict | list | tuple | pickle_values.Namespace | Record):
            return value
        if (done := self._done.get(id(value))) is not None:
            self._meet_again(id(value))
            return done[1]
        self._done[id(value)] = value, value
        self._sizes[id(value)] = -self._records
        before = self._met
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _TangledError("its objects are nested too deeply")
        result = self._resolve(value)
        self._depth -= 1
        if isinstance(value, Record):  # what walks plain containers stops at it
            self._met = before
        self._met += 1
        self._sizes[id(value)] = self._met - before
        return result

    def _meet_again(self, identity: int) -> None:
        size = self._sizes[identity]
        if size <= 0 and size == -self._records:
            raise _TangledError("a container of it holds itself")
        if size > 0:
            self._met += size
            self._shared += size
            if self._shared > MAX_SHARED:
                raise _TangledError(
                    f"its containers are shared so often that they hold over {MAX_SHARED} values"
                )

    def _resolve(self, value: Any) -> Any:
        if isinstance(value, dict):
            self._mapping(value)
        elif isinstance(value, list):
            self._met += len(value)
            value[:] = [self.resolve(item) for item in value]
        elif isinstance(value, tuple):
            return self._tuple(value)
        elif isinstance(value, pickle_values.Namespace):
            self._mapping(vars(value))
        else:
            self._records += 1
            value.args = self.resolve(value.args)
            value.state = self.resolve(value.state)
            self._mapping(value.kwargs)
            value.items = [self.resolve(item) for item in value.items]
            value.pairs = [(key, self.resolve(item)) for key, item in value.pairs]
            self._records -= 1
        return value

    def _mapping(self, value: dict[Any, Any]) -> None:
        if isinstance(value, OrderedDict):
            vars(value).clear()  # torch's _metadata; or an ``items`` that is no method
        self._met += len(value)
        for key, item in value.items():
            value[key] = self.resolve(item)

    def _tuple(self, value: tuple[Any, ...]) -> tuple[Any, ...]:
        self._met += len(value)
        if isinstance(value, TorchSize):
            if not all(type(size) is int for size in value):
                raise _TangledError("a torch.Size of it holds something else than numbers")
            return value
        items = tuple([self.resolve(item) for item in value])
        if isinstance(value, pickle_values.UnhashableTuple) or any(map(is_not, items, value)):
            self._done[id(value)] = value, items
            return items
        return value
