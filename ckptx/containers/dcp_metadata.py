"""The ``.metadata`` of a `torch.distributed.checkpoint` directory, in both directions.

It is one pickle of `Metadata`: per key either a size, a dtype and boxes of elements ("chunks"), or
a mark that the value is an object; and for every chunk and object the byte range of its item.

Source: torch:torch/distributed/checkpoint/metadata.py and filesystem.py there @v2.13.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from ckptx.containers import pickle_reader, pickle_values
from ckptx.containers.pickle_values import Global, Instance, Record, TorchDtype, TorchSize
from ckptx.containers.pickle_writer import dumps
from ckptx.errors import FormatError
from ckptx.storage.location import Location
from ckptx.storage.source_file import SourceFile
from ckptx.tensors.lazy import MAX_AXES, Shape

METADATA_NAME = ".metadata"

_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_STORAGE_INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_METADATA = Global(_METADATA_MODULE, "Metadata")
_INDEX = Global(_METADATA_MODULE, "MetadataIndex")
_CHUNK = Global(_METADATA_MODULE, "ChunkStorageMetadata")
_TENSOR = Global(_METADATA_MODULE, "TensorStorageMetadata")
_PROPERTIES = Global(_METADATA_MODULE, "TensorProperties")
_BYTES = Instance(Global(_METADATA_MODULE, "BytesStorageMetadata"), None, shared=True)
_STRIDED = pickle_values.Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
_CONTIGUOUS = pickle_values.EnumValue(_METADATA_MODULE, "_MEM_FORMAT_ENCODING", 0)

_BOX = ("offsets", "sizes")
_EXTENT = ("relative_path", "offset", "length")
_OBJECT = ("fqn", "index")
_PLACE = ("fqn", "index", "offset")

ItemKey: TypeAlias = tuple[str, Shape | None]
"""A key of the checkpoint and the offsets of a chunk, None for an object."""


class Chunk(NamedTuple):
    """A box of a tensor that is one item, in elements of the whole tensor."""

    offsets: Shape
    sizes: Shape


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor of the checkpoint and the chunks it was saved in."""

    dtype: str
    shape: Shape
    chunks: tuple[Chunk, ...]


class ItemRange(NamedTuple):
    """Where an item is: ``[offset, offset + length)`` bytes of ``path``, relative to the directory.

    ``transforms`` names the codecs that were applied to it, ``"stream.zstd/1"`` for instance.
    """

    path: str
    offset: int
    length: int
    transforms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DcpMetadata:
    """What a DCP directory holds.

    Attributes:
        directory: where it was read.
        tensors: by key.
        objects: keys whose values are pickled objects.
        items: the place of every chunk and object.
        planner_data: the path of each key in the nested dictionary that was saved, where known.
    """

    directory: Location
    tensors: Mapping[str, TensorEntry]
    objects: tuple[str, ...]
    items: Mapping[ItemKey, ItemRange]
    planner_data: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)


def read_metadata(directory: Location) -> DcpMetadata:
    """Read and check the ``.metadata`` of a directory.

    Raises:
        FormatError: it is missing, damaged or hostile.
    """
    path = directory / METADATA_NAME
    with SourceFile(path) as file:
        if file.size > pickle_reader.MAX_PICKLE:
            raise FormatError(
                f"{path}: expected at most {pickle_reader.MAX_PICKLE} bytes, found {file.size}"
            )
        value = pickle_reader.loads(file.read(0, file.size), file=str(path))
    state = _fields_of(path, value)
    try:
        with pickle_values.collector_paused():
            return _metadata(directory, state, file.size // _CHUNK_BYTES)
    except FormatError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{path}: expected the fields of torch.distributed.checkpoint, found "
            f"{type(error).__name__}: {str(error)[:200]}; the file is damaged"
        ) from error


def _fields_of(path: Location, value: object) -> dict[str, Any]:
    """Return the attributes of a Metadata; a class that extends it, as Megatron's does, will do."""
    state = value.state if isinstance(value, Record) else None
    if isinstance(state, dict) and "state_dict_metadata" in state:
        return state
    return _state(path, value, "Metadata")


def _state(path: Location, value: object, name: str) -> dict[str, Any]:
    """Return the attributes of a record of class ``name``."""
    if not isinstance(value, Record) or type(value).name != name:
        found = type(value).name if isinstance(value, Record) else type(value).__name__
        raise FormatError(f"{path}: expected a {name}, found a {found:.80}; the file is damaged")
    if value.state is None:  # a class without fields
        return {}
    if not isinstance(value.state, dict):
        raise FormatError(f"{path}: a {name} has no fields; the file is damaged")
    return value.state


_CHUNK_BYTES = 8
"""Bytes that a chunk takes in a pickle at the least: an object and two attributes."""


