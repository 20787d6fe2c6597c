"""ZIP archives as torch writes them: stored members at aligned offsets, sizes known in advance.

    | local header, name, extra | payload | descriptor | ... | central directory | ends |
    header offset               64-aligned

- Local headers leave sizes and CRC-32 to the data descriptor behind the payload (flag bit 3), so
  only the central directory can be used to find members.
- ``extra`` of a local header is a zip64 field where a size or the header's offset needs one, then
  padding ``FB``, so that the payload is 64-byte aligned from the start of the archive. The central
  directory has no padding.
- ``ends`` is always a zip64 end record, its locator and the classic end record.

Offsets inside an archive count from its first byte, which need not be that of the file: every item
of a DCP file is an archive.

Source: torch:third_party/miniz-3.0.2/miniz.c, caffe2/serialize/inline_container.cc@v2.13.0;
compared byte for byte with files of torch 2.13.0, members beyond 4 GiB included.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ckptx.errors import FormatError
from ckptx.storage.file_plan import Crc32, Region
from ckptx.storage.source_file import SourceFile
from ckptx.tensors.lazy import LazyTensor

ALIGNMENT = 64  # bytes; torch.serialization.config.save.storage_alignment
LIMIT32 = 0xFFFFFFFF  # this value and above go to zip64 fields
LIMIT16 = 0xFFFF
MAX_DIRECTORY = 1 << 30  # bytes; a directory of ten million members

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")
_DESCRIPTOR32 = struct.Struct("<2I")
_DESCRIPTOR64 = struct.Struct("<2Q")
_FIELD = struct.Struct("<2H")

ENDS_SIZE = _END64.size + _LOCATOR.size + _END.size
"""Bytes of the three end records that torch writes."""

_UTF8_AND_DESCRIPTOR = 0x0808  # flag bits 11 and 3
_UTF8 = 0x0800
_ENCRYPTED = 0x2041  # flag bits 0, 6 and 13
_ZIP64_FIELD = 1
_PADDING_FIELD = int.from_bytes(b"FB", "little")
_MADE_BY, _NEEDED = 0x031E, 45  # miniz: Unix 3.0, zip64


@dataclass(frozen=True, slots=True)
class Member:
    """A stored member: its payload lies at bytes ``[offset, offset + size)`` of the *file*."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class NewMember:
    """A member to be written; ``label`` names a tensor in reports.

    ``head`` are bytes before the content, as formats have them that wrap a tensor; ``size`` counts
    both.
    """

    name: str
    size: int
    content: bytes | LazyTensor
    label: str = ""
    head: bytes = b""


def read_members(file: SourceFile, start: int = 0, length: int | None = None) -> dict[str, Member]:
    """Return the members of the archive at bytes ``[start, start + length)`` of a file.

    Raises:
        FormatError: no archive, or members that are compressed, encrypted, duplicate, overlapping,
            or out of range.
    """
    stop = file.size if length is None else start + length
    directory, directory_size, count = _find_directory(file, start, stop)
    data = file.read(start + directory, directory_size)
    members: dict[str, Member] = {}
    spans: list[tuple[int, int, str]] = []
    position = 0
    for _ in range(count):
        position, name, header, size = _central_entry(file, data, position)
        if name in members:
            raise _damaged(file, f"member {name!r} is listed twice")
        if header + _LOCAL.size > directory:
            raise _damaged(file, f"member {name!r} starts beyond the members, at {header}")
        payload = header + _local_size(file, start + header, name)
        if payload + size > directory:
            raise _damaged(
                file, f"member {name!r} of {size} bytes at {payload} ends after {directory}"
            )
        spans.append((header, payload + size, name))
        members[name] = Member(start + payload, size)
    spans.sort()
    for (_, end, name), (header, _, following) in pairwise(spans):
        if header < end:
            raise _damaged(file, f"members {name!r} and {following!r} overlap")
    return members


def _damaged(file: SourceFile, found: str) -> FormatError:
    return FormatError(
        f"{file.path}: expected a zip archive as torch.save writes it, found that {found}; "
        f"the file is damaged, copy it again"
    )


