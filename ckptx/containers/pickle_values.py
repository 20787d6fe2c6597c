"""What ckptx puts in place of the foreign objects of a pickle: plain, inert, picklable values.

Nothing here imports or runs the class it stands for. Classes that a pickle may address refuse new
attributes: a BUILD opcode must not be able to change the program that reads it.
"""

from __future__ import annotations

import argparse
import copyreg
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias, TypeVar

from ckptx.tensors.dtypes import ITEMSIZE
from ckptx.tensors.lazy import Shape


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the cycle collector while millions of objects are made that all stay.

    It would walk them again and again: 60% of the time to read a large ``.metadata``.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


_Rebuilt: TypeAlias = tuple[Any, tuple[Any, ...]]
_T = TypeVar("_T")


class FrozenClass(type):
    """Metaclass of the classes that pickles get to see: their attributes never change."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise TypeError(f"a pickle tried to set {name!r} of {cls.__name__}")

    def __delattr__(cls, name: str) -> None:
        raise TypeError(f"a pickle tried to delete {name!r} of {cls.__name__}")


class StubClass(FrozenClass):
    """The class of a foreign global: remembers ``module`` and ``name``, makes `Record` objects."""

    module: str
    name: str

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Stand for a call of the global: an enum member by its value, or a `Record`."""
        enum_like = len(args) == 1 and not kwargs and type(args[0]) in (int, str)
        if enum_like and cls.module.partition(".")[0] not in _CALLABLE_WITH_ONE_VALUE:
            return EnumValue(cls.module, cls.name, args[0])
        kind: Any = cls
        return kind.__new__(kind, *args, **kwargs)

    def __repr__(cls) -> str:
        return f"<stub of {cls.module}.{cls.name}>"


# Their classes take one plain argument without being enums: torch.device("cpu"), Path("a").
_CALLABLE_WITH_ONE_VALUE = frozenset({"torch", "numpy", "pathlib", "datetime", "uuid", "_io"})


MAX_ARGUMENTS = 255
"""Of a call: they are copied, and a pickle can give the same ones to many."""


