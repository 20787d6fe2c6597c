"""Change the dtype of the tensors between a loader and a saver (``--dtype``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from ckptx.model.canonical_names import keys_of
from ckptx.protocol.messages import Begin, Message, Tensors
from ckptx.tensors.dtypes import FLOATS, dtype_name
from ckptx.tensors.lazy import LazyTensor


def cast_messages(messages: Iterable[Message], dtype: str | None) -> Iterator[Message]:
    """Yield the messages with every floating-point tensor in ``dtype``; None leaves all as stored.

    Integers stay, and so do tensors that the vocabulary pins to their dtype.
    """
    if dtype is None:
        yield from messages
        return
    dtype = dtype_name(dtype)
    for message in messages:
        match message:
            case Begin():
                parts = {name: replace(spec, dtype=dtype) for name, spec in message.parts.items()}
                yield replace(message, parts=parts)
            case Tensors():
                pinned = {key.name for key in keys_of(message.name).values() if key.pinned}
                yield replace(
                    message,
                    tensors={
                        name: tensor if name in pinned else cast_float(tensor, dtype)
                        for name, tensor in message.tensors.items()
                    },
                )
            case _:
                yield message


def cast_float(tensor: LazyTensor, dtype: str) -> LazyTensor:
    """Return a floating-point tensor in ``dtype``, any other as it is."""
    return tensor.cast(dtype) if tensor.dtype in FLOATS else tensor
