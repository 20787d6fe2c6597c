"""Write pickles of plain values, tensors and foreign classes, importing none of them.

The opcodes are those of torch's own files (protocol 2), so that ``torch.load(weights_only=True)``
accepts the result. Output is a function of the value alone: sets are sorted, equal strings are
memoised by value, and nothing depends on object identity.
"""

from __future__ import annotations

import argparse
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ckptx.containers import pickle_values
from ckptx.containers.pickle_values import Global, Instance, TensorRecord, TorchSize
from ckptx.errors import PlanError
from ckptx.tensors.lazy import LazyTensor

_U32 = struct.Struct("<I")
_I32 = struct.Struct("<i")
_FLOAT = struct.Struct(">d")

_REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_WITH_DTYPE = Global("torch._utils", "_rebuild_tensor_v3")
_REBUILD_PARAMETER = Global("torch._utils", "_rebuild_parameter")
_UNTYPED = Global("torch.storage", "UntypedStorage")
_ORDERED = Global("collections", "OrderedDict")
_ENCODE = Global("_codecs", "encode")
_SET = Global("__builtin__", "set")
_SIZE = Global("torch", "Size")
_NAMESPACE = Global("argparse", "Namespace")
_STORAGES = {dtype: Global("torch", name) for dtype, name in pickle_values.STORAGE_CLASSES.items()}


def dumps(value: Any, tensor: Callable[[LazyTensor], TensorRecord] | None = None) -> bytes:
    """Return the pickle of a value.

    Args:
        value: None, bool, int, float, str, bytes, list, tuple, dict, OrderedDict, set, Namespace
            and the types of `ckptx.containers.pickle_values`, nested at will.
        tensor: gives lazy tensors their storage; called for every occurrence, in order.

    Raises:
        PlanError: something else is in it.
    """
    writer = _Writer(tensor)
    try:
        with pickle_values.collector_paused():
            writer.emit(value)
    except RecursionError as error:
        raise PlanError("a value to be pickled is nested too deeply, or holds itself") from error
    writer.out += b"."
    return bytes(writer.out)