class Record(metaclass=StubClass):
    """An object of a foreign class: what it was made from, nothing of what it does.

    Attributes:
        args: positional arguments of its constructor or rebuild function.
        kwargs: keyword arguments of the same.
        state: the argument of BUILD: a dictionary of attributes, or whatever ``__getstate__`` gave.
        items: values that were appended to it.
        pairs: keys and values that were set on it.
    """

    __slots__ = ("args", "items", "kwargs", "pairs", "state")
    module = ""
    name = ""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Any
    items: list[Any]
    pairs: list[tuple[Any, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Record:
        """Stand for NEWOBJ, which makes an object without initialising it."""
        if len(args) > MAX_ARGUMENTS:
            raise TypeError(f"a call has more than {MAX_ARGUMENTS} arguments")
        record = object.__new__(cls)
        record.args = args
        record.kwargs = kwargs
        record.state = None
        record.items = []
        record.pairs = []
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.pairs.append((key, value))

    def append(self, value: Any) -> None:
        """Stand for ``list.append`` of the foreign class."""
        self.items.append(value)

    def extend(self, values: list[Any]) -> None:
        """Stand for ``list.extend`` of the foreign class."""
        self.items.extend(values)

    def add(self, value: Any) -> None:
        """Stand for ``set.add`` of the foreign class."""
        self.items.append(value)

    def __repr__(self) -> str:
        return f"<{type(self).module}.{type(self).name} record>"

    def __reduce__(self) -> tuple[Any, ...]:
        made = (type(self), self.args, self.kwargs)
        return _restored, (*made, self.state, self.items, self.pairs)


def _restored(kind: type[Record], args: Any, kwargs: Any, *rest: Any) -> Record:
    record = Record.__new__(kind, *args, **kwargs)
    record.state, record.items, record.pairs = rest
    return record


@lru_cache(maxsize=65536)
def stub(module: str, name: str) -> type[Record]:
    """Return the stand-in class of a global; one class per global."""
    made: Any = StubClass(name, (Record,), {"__slots__": (), "module": module, "name": name})
    return made  # type: ignore[no-any-return]  # a class by its metaclass


copyreg.pickle(StubClass, lambda cls: (stub, (cls.module, cls.name)))


def _sealed(cls: type[_T]) -> type[_T]:
    """Return a class whose values are whole when they are made, and take no state.

    Frozen dataclasses with slots have a ``__setstate__`` of their own, which sets every field
    unchecked; before Python 3.11.3 it goes before one that the class itself has.
    """
    cls.__setstate__ = _refuse_state  # type: ignore[attr-defined]
    return cls


def _refuse_state(value: object, state: object) -> None:
    raise TypeError(f"a pickle tried to set the state of a {type(value).__name__}")


class Namespace(argparse.Namespace, metaclass=FrozenClass):
    """An `argparse.Namespace` or `types.SimpleNamespace`, as Megatron's ``args``."""

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict) or not all(type(name) is str for name in state):
            raise TypeError("the state of a namespace is no dictionary of names")
        vars(self).update(state)


class TorchSize(tuple[int, ...], metaclass=FrozenClass):
    """A `torch.Size`: equal to the tuple of its numbers."""

    __slots__ = ()

    def __reduce__(self) -> _Rebuilt:
        return TorchSize, (tuple(self),)


class UnhashableTuple(tuple[Any, ...]):
    """A tuple that is too large for a key: its hash is computed anew whenever it is asked for."""

    __slots__ = ()

    def __hash__(self) -> int:
        raise TypeError("a tuple that is too large, or shared too often, is a key")


@_sealed
@dataclass(frozen=True, slots=True)
class TorchDtype:
    """A `torch.dtype` as a value, by its torch name."""

    name: str

    def __reduce__(self) -> _Rebuilt:
        return TorchDtype, (self.name,)


@_sealed
@dataclass(frozen=True, slots=True)
class EnumValue:
    """A member of a foreign enum: ``EnumValue("signal", "Signals", 15)``."""

    module: str
    name: str
    value: int | str

    def __reduce__(self) -> _Rebuilt:
        return EnumValue, (self.module, self.name, self.value)


class Global(NamedTuple):
    """A class or function to be written by its name alone."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """A value to be written as the result of calling ``function`` with ``args``.

    Unless ``state`` is None the result is then given it, as ``__setstate__`` takes it.
    """

    function: Global
    args: tuple[Any, ...]
    state: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class Instance:
    """An object to be written as ``cls.__new__(cls, *args)``, with ``state`` unless that is None.

    Instances are compared by identity, so that they may be keys whatever their state. One that is
    ``shared`` is written where it is met first, and referred to from elsewhere.
    """

    cls: Global
    state: Any
    args: tuple[Any, ...] = ()
    shared: bool = False


class RowList(NamedTuple):
    """A list to be written, of objects of one class whose attributes are ``rows``.

    Like `Instance` objects, and made faster: metadata has a million of them.
    """

    cls: Global
    names: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]


class Rows(NamedTuple):
    """Entries of a dictionary whose keys and values are objects of one class each.

    Each of ``rows`` has the attributes of a key and then those of its value: whole numbers, and
    strings and sizes that come again and again.
    """

    key: Global
    key_names: tuple[str, ...]
    value: Global
    value_names: tuple[str, ...]
    rows: Sequence[tuple[int | str | TorchSize | None, ...]]


class RowMap(tuple[Rows, ...]):
    """A dictionary to be written, of such entries."""

    __slots__ = ()


@_sealed
@dataclass(frozen=True, slots=True)
class StorageRef:
    """A reference to a storage: the file ``data/<key>`` of the archive.

    ``dtype`` is None for an untyped storage.
    """

    dtype: str | None
    key: str
    nbytes: int


@_sealed
@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor of a pickle. Offset and strides count elements, ``storage_nbytes`` bytes.

    ``parameter`` marks `torch.nn.Parameter` objects, which are otherwise treated as their tensor.
    """

    dtype: str
    shape: Shape
    strides: Shape
    storage_offset: int
    key: str
    storage_nbytes: int
    requires_grad: bool = False
    parameter: bool = False


STORAGE_CLASSES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
}
"""Classes of module ``torch`` by dtype; other dtypes are stored untyped.

Source: torch:torch/storage.py@v2.13.0 `_dtype_to_storage_type_map`.
"""

WIDTHS = {**ITEMSIZE, "complex128": 16}
"""Bytes per element of what may stand in a pickle, more than ckptx converts."""

TORCH_DTYPES = {
    *ITEMSIZE,
    *("complex32", "complex128", "quint8", "qint8", "qint32", "quint4x2", "quint2x4"),
    *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
    *("half", "float", "double", "long", "int", "short", "cfloat", "cdouble", "chalf"),
}
"""Names of `torch` that are dtypes; a pickle uses the long ones."""