def _metadata(directory: Location, state: Mapping[str, Any], most_chunks: int) -> DcpMetadata:
    path = directory / METADATA_NAME
    tensors: dict[str, TensorEntry] = {}
    objects: list[str] = []
    for key, entry in state["state_dict_metadata"].items():
        if type(key) is not str:
            raise FormatError(f"{path}: a key is a {type(key).__name__}, expected a string")
        if isinstance(entry, Record) and type(entry).name == "BytesStorageMetadata":
            objects.append(key)
        else:
            fields = _state(path, entry, "TensorStorageMetadata")
            most_chunks -= len(fields["chunks"])
            if most_chunks < 0:
                raise FormatError(
                    f"{path}: {key!r}: tensors share a list of chunks, expected one for each; the "
                    f"file is damaged"
                )
            tensors[key] = _tensor(path, key, fields)
    items: dict[ItemKey, ItemRange] = {}
    for index, info in _pairs(state.get("storage_data")):
        fields = _state(path, index, "MetadataIndex")
        offset = fields.get("offset")
        if offset is not None and len(offset) > MAX_AXES:
            raise FormatError(f"{path}: a chunk has {len(offset)} offsets; the file is damaged")
        item = fields["fqn"], None if offset is None else tuple(offset)
        items[item] = _location(path, _state(path, info, "_StorageInfo"))
    return DcpMetadata(
        directory,
        tensors,
        tuple(objects),
        items,
        {key: tuple(parts) for key, parts in _pairs(state.get("planner_data"))},
    )


def _pairs(value: Any) -> Sequence[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _shape(path: Location, value: Any) -> Shape:
    if len(value) > MAX_AXES:
        raise FormatError(f"{path}: found a tensor of {len(value)} axes; the file is damaged")
    shape = tuple(value)
    for size in shape:
        if type(size) is not int or size < 0:
            raise FormatError(f"{path}: expected natural sizes and offsets; the file is damaged")
    return shape


def _tensor(path: Location, key: str, fields: Mapping[str, Any]) -> TensorEntry:
    properties = fields["properties"].state  # a tuple that starts with the dtype
    dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
    if not isinstance(dtype, TorchDtype):
        raise FormatError(f"{path}: {key!r} has no dtype; the file is damaged")
    shape = _shape(path, fields["size"])
    chunks = []
    for chunk in fields["chunks"]:
        box = _state(path, chunk, "ChunkStorageMetadata")
        offsets, sizes = _shape(path, box["offsets"]), _shape(path, box["sizes"])
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            raise FormatError(
                f"{path}: {key!r} is {list(shape)}, found a chunk {list(sizes)} at {list(offsets)}"
            )
        chunks.append(Chunk(offsets, sizes))
    return TensorEntry(dtype.name, shape, tuple(chunks))


def _location(path: Location, fields: Mapping[str, Any]) -> ItemRange:
    location = ItemRange(
        fields["relative_path"],
        fields["offset"],
        fields["length"],
        tuple(fields.get("transform_descriptors") or ()),
    )
    numbers = type(location.offset) is int and type(location.length) is int
    if type(location.path) is not str or not numbers or min(location.offset, location.length) < 0:
        raise FormatError(f"{path}: an item has no file, offset and length; the file is damaged")
    if not all(type(name) is str for name in location.transforms):
        raise FormatError(f"{path}: an item's encoding has no name; the file is damaged")
    return location


Placed: TypeAlias = tuple[str, int, TorchSize, str, int, int]
"""Where a chunk is: key, number among its chunks, offsets; file, and offset and length in bytes."""
Named: TypeAlias = tuple[str, None, str, int, int]
"""Where an object is: key; file, and offset and length in bytes."""


def dump_metadata(
    tensors: Mapping[str, TensorEntry],
    placed: Sequence[Placed],
    named: Sequence[Named],
    planner_data: Mapping[str, tuple[str | int, ...]] | None = None,
) -> bytes:
    """Return the bytes of a ``.metadata`` file; shapes of ``tensors`` are `TorchSize`.

    It holds what readers need and nothing that differs between equal checkpoints: no save id, no
    path, no save plans.
    """
    entries: dict[str, Instance] = {}
    properties: dict[str, Instance] = {}
    for key, entry in tensors.items():
        if entry.dtype not in properties:
            state = TorchDtype(entry.dtype), _STRIDED, False, _CONTIGUOUS, False
            properties[entry.dtype] = Instance(_PROPERTIES, state, shared=True)
        fields = {
            "properties": properties[entry.dtype],
            "size": entry.shape,
            "chunks": pickle_values.RowList(_CHUNK, _BOX, entry.chunks),
        }
        entries[key] = Instance(_TENSOR, fields)
    entries.update((key, _BYTES) for key, *_ in named)
    storage = pickle_values.RowMap(
        (
            pickle_values.Rows(_INDEX, _PLACE, _STORAGE_INFO, _EXTENT, placed),
            pickle_values.Rows(_INDEX, _OBJECT, _STORAGE_INFO, _EXTENT, named),
        )
    )
    metadata = {
        "state_dict_metadata": entries,
        "planner_data": None if planner_data is None else dict(planner_data),
        "storage_data": storage if placed or named else {},
        "storage_meta": None,
        "version": "1.0.0",
    }
    return dumps(Instance(_METADATA, metadata))