class _Writer:
    """Appends opcodes to ``out``."""

    def __init__(self, tensor: Callable[[LazyTensor], TensorRecord] | None) -> None:
        self.out = bytearray(b"\x80\x02")
        self._write = self.out.__iadd__
        self._tensor = tensor
        # The opcodes that fetch what was written before.
        self._memo: dict[str | Global | TorchSize, bytes] = {}
        self._shared: dict[Instance, bytes] = {}
        self._puts = 0
        self._around: dict[tuple[Global, tuple[str, ...]], list[bytes]] = {}
        self._emitters: dict[type, Callable[[Any], object]] = {
            type(None): lambda _: self._write(b"N"),
            bool: lambda value: self._write(b"\x88" if value else b"\x89"),
            int: self._int,
            float: lambda value: self._write(b"G" + _FLOAT.pack(value)),
            str: self._str,
            bytes: lambda value: self._call(_ENCODE, (value.decode("latin1"), "latin1")),
            list: self._list,
            tuple: self._tuple,
            dict: self._dict,
            OrderedDict: self._ordered,
            set: lambda value: self._call(_SET, (sorted(value, key=_set_order),)),
            pickle_values.Namespace: self._namespace,
            argparse.Namespace: self._namespace,
            Global: self._global,
            pickle_values.Call: self._called,
            pickle_values.EnumValue: lambda value: self._call(
                Global(value.module, value.name), (value.value,)
            ),
            Instance: self._instance,
            pickle_values.TorchDtype: lambda value: self._global(Global("torch", value.name)),
            TorchSize: self._size,
            TensorRecord: self._record,
            pickle_values.RowList: self._row_list,
            pickle_values.RowMap: self._row_map,
        }

    def emit(self, value: Any) -> None:
        """Append the opcodes that push ``value``."""
        if (emitter := self._emitters.get(type(value))) is not None:
            emitter(value)
        elif isinstance(value, LazyTensor) and self._tensor is not None:
            self._record(self._tensor(value))
        else:
            kind = type(value)
            raise PlanError(
                f"a {kind.__module__}.{kind.__qualname__} cannot be stored in a checkpoint; "
                f"expected plain values, tensors or a Namespace of them"
            )

    def _put(self) -> bytes:
        """Store the top of the stack in the memo; return the opcodes that fetch it again."""
        number = self._puts
        self._puts += 1
        if number < 256:
            self._write(b"q%c" % number)
            return b"h%c" % number
        packed = _U32.pack(number)
        self._write(b"r" + packed)
        return b"j" + packed

    def _str(self, value: str) -> None:
        if (get := self._memo.get(value)) is not None:
            self._write(get)
            return
        data = value.encode("utf-8", "surrogatepass")
        self._write(b"X" + _U32.pack(len(data)) + data)
        self._memo[value] = self._put()

    def _global(self, value: Global) -> None:
        if (get := self._memo.get(value)) is not None:
            self._write(get)
            return
        if "\n" in value.module + value.name:
            raise PlanError(f"{value} cannot be the name of a class")
        self._write(f"c{value.module}\n{value.name}\n".encode())
        self._memo[value] = self._put()

    def _int(self, value: int) -> None:
        self._write(_BYTE_INTS[value] if 0 <= value < 256 else _int_opcode(value))

    def _list(self, value: Sequence[Any]) -> None:
        self._write(b"]")
        if value:
            self._write(b"(")
            for item in value:
                self.emit(item)
            self._write(b"e")

    def _tuple(self, value: tuple[Any, ...]) -> None:
        if len(value) > 3:
            self._write(b"(")
        for item in value:
            self.emit(item)
        self._write((b")", b"\x85", b"\x86", b"\x87")[len(value)] if len(value) < 4 else b"t")

    def _dict(self, value: Mapping[Any, Any]) -> None:
        self._write(b"}")
        self._pairs(value)

    def _ordered(self, value: Mapping[Any, Any]) -> None:
        self._call(_ORDERED, ())
        self._pairs(value)

    def _pairs(self, value: Mapping[Any, Any]) -> None:
        if not value:
            return
        emit = self.emit
        self._write(b"(")
        for key, item in value.items():
            emit(key)
            emit(item)
        self._write(b"u")

    def _call(self, function: Global, args: tuple[Any, ...]) -> None:
        self._global(function)
        self._tuple(args)
        self._write(b"R")

    def _called(self, value: pickle_values.Call) -> None:
        self._call(value.function, value.args)
        if value.state is not None:
            self.emit(value.state)
            self._write(b"b")

    def _instance(self, value: Instance) -> None:
        if value.shared and (get := self._shared.get(value)) is not None:
            self._write(get)
            return
        state = value.state
        plain = type(state) is dict and state and all(type(name) is str for name in state)
        if plain and not value.args:
            self._fields(value.cls, tuple(state), state.values())
        else:
            self._global(value.cls)
            self._tuple(value.args)
            self._write(b"\x81")
            if state is not None:
                self.emit(state)
                self._write(b"b")
        if value.shared:
            self._shared[value] = self._put()

    def _fields(self, cls: Global, names: tuple[str, ...], values: Iterable[Any]) -> None:
        """Push an object and its attributes; the opcodes around them are made once per class."""
        write, memo = self._write, self._memo
        if (around := self._around.get((cls, names))) is None:
            self._global(cls)
            write(b")\x81")
            self._dict(dict(zip(names, values, strict=True)))
            write(b"b")
            around = [memo[name] for name in names]
            around[0] = memo[cls] + b")\x81}(" + around[0]
            self._around[cls, names] = around
            return
        for opcodes, item in zip(around, values, strict=True):
            kind = type(item)
            if kind is int:
                write(opcodes)
                write(_BYTE_INTS[item] if 0 <= item < 256 else _int_opcode(item))
                continue
            known = memo.get(item) if kind is TorchSize or kind is str else None
            write(opcodes)
            if known is None:
                self.emit(item)
            else:
                write(known)
        write(b"ub")

    def _row_list(self, value: pickle_values.RowList) -> None:
        self._write(b"]")
        if value.rows:
            self._write(b"(")
            first, *others = value.rows
            self._fields(value.cls, value.names, first)
            self._repeated(self._around[value.cls, value.names], others)
            self._write(b"e")

    def _row_map(self, value: pickle_values.RowMap) -> None:
        self._write(b"}(")
        for entries in value:
            if entries.rows:
                self._rows(entries)
        self._write(b"u")

    def _rows(self, entries: pickle_values.Rows) -> None:
        """Push keys and values in turn; all but the first are mostly fetched from the memo."""
        width = len(entries.key_names)
        first, *others = entries.rows
        self._fields(entries.key, entries.key_names, first[:width])
        self._fields(entries.value, entries.value_names, first[width:])
        around = [
            *self._around[entries.key, entries.key_names],
            *self._around[entries.value, entries.value_names],
        ]
        around[width] = b"ub" + around[width]
        self._repeated(around, others)

    def _repeated(self, around: Sequence[bytes], rows: Sequence[tuple[Any, ...]]) -> None:
        """Push objects whose classes and attributes have been pushed; half a million are usual.

        What a column has had before is fetched with the opcodes that go before it.
        """
        columns: list[tuple[bytes, dict[Any, bytes]]] = [(opcodes, {}) for opcodes in around]
        memo, out = self._memo, self.out
        for row in rows:
            for (opcodes, seen), item in zip(columns, row, strict=True):
                if (code := seen.get(item)) is None:
                    if type(item) is int:
                        code = opcodes + (
                            _BYTE_INTS[item] if 0 <= item < 256 else _int_opcode(item)
                        )
                    elif item in memo:
                        code = opcodes + memo[item]
                    else:
                        out += opcodes
                        self.emit(item)
                        continue
                    if len(seen) < _MOST_SEEN:
                        seen[item] = code
                out += code
            out += b"ub"

    def _namespace(self, value: argparse.Namespace) -> None:
        self._instance(Instance(_NAMESPACE, vars(value)))

    def _size(self, value: TorchSize) -> None:
        if (get := self._memo.get(value)) is None:
            self._call(_SIZE, (tuple(value),))
            self._memo[value] = self._put()
        else:
            self._write(get)

    def _record(self, value: TensorRecord) -> None:
        if value.parameter:
            self._global(_REBUILD_PARAMETER)
            self._rebuilt(value, requires_grad=False)
            self.emit(value.requires_grad)
            self._call(_ORDERED, ())
            self._write(b"\x87R")
        else:
            self._rebuilt(value, value.requires_grad)

    def _rebuilt(self, value: TensorRecord, requires_grad: bool) -> None:
        storage = _STORAGES.get(value.dtype)
        self._global(_REBUILD_WITH_DTYPE if storage is None else _REBUILD)
        self._write(b"((")
        self._str("storage")
        self._global(_UNTYPED if storage is None else storage)
        self._str(value.key)
        self._str("cpu")
        width = 1 if storage is None else pickle_values.WIDTHS[value.dtype]
        self._int(value.storage_nbytes // width)
        self._write(b"tQ")
        self._int(value.storage_offset)
        self._tuple(value.shape)
        self._tuple(value.strides)
        self.emit(requires_grad)
        self._call(_ORDERED, ())
        if storage is None:
            self._global(Global("torch", value.dtype))
        self._write(b"tR")


_MOST_SEEN = 1 << 16
_BYTE_INTS = [b"K%c" % value for value in range(256)]


def _int_opcode(value: int) -> bytes:
    if 0 <= value < 65536:
        return b"M%c%c" % (value & 255, value >> 8)
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + _I32.pack(value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    if len(data) < 256:
        return b"\x8a%c" % len(data) + data
    return b"\x8b" + _U32.pack(len(data)) + data


def _set_order(value: Any) -> tuple[str, Any]:
    """Sort the members of a set, whose own order depends on the hash seed."""
    return type(value).__name__, value
