"""Items of a DCP file that `ZStandard`, an extension of its writer, has compressed as a stream.

Source: torch:torch/distributed/checkpoint/_extension.py @ v2.13.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from ckptx.errors import FormatError
from ckptx.storage.source_file import SourceFile

_NAME, _VERSION = "stream.zstd", "1"
_BLOCK = 1 << 20  # bytes
_WINDOW = 1 << 27  # bytes; zstd's own limit for what it decodes unasked


def is_zstd(transforms: tuple[str, ...]) -> bool:
    """Return whether descriptors say one stream of zstd, of a version that is known."""
    name, _, version = str(transforms[0]).partition("/") if len(transforms) == 1 else ("", "", "")
    return name == _NAME and version.partition(".")[0] == _VERSION


def decoded(file: SourceFile, offset: int, length: int, limit: int) -> Iterator[bytes]:
    """Yield what ``length`` bytes from ``offset`` on decode to, in blocks.

    Raises:
        FormatError: the library is missing, the stream is damaged, or holds over ``limit`` bytes.
    """
    try:
        zstandard: Any = import_module("zstandard")
    except ImportError as error:
        raise FormatError(
            f"{file.path}: is compressed with zstd; install what decodes it: pip install zstandard"
        ) from error
    decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
    total = 0
    try:
        with decompressor.stream_reader(_Span(file, offset, length)) as stream:
            while block := stream.read(_BLOCK):
                total += len(block)
                if total > limit:
                    raise FormatError(
                        f"{file.path}: the item at byte {offset} decodes to more than the {limit} "
                        "bytes that .metadata says; the file is damaged"
                    )
                yield block
    except zstandard.ZstdError as error:
        raise FormatError(
            f"{file.path}: the item at byte {offset} is no whole zstd stream: {error}"
        ) from error


class _Span:
    """A part of a file, to be read once from its start."""

    def __init__(self, file: SourceFile, offset: int, length: int) -> None:
        self._file, self._offset, self._stop = file, offset, offset + length

    def read(self, size: int = -1) -> bytes:
        rest = self._stop - self._offset
        data = self._file.read(self._offset, rest if size < 0 else min(size, rest))
        self._offset += len(data)
        return data