def _find_directory(file: SourceFile, start: int, stop: int) -> tuple[int, int, int]:
    """Return offset (from ``start``), size in bytes and entry count of the central directory."""
    if stop > file.size or stop - start < _END.size:
        raise _damaged(file, f"it needs bytes {start} to {stop} of {file.size}")
    tail_size = min(stop - start, _END.size + _LOCATOR.size + LIMIT16)  # the longest comment
    if file.read(stop - _END.size, 4) == b"PK\5\6":
        tail_size = min(stop - start, ENDS_SIZE)  # no comment: torch never writes one
    tail = file.read(stop - tail_size, tail_size)
    end = tail.rfind(b"PK\5\6")
    if end < 0 or end + _END.size > len(tail):
        raise _damaged(file, "it has no end record")
    _, disk, first_disk, _, count, size, offset, comment = _END.unpack_from(tail, end)
    if disk or first_disk or end + _END.size + comment != len(tail):
        raise _damaged(file, "its end record is not at the end, or of several disks")
    directory_end = stop - tail_size + end - start
    if end >= _LOCATOR.size and tail.startswith(b"PK\6\7", end - _LOCATOR.size):
        _, _, directory_end, _ = _LOCATOR.unpack_from(tail, end - _LOCATOR.size)
        if directory_end + _END64.size > stop - start:
            raise _damaged(file, f"its zip64 record would lie at {directory_end}")
        record = file.read(start + directory_end, _END64.size)
        magic, _, _, _, _, _, _, count, size, offset = _END64.unpack(record)
        if magic != b"PK\6\6":
            raise _damaged(file, "its zip64 record is missing")
    if offset + size > directory_end or size > MAX_DIRECTORY or count * _CENTRAL.size > size:
        raise _damaged(file, f"its directory would have {count} entries, {size} bytes, at {offset}")
    return offset, size, count


def _central_entry(file: SourceFile, data: bytes, position: int) -> tuple[int, str, int, int]:
    """Return the next position, and name, header offset and size of the member at ``position``."""
    try:
        fields = _CENTRAL.unpack_from(data, position)
    except struct.error as error:
        raise _damaged(file, "its directory is cut short") from error
    magic, _, _, flags, method, _, _, _, packed, size = fields[:10]
    name_size, extra_size, comment_size = fields[10:13]
    header = fields[16]
    name_start = position + _CENTRAL.size
    extra_start = name_start + name_size
    following = extra_start + extra_size + comment_size
    if magic != b"PK\1\2" or following > len(data):
        raise _damaged(file, "its directory is cut short")
    try:
        name = data[name_start:extra_start].decode()
    except UnicodeDecodeError as error:
        raise _damaged(file, "a member's name is not UTF-8") from error
    if LIMIT32 in (packed, size, header):
        extra = data[extra_start : extra_start + extra_size]
        size, packed, header = _zip64(file, name, extra, size, packed, header)
    if flags & _ENCRYPTED:
        raise FormatError(f"{file.path}: member {name!r} is encrypted; decrypt the archive first")
    if method or packed != size:
        raise FormatError(
            f"{file.path}: member {name!r} is compressed (method {method}), expected stored bytes; "
            f"load the file with torch and save it again with torch.save"
        )
    return following, name, header, size


def _zip64(
    file: SourceFile, name: str, extra: bytes, size: int, packed: int, header: int
) -> tuple[int, int, int]:
    """Replace the values that do not fit 32 bits by those of the zip64 field, in its order."""
    position = 0
    while position + _FIELD.size <= len(extra):
        kind, width = _FIELD.unpack_from(extra, position)
        position += _FIELD.size
        if kind == _ZIP64_FIELD:
            field = extra[position : position + width]
            values = iter([int.from_bytes(field[i : i + 8], "little") for i in range(0, width, 8)])
            wide = [next(values, -1) if v == LIMIT32 else v for v in (size, packed, header)]
            if -1 not in wide:
                return wide[0], wide[1], wide[2]
        position += width
    raise _damaged(file, f"member {name!r} lacks its zip64 sizes")


def _local_size(file: SourceFile, offset: int, name: str) -> int:
    """Return the bytes between a member's header and its payload, from the local header."""
    encoded = name.encode()
    header = file.read(offset, min(_LOCAL.size + len(encoded), file.size - offset))
    if len(header) < _LOCAL.size or header[_LOCAL.size :] != encoded:
        raise _damaged(file, f"member {name!r} has another name at its own place")
    fields = _LOCAL.unpack_from(header)
    if fields[0] != b"PK\3\4" or fields[9] != len(encoded):
        raise _damaged(file, f"member {name!r} has no header")
    extra: int = fields[10]
    return _LOCAL.size + len(encoded) + extra


