"""Directories of `torch.distributed.checkpoint`: Megatron's torch_dist, FSDP, torchtitan.

    .metadata         which boxes ("chunks") of which tensor, and where their items are
    __0_0.distcp      | item | item | ... |      an item is what torch.save writes to a stream
    __1_0.distcp

An item is a whole torch zip archive around one chunk or one object; nothing lies between items.

Source: torch:torch/distributed/checkpoint/filesystem.py@v2.13.0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from ckptx.containers import dcp_metadata, torch_zip
from ckptx.containers.dcp_metadata import METADATA_NAME, Chunk, DcpMetadata, ItemRange
from ckptx.containers.dcp_metadata import read_metadata as read_metadata
from ckptx.containers.pickle_values import TensorRecord, TorchSize, collector_paused
from ckptx.containers.zip_archive import ENDS_SIZE
from ckptx.containers.zstd import decoded, is_zstd
from ckptx.errors import FormatError, PlanError
from ckptx.storage.file_plan import FilePlan, Region
from ckptx.storage.location import Location
from ckptx.storage.open_files import PackedFile
from ckptx.storage.source_file import SourceFile
from ckptx.storage.spool import Spool
from ckptx.tensors import tiling
from ckptx.tensors.dtypes import ITEMSIZE
from ckptx.tensors.joins import tile
from ckptx.tensors.lazy import Filled, LazyTensor, Shape, Stored, stored

_AROUND = 1 << 20
"""Bytes that an item may have around its tensor: a zip archive of a few short members."""


def tensors(
    metadata: DcpMetadata,
    files: list[str],
    keys: Iterable[str] | None = None,
    spool: Spool | None = None,
) -> dict[str, LazyTensor]:
    """Return the tensors of a directory, assembled from their chunks.

    Args:
        metadata: from `read_metadata`.
        files: the file table of the conversion; files that are new to it are appended.
        keys: which tensors; all unless given.
        spool: where items that are compressed with zstd are decoded to when they are read;
            refused without.

    Raises:
        FormatError: a chunk is missing, overlaps another, is damaged, is encoded in an unknown
            way, or its file is not there.
    """
    wanted = metadata.tensors if keys is None else keys
    with _Items(metadata, files, spool) as items, collector_paused():
        return {key: _assemble(metadata, key, items) for key in wanted}


def read_object(metadata: DcpMetadata, key: str, files: list[str]) -> Any:
    """Return the value of an object entry; tensors in it are `Stored`.

    Raises:
        FormatError: there is no such object, or its item is damaged or hostile.
    """
    with _Items(metadata, files) as items:
        file, index, location = items.open(key, None)
        return torch_zip.read_open(file, index, location.offset, location.length)


def _assemble(metadata: DcpMetadata, key: str, items: _Items) -> LazyTensor:
    where = f"{metadata.directory / METADATA_NAME}: {key!r}"
    if (entry := metadata.tensors.get(key)) is None:
        raise FormatError(f"{where} is not in the checkpoint")
    if entry.dtype not in ITEMSIZE:
        raise FormatError(f"{where}: found dtype {entry.dtype}, which ckptx does not convert")
    fault = tiling.fault(entry.shape, [(chunk.offsets, chunk.sizes) for chunk in entry.chunks])
    if fault:
        raise FormatError(f"{where}: {fault}; the checkpoint is incomplete, save it again")
    solid = [chunk for chunk in entry.chunks if 0 not in chunk.sizes]
    if not solid:
        return Filled(entry.dtype, entry.shape)
    parts = [(chunk.offsets, items.chunk(key, entry.dtype, chunk)) for chunk in solid]
    return tile(entry.shape, parts)


@dataclass(frozen=True, slots=True)
class _Layout:
    """How the items of one dtype and shape look: everything but payload and checksums."""

    length: int
    prefix: bytes
    ends: bytes
    start: int
    """Bytes from the item's start to the first element."""
    strides: Shape


