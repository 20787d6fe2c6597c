"""Change the dtype of the tensors between a loader and a saver (``--dtype``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from ckptx.errors import PlanError
from ckptx.lazy import LazyTensor
from ckptx.protocol import Begin, Message, Tensors
from ckptx.vocabulary import keys_of

DTYPES = ("float32", "bfloat16", "float16")
"""The dtypes that a model can be cast to."""

_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
_FLOATS = {"float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"}


def dtype_name(name: str) -> str:
    """Return a dtype by its usual spellings (``bf16``, ``torch.bfloat16``).

    Raises:
        PlanError: it is none that a model can be cast to.
    """
    known = name.removeprefix("torch.")
    known = _ALIASES.get(known, known)
    if known not in DTYPES:
        raise PlanError(f"cannot convert to dtype {name!r}; known: {', '.join(DTYPES)}")
    return known


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
    return tensor.cast(dtype) if tensor.dtype in _FLOATS else tensor
