"""Faults to inject: what copying, disks and people do to checkpoints."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

from ckptx.protocol.messages import Message, Tensors


def truncate(path: Path, keep: float = 0.5) -> None:
    """Cut a file to a part of its size; at least one byte goes."""
    size = path.stat().st_size
    os.truncate(path, max(0, min(size - 1, int(size * keep))))


def flip(path: Path, offset: int, mask: int = 0xFF) -> None:
    """Invert the bits of ``mask`` in the byte at ``offset``; negative counts from the end."""
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)


def drop(path: Path) -> None:
    """Remove a file or a directory."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def duplicate(path: Path, name: str) -> Path:
    """Copy a file beside itself under another name and return the copy."""
    return Path(shutil.copy(path, path.with_name(name)))


@contextmanager
def failing_reads(after: int, code: int = errno.EIO) -> Iterator[None]:
    """Let tensor reads of this process fail with an error once ``after`` bytes were read."""
    genuine, lock, left = os.preadv, threading.Lock(), after

    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        nonlocal left
        with lock:
            left -= sum(len(buffer) for buffer in buffers)
            if left < 0:
                raise OSError(code, os.strerror(code))
        return genuine(descriptor, buffers, offset, flags)

    with mock.patch.object(os, "preadv", preadv):
        yield


def _unknown_message(sent: list[Message]) -> list[Message]:
    return [*sent[:-1], _renamed(sent[-2], "lm head of mine"), sent[-1]]


def _unknown_key(sent: list[Message]) -> list[Message]:
    return _with_key(sent, "mystery weight")


def _known_key_of_other_models(sent: list[Message]) -> list[Message]:
    return _with_key(sent, "post norm bias")


def _message_missing(sent: list[Message]) -> list[Message]:
    return [sent[0], *sent[2:]]


def _layer_missing(sent: list[Message]) -> list[Message]:
    return [m for m in sent if not isinstance(m, Tensors) or m.name != "transformer layer 1"]


def _key_missing(sent: list[Message]) -> list[Message]:
    layer = sent[2]
    assert isinstance(layer, Tensors)
    less = {key: tensor for key, tensor in layer.tensors.items() if key != "dense weight"}
    return [*sent[:2], Tensors(layer.name, less), *sent[3:]]


def _message_twice(sent: list[Message]) -> list[Message]:
    return [*sent[:-1], *sent[-2:]]


def _begin_twice(sent: list[Message]) -> list[Message]:
    return [sent[0], *sent]


def _no_begin(sent: list[Message]) -> list[Message]:
    # The proof needs a Begin; that it comes too late is for the saver to see.
    return [*sent[1:], sent[0]]


def _no_end(sent: list[Message]) -> list[Message]:
    return sent[:-1]


def _nothing(sent: list[Message]) -> list[Message]:
    return [sent[0], sent[-1]]


def _another_state(sent: list[Message]) -> list[Message]:
    first = sent[1]
    assert isinstance(first, Tensors)
    return [sent[0], replace(first, state="exp_avg"), *sent[2:]]


def _renamed(message: Message, name: str) -> Tensors:
    assert isinstance(message, Tensors)
    return Tensors(name, message.tensors)


def _with_key(sent: list[Message], key: str) -> list[Message]:
    layer = sent[2]
    assert isinstance(layer, Tensors)
    norm = layer.tensors["input norm weight"]
    return [*sent[:2], Tensors(layer.name, {**layer.tensors, key: norm}), *sent[3:]]


CHANGES = (
    _another_state,
    _unknown_message,
    _unknown_key,
    _known_key_of_other_models,
    _message_missing,
    _layer_missing,
    _key_missing,
    _message_twice,
    _begin_twice,
    _no_begin,
    _no_end,
    _nothing,
)
"""What a saver must refuse of messages, each a function of them."""