class _Items:
    """The items of a directory: opens files once, and parses one item of each kind.

    An item whose length, bytes before the payload (they contain the pickle) and end records equal
    those of one that was parsed has the same layout; two short reads show that.
    """

    def __init__(self, metadata: DcpMetadata, files: list[str], spool: Spool | None = None) -> None:
        self._metadata = metadata
        self._spool = spool
        self._files = files
        self._numbers = {path: number for number, path in enumerate(files)}
        self._open: dict[str, tuple[SourceFile, int]] = {}
        self._layouts: dict[tuple[str, Shape], _Layout] = {}
        self._packed: dict[str, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> _Items:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(self, key: str, offsets: Shape | None) -> tuple[SourceFile, int, ItemRange]:
        """Return the file of an item, its number, and the place of the item in it."""
        location = self._metadata.items.get((key, offsets))
        where = f"{self._metadata.directory / METADATA_NAME}: {key!r}"
        if location is None:
            box = "" if offsets is None else f" of the chunk at {list(offsets)}"
            raise FormatError(f"{where}: the place{box} is missing; the checkpoint is incomplete")
        packed = self._spool is not None and is_zstd(location.transforms)
        if location.transforms and not packed:
            raise FormatError(
                f"{where}: found items encoded as {', '.join(map(str, location.transforms))}, "
                f"expected plain ones; save the checkpoint without extensions"
            )
        opened = self._open.get(location.path) or self._open_file(where, location.path)
        file, number = opened
        if location.offset + location.length > file.size:
            raise FormatError(
                f"{file.path}: {key!r}: expected {location.length} bytes at {location.offset}, "
                f"the file has {file.size}; it is truncated, copy it again"
            )
        return file, number, location

    def _open_file(self, where: str, relative: str) -> tuple[SourceFile, int]:
        pure = PurePosixPath(relative)
        if pure.is_absolute() or ".." in pure.parts or "\0" in relative or not pure.parts:
            raise FormatError(
                f"{where}: found an item in {relative!r}, expected a file inside the directory"
            )
        path = self._metadata.directory / str(pure)
        file = self._stack.enter_context(SourceFile(path))
        name = str(path.absolute())
        number = self._numbers.setdefault(name, len(self._files))
        if number == len(self._files):
            self._files.append(name)
        self._open[relative] = file, number
        return file, number

    def chunk(self, key: str, dtype: str, chunk: Chunk) -> Stored:
        """Return the extent of a chunk."""
        file, number, location = self.open(key, chunk.offsets)
        if location.transforms and self._spool is not None:
            item = _PackedItem(file.path, location, key, dtype, chunk.sizes)
            offset = self._spool.reserve(item, item.nbytes)
            return stored(self._packed_number(self._spool, file), offset, dtype, chunk.sizes)
        kind = dtype, chunk.sizes
        layout = self._layouts.get(kind)
        if layout is None or not _fits(layout, file, location):
            layout = _parse(file, location, key, dtype, chunk.sizes)
            self._layouts[kind] = layout
        return Stored(dtype, chunk.sizes, number, location.offset + layout.start, layout.strides)

    def _packed_number(self, spool: Spool, file: SourceFile) -> int:
        """Return the number of a file whose items are decoded when they are read."""
        name = str(file.path.absolute())
        number = self._packed.setdefault(name, len(self._files))
        if number == len(self._files):
            self._files.append(PackedFile.of(name, spool.decoded))
        return number


@dataclass(frozen=True, slots=True)
class _PackedItem:
    """A tensor's item, compressed with zstd."""

    path: Location
    location: ItemRange
    key: str
    dtype: str
    sizes: Shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * ITEMSIZE[self.dtype]

    def blocks(self) -> Iterator[bytes]:
        with SourceFile(self.path) as file:
            limit = self.nbytes + _AROUND
            yield from decoded(file, self.location.offset, self.location.length, limit)

    def tensor(self, file: SourceFile, offset: int, size: int) -> Stored:
        place = ItemRange(str(file.path), offset, size)
        layout = _parse(file, place, self.key, self.dtype, self.sizes)
        return Stored(self.dtype, self.sizes, 0, offset + layout.start, layout.strides)


def _fits(layout: _Layout, file: SourceFile, location: ItemRange) -> bool:
    if location.length != layout.length:
        return False
    stop = location.offset + location.length
    return (
        file.read(location.offset, len(layout.prefix)) == layout.prefix
        and file.read(stop - len(layout.ends), len(layout.ends)) == layout.ends
    )


def _parse(file: SourceFile, location: ItemRange, key: str, dtype: str, sizes: Shape) -> _Layout:
    start, stop = location.offset, location.offset + location.length
    try:
        members, record = torch_zip.read_records(file, start, location.length)
    except FormatError as error:
        raise FormatError(f"{error} (item {key!r} at byte {start})") from error
    if not isinstance(record, TensorRecord):
        raise FormatError(
            f"{file.path}: {key!r} at byte {start}: expected a tensor, "
            f"found {type(record).__name__}"
        )
    if (record.dtype, record.shape) != (dtype, sizes):
        raise FormatError(
            f"{file.path}: {key!r} at byte {start}: expected {dtype} {list(sizes)}, found "
            f"{record.dtype!s:.40} {str(record.shape)[:80]}; {METADATA_NAME} and files do not match"
        )
    storage = members.get(f"data/{record.key}")
    place = torch_zip.storage_offset(file, record, storage)
    payload = place if storage is None else storage.offset
    ends = min(ENDS_SIZE, location.length)
    return _Layout(
        location.length,
        file.read(start, payload - start),
        file.read(stop - ends, ends),
        place - start,
        record.strides,
    )


class TensorItem(NamedTuple):
    """A chunk to be written: ``tensor`` at ``offsets`` of the tensor ``key`` of ``shape``."""

    key: str
    shape: Shape
    offsets: Shape
    tensor: LazyTensor


class ObjectItem(NamedTuple):
    """An object to be written: a value as `ckptx.containers.pickle_writer.dumps` takes it."""

    key: str
    value: Any


@collector_paused()
def plan_directory(
    files: Mapping[str, Sequence[TensorItem | ObjectItem]],
    planner_data: Mapping[str, tuple[str | int, ...]] | None = None,
) -> list[FilePlan]:
    """Plan the data files and the ``.metadata`` of a directory.

    Args:
        files: the items of every file, in order, by name (``"__0_0.distcp"``). A chunk that several
            ranks hold is given once. Empty chunks are left out.
        planner_data: the path of each key in the nested dictionary that a reader shall rebuild.

    Raises:
        PlanError: chunks overlap or leave something out, or disagree about shape or dtype.
    """
    plans: list[FilePlan] = []
    shapes: dict[str, tuple[str, Shape]] = {}
    chunks: dict[str, list[Chunk]] = {}
    placed: list[dcp_metadata.Placed] = []
    named: list[dcp_metadata.Named] = []
    encoded: dict[int, bytes] = {}
    sizes: dict[Shape, TorchSize] = {}
    between: dict[tuple[bytes, bytes], bytes] = {}
    for name, entries in files.items():
        regions: list[Region] = []
        position = 0
        key, expected, boxes = None, None, []  # of the item before: neighbours are mostly alike
        for entry in entries:
            if isinstance(entry, TensorItem):
                found = entry.tensor.dtype, entry.shape
                if entry.key != key:
                    key = entry.key
                    expected = shapes.setdefault(key, found)
                    boxes = chunks.setdefault(key, [])
                if expected is not None and found != expected:
                    raise _disagreeing(name, entry.key, found, expected)
                if 0 in entry.tensor.shape and 0 not in entry.shape:
                    continue  # the share of a rank that has none
                end = _add_tensor(regions, position, entry, between)
                offsets = _size(entry.offsets, sizes)
                placed.append((entry.key, len(boxes), offsets, name, position, end - position))
                boxes.append(Chunk(offsets, _size(entry.tensor.shape, sizes)))
            else:
                data = encoded.get(id(entry.value)) or torch_zip.plan_bytes_item(entry.value)
                encoded[id(entry.value)] = data  # ``files`` keeps the values alive
                regions.append(Region(position, len(data), data, entry.key))
                named.append((entry.key, None, name, position, len(data)))
                end = position + len(data)
            position = end
        if regions:
            plans.append(FilePlan(name, position, regions))
    tensors = {
        key: dcp_metadata.TensorEntry(shapes[key][0], _size(shapes[key][1], sizes), tuple(boxes))
        for key, boxes in chunks.items()
    }
    _check(tensors, [key for key, *_ in named])
    data = dcp_metadata.dump_metadata(tensors, placed, named, planner_data)
    plans.append(FilePlan(METADATA_NAME, len(data), [Region(0, len(data), data)]))
    return plans


def _size(shape: Shape, known: dict[Shape, TorchSize]) -> TorchSize:
    """Return a shape as torch has it in metadata; equal ones are one object."""
    return known.get(shape) or known.setdefault(shape, TorchSize(shape))


def _disagreeing(
    file: str, key: str, found: tuple[str, Shape], expected: tuple[str, Shape]
) -> PlanError:
    here, before = (f"{dtype} {list(shape)}" for dtype, shape in (found, expected))
    return PlanError(
        f"{file}: {key!r} is {here} here, {before} in another part; all have to be of one dtype, "
        "which --dtype can give them"
    )


def _add_tensor(
    regions: list[Region],
    position: int,
    item: TensorItem,
    between: dict[tuple[bytes, bytes], bytes],
) -> int:
    """Append an item; return where it ends.

    What ends an item and what begins the next are one region, and equal ones one object in
    ``between``: a giant has half a million items.
    """
    envelope = torch_zip.plan_item(item.tensor.dtype, item.tensor.shape)
    prefix, nbytes, suffix = envelope.prefix, envelope.nbytes, envelope.suffix
    payload = position + len(prefix)
    last = regions[-1] if regions else None
    if last is not None and isinstance(last.content, bytes) and not last.name:
        joined = between.setdefault((last.content, prefix), last.content + prefix)
        regions[-1] = Region(last.offset, len(joined), joined)
    else:
        regions.append(Region(position, len(prefix), prefix))
    if not nbytes:  # an empty tensor: the prefix is all there is
        return payload
    end = payload + nbytes
    regions.append(Region(payload, nbytes, item.tensor, item.key))
    regions.append(Region(end, len(suffix), suffix))
    return end + len(suffix)


def _check(tensors: Mapping[str, dcp_metadata.TensorEntry], objects: Sequence[str]) -> None:
    for key, entry in tensors.items():
        if fault := tiling.fault(entry.shape, entry.chunks):
            raise PlanError(f"{METADATA_NAME}: {key!r}: {fault}")
    for key, count in Counter(objects).items():
        if count > 1 or key in tensors:
            raise PlanError(f"{METADATA_NAME}: the object {key!r} is given twice, or is a tensor")