class ArchiveWriter:
    """Collects the regions of one archive, bytes and tensors in file order.

    Members are in the folder ``root``, or in none if it is empty.

    With ``checksums`` off the CRC-32 of tensors is left 0, as torch's readers allow.
    """

    def __init__(self, root: str, *, checksums: bool = True) -> None:
        self._root = root
        self._checksums = checksums
        self._regions: list[Region] = []
        self._pending: list[bytes] = []
        self._pending_start = 0
        self._position = 0
        self._directory: list[bytes | Crc32] = []
        self._count = 0

    def add(self, member: NewMember) -> None:
        """Append a member."""
        name = (f"{self._root}/{member.name}" if self._root else member.name).encode()
        header, size = self._position, member.size
        place = [header] if header >= LIMIT32 else []
        wide = size >= LIMIT32
        zip64 = _zip64_field([size, size, *place] if wide else place)
        # miniz does not know the stored size yet when it writes the local header.
        local_zip64 = _zip64_field([size, 0, *place] if wide else place)
        flags = _UTF8_AND_DESCRIPTOR if size else _UTF8
        unpadded = header + _LOCAL.size + len(name) + len(zip64) + _FIELD.size
        padding = -unpadded % ALIGNMENT
        extra = local_zip64 + _FIELD.pack(_PADDING_FIELD, padding) + b"Z" * padding
        self._put(_LOCAL.pack(b"PK\3\4", 0, flags, *(0,) * 6, len(name), len(extra)))
        self._put(name + extra)
        crc = self._put_payload(member)
        if size:
            self._put(b"PK\7\x08")
            self._put_crc(crc)
            self._put((_DESCRIPTOR64 if zip64 else _DESCRIPTOR32).pack(size, size))
        entry = _CENTRAL.pack(
            *(b"PK\1\2", 0, 0, flags, 0, 0, 0, 0, min(size, LIMIT32), min(size, LIMIT32)),
            *(len(name), len(zip64), 0, 0, 0, 0, min(header, LIMIT32)),
        )
        self._directory += [entry[:16], crc, entry[20:] + name + zip64]
        self._count += 1

    def finish(self) -> tuple[int, list[Region]]:
        """Append directory and end records; return the archive's size in bytes and its regions."""
        start = self._position
        for part in self._directory:
            if isinstance(part, Crc32):
                self._put_crc(part)
            else:
                self._put(part)
        end, count = self._position, self._count
        size = end - start
        fields = (0, 0, count, count, size, start)
        self._put(_END64.pack(b"PK\6\6", _END64.size - 12, _MADE_BY, _NEEDED, *fields))
        self._put(_LOCATOR.pack(b"PK\6\7", 0, end, 1))
        short = min(count, LIMIT16)
        self._put(
            _END.pack(b"PK\5\6", 0, 0, short, short, min(size, LIMIT32), min(start, LIMIT32), 0)
        )
        self._flush()
        return self._position, self._regions

    def _put(self, data: bytes) -> None:
        self._pending.append(data)
        self._position += len(data)

    def _put_payload(self, member: NewMember) -> bytes | Crc32:
        """Append the payload; return its CRC-32, or where it will come from."""
        content, size = member.content, member.size - len(member.head)
        if isinstance(content, bytes) or not size:
            data = member.head + (content if isinstance(content, bytes) else b"")
            self._put(data)
            return zlib.crc32(data).to_bytes(4, "little")
        self._put(member.head)
        self._flush()
        number = len(self._regions)
        self._regions.append(Region(self._position, size, content, member.label))
        self._position += size
        self._pending_start = self._position
        return Crc32(number, member.head) if self._checksums else bytes(4)

    def _put_crc(self, crc: bytes | Crc32) -> None:
        if isinstance(crc, bytes):
            self._put(crc)
            return
        self._flush()
        self._regions.append(Region(self._position, 4, crc))
        self._position += 4
        self._pending_start = self._position

    def _flush(self) -> None:
        if data := b"".join(self._pending):
            self._regions.append(Region(self._pending_start, len(data), data))
        self._pending = []
        self._pending_start = self._position


def _zip64_field(values: Sequence[int]) -> bytes:
    if not values:
        return b""
    return struct.pack(f"<2H{len(values)}Q", _ZIP64_FIELD, 8 * len(values), *values)
