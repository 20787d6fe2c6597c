"""Read pickles without running them: no import, no foreign call, no unbounded allocation.

`loads` first walks the opcodes (`ckptx.containers.pickle_scan`), then lets the C unpickler build
plain values, with every global resolved by a table to a stand-in of
`ckptx.containers.pickle_values`. Each tuple that is not small is shown to `_Weights` when it is
built, before anything can hash it.

What is left: a pickle of N bytes builds at most some 500 N bytes of objects, and keys that are made
to collide cost time that grows with the square of their number.
"""

from __future__ import annotations

import pickle
import re
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from ckptx.containers import pickle_values
from ckptx.containers.pickle_scan import SMALL, WEIGH, scan
from ckptx.containers.pickle_values import Record, StorageRef, TensorRecord, TorchSize, stub
from ckptx.errors import FormatError
from ckptx.tensors.lazy import MAX_AXES

MAX_PICKLE = 512 << 20  # bytes; the .metadata of a million chunks has about 150 MiB

MAX_KEY = 1000
"""Values in a tuple that may be a key, those of tuples in it included, as often as they occur."""

MAX_TUPLE_DEPTH = 100
"""How deep tuples and frozen sets may nest."""

KNOWN_GLOBALS = {
    *("_io.BytesIO", "io.BytesIO", "signal.Signals", "uuid.UUID", "enum.Enum"),
    *("decimal.Decimal", "collections.defaultdict", "collections.Counter"),
    *("collections.deque", "functools.partial"),
    *("pathlib.PosixPath", "pathlib.Path", "pathlib.PurePosixPath", "pathlib.WindowsPath"),
    *("pathlib._local.PosixPath", "pathlib._local.Path", "fractions.Fraction"),
    *("datetime.datetime", "datetime.date", "datetime.timedelta", "datetime.timezone"),
    *(f"builtins.{name}" for name in ("int", "float", "bool", "str", "list", "dict", "tuple")),
    *(f"builtins.{name}" for name in ("object", "slice", "range", "type", "NoneType")),
}
"""Globals of the standard library that become stubs; those of other packages all do.

What could do harm is in the standard library. Checkpoints hold objects of whatever their trainer
was made of, which nobody can list: they are records here, and nothing of theirs runs.
"""

FORBIDDEN = re.compile(
    r"(builtins\.(eval|exec|compile|open|input|__import__|setattr|delattr|globals|locals|vars|map"
    r"|filter|breakpoint|memoryview|apply|execfile|print|exit|quit)"
    r"|_?io\.(open|open_code|FileIO)"
    r"|(os|posix|nt|sys|subprocess|shutil|socket|ctypes|importlib|imp|runpy|pty|code|codeop|commands"
    r"|multiprocessing|threading|asyncio|webbrowser|platform|pickle|_pickle|marshal|types|operator"
    r"|_operator|inspect|tempfile|pdb|bdb|timeit|cProfile|profile|doctest|ssl|urllib|http|requests"
    r"|aiohttp|httplib|ftplib|smtplib|pip|setuptools|distutils|pydoc|venv|zipimport|pkgutil|builtins\.__.*)(\..*)?)"
)
"""Globals that are refused by a clearer message: no checkpoint needs one."""

_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+", re.ASCII)


class _Function(metaclass=pickle_values.FrozenClass):
    """A function that pickles may call; like its class, it cannot be changed by them."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setattr__(self, name: str, value: object) -> None:
        raise TypeError(f"a pickle tried to set {name!r} of a function")


def loads(data: bytes, *, file: str, limit: int = MAX_PICKLE) -> Any:
    """Return the object of a pickle, with stand-ins for whatever is foreign.

    Args:
        data: the pickle, protocol 2 to 5; what follows its STOP is ignored.
        file: named in errors.
        limit: the largest pickle to read, in bytes.

    Raises:
        FormatError: a global of the standard library that no checkpoint needs, or a pickle that
            is damaged or hostile.
    """
    if len(data) > limit:
        raise FormatError(
            f"{file}: expected a pickle of at most {limit} bytes, found {len(data)}; "
            f"tensors belong outside of it"
        )
    stream, calls = scan(data, file)
    try:
        with pickle_values.collector_paused():
            return _Unpickler(stream, calls, file).load()
    except FormatError:
        raise
    except RecursionError as error:
        raise FormatError(f"{file}: the pickle is nested too deeply") from error
    except Exception as error:  # a hostile pickle can make the unpickler raise anything
        raise FormatError(
            f"{file}: expected a readable pickle, found {type(error).__name__}: "
            f"{str(error)[:200]}; the file is damaged or no checkpoint"
        ) from error


class _Whole:
    """A file that is read by one look at all of it.

    The unpickler would call `read` for every opcode that is in no frame (all of protocol 2), and
    lose what lies across the end of one that `scan` has made longer than it says.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data

    def peek(self, _size: int) -> bytes:
        """Return the whole, once."""
        data, self._data = self._data, b""
        return data

    def read(self, _size: int) -> bytes:
        """Return nothing: it has been seen."""
        return b""

    def readline(self) -> bytes:
        """Return nothing: it has been seen."""
        return b""


class _Unpickler(pickle.Unpickler):
    """Builds values from a stream that `scan` has prepared."""

    def __init__(self, data: bytes, calls: bytearray, file: str) -> None:
        super().__init__(_Whole(data), encoding="utf-8")  # as torch.load reads Python 2
        self._calls = iter(calls)
        self._copies = 4 * len(data)  # each value that is there takes a byte or more
        self._checked = _Weights(file).checked
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a global; never imports."""
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        full = f"{module}.{name}"
        known = _TABLE.get(full)
        if isinstance(known, _Copying):
            return _Function(partial(self._copied, known))
        if known is not None:
            return known
        if module == "torch" and name in pickle_values.TORCH_DTYPES:
            return pickle_values.TorchDtype(name)
        if FORBIDDEN.fullmatch(full):
            raise FormatError(
                f"{self._file}: the pickle calls {full!r}, which no checkpoint needs; nothing was "
                f"run; do not load this file with other tools"
            )
        package = module.partition(".")[0]
        own = package in sys.stdlib_module_names or package == "ckptx"
        if full in KNOWN_GLOBALS or (not own and _DOTTED.fullmatch(full)):
            return stub(module, name)
        raise FormatError(
            f"{self._file}: the pickle holds {full!r:.200}, which is not on the allow-list of "
            f"{'its package' if own else 'names'}; nothing was run"
        )

    def _copied(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call what copies its arguments, which the memo can hand to it again and again."""
        self._copies -= sum(len(arg) for arg in args if hasattr(arg, "__len__"))
        if self._copies < 0:
            raise TypeError("the same values are copied again and again")
        made = function(*args)
        return self._checked(made) if type(made) is frozenset else made

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage of torch's ``("storage", class, key, device, numel)``.

        Or, where `scan` wants that: the tuple or frozen set that was just built.
        """
        if next(self._calls) == WEIGH:
            return self._checked(pid)
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise FormatError(
                f"{self._file}: a persistent id is not torch's ('storage', ...) tuple"
            )
        _, kind, key, device, numel = pid
        plain = type(key) is str and type(device) is str and type(numel) is int
        if not isinstance(kind, _StorageClass) or not plain:
            raise FormatError(f"{self._file}: a storage reference is malformed")
        width = 1 if kind.dtype is None else pickle_values.WIDTHS[kind.dtype]
        return StorageRef(kind.dtype, key, numel * width)


class _Weights:
    """Knows how many values the tuples and frozen sets of a pickle hold, and how deep."""

    def __init__(self, file: str) -> None:
        self._file = file
        # By identity; holds the containers too, lest their ids be used again.
        self._known: dict[int, tuple[Any, int, int]] = {}

    def checked(self, value: Any) -> Any:
        """Return a new tuple or frozen set, or one like it that cannot be hashed if it is large.

        Raises:
            FormatError: it is nested too deeply.
        """
        size, depth = self._weigh(value)
        if size <= SMALL:
            return value
        if depth > MAX_TUPLE_DEPTH:
            raise FormatError(
                f"{self._file}: found tuples nested over {MAX_TUPLE_DEPTH} deep; "
                f"no checkpoint is like that"
            )
        if size <= MAX_KEY:
            return value
        large = set(value) if type(value) is frozenset else pickle_values.UnhashableTuple(value)
        self._known[id(large)] = large, size, depth
        return large

    def _weigh(self, value: Any) -> tuple[int, int]:
        size, depth = len(value), 1
        for item in value:
            if isinstance(item, tuple | frozenset):
                known = self._known.get(id(item))
                inner, below = self._weigh(item) if known is None else known[1:]
                size += inner
                depth = max(depth, below + 1)
        if size > SMALL:  # so one that is not known takes a few steps
            self._known[id(value)] = value, size, depth
        return size, depth


class _StorageClass(_Function):
    """A storage class of torch, known by its element type; None is untyped."""

    __slots__ = ("dtype",)
    dtype: str | None

    def __init__(self, dtype: str | None) -> None:
        super().__init__(self._refuse)
        object.__setattr__(self, "dtype", dtype)

    @staticmethod
    def _refuse(*_: Any) -> None:
        raise TypeError("a storage is stored beside the pickle, not in it")


class _Copying(_Function):
    """A function whose result has as many values, or bytes, as its argument."""

    __slots__ = ()


class _SizeClass(_Function):
    """Stands for `torch.Size`; a tuple that cannot be hashed does not become one that can."""

    __slots__ = ()

    def __call__(self, values: Any = ()) -> TorchSize:
        if type(values) is not tuple or len(values) > MAX_AXES:
            raise TypeError(f"a torch.Size is made from a tuple, of at most {MAX_AXES} numbers")
        return TorchSize(values)


def _tensor_v2(
    storage: StorageRef, offset: int, size: Any, stride: Any, requires_grad: Any = False, *_: Any
) -> TensorRecord:
    """Stand for `torch._utils._rebuild_tensor_v2` and, with fewer arguments, `_rebuild_tensor`."""
    if storage.dtype is None:
        raise TypeError("a tensor without dtype lies in an untyped storage")
    if type(offset) is not int:
        raise TypeError("the offset of a tensor is no whole number")
    shape, strides, grad = _numbers(size), _numbers(stride), bool(requires_grad)
    return TensorRecord(storage.dtype, shape, strides, offset, storage.key, storage.nbytes, grad)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> TensorRecord:
    """Stand for `torch._utils._rebuild_tensor_v3`: dtypes without a storage class."""
    typed = StorageRef(dtype.name, storage.key, storage.nbytes)
    return _tensor_v2(typed, offset, size, stride, grad)


def _numbers(values: Any) -> tuple[int, ...]:
    """Return sizes or strides, of which a few bytes must not make many copies of many."""
    if not isinstance(values, tuple | list) or len(values) > MAX_AXES:
        raise TypeError(f"the sizes or strides of a tensor are no tuple of at most {MAX_AXES}")
    for value in values:
        if type(value) is not int:
            raise TypeError("a size or stride of a tensor is no whole number")
    return tuple(values)


def _parameter(data: Any, requires_grad: bool, *_: Any) -> Any:
    if not isinstance(data, TensorRecord):
        return data  # a wrapper subclass, such as a DTensor
    return replace(data, requires_grad=bool(requires_grad), parameter=True)


def _from_type(function: Any, kind: Any, args: tuple[Any, ...], state: Any) -> Any:
    """Stand for `torch._tensor._rebuild_from_type_v2`: subclasses, tensors with attributes."""
    if isinstance(function, _Function):
        return function(*args)
    return stub("torch._tensor", "_rebuild_from_type_v2")(function, kind, args, state)


def _attribute(owner: Any, name: Any) -> type[Record]:
    """Stand for ``getattr``: nested classes, and enum members of Python 3.11.0 to 3.11.3."""
    if not isinstance(owner, pickle_values.StubClass) or type(name) is not str:
        raise TypeError("getattr of something that is no foreign class")
    return stub(owner.module, f"{owner.name}.{name}")


def _encoded(text: str, codec: str = "latin1") -> bytes:
    """Stand for ``_codecs.encode``: how protocol 2 spells bytes."""
    if codec not in ("latin1", "latin-1"):
        raise TypeError("bytes of a pickle are spelt in latin1")
    return text.encode("latin1")


def _bytes(*args: Any) -> bytes:
    if any(not isinstance(arg, bytes) for arg in args):
        raise TypeError("bytes of a number would allocate them")
    return b"".join(args)


def _bytearray(data: bytes | str = b"", codec: str = "latin1") -> bytearray:
    return bytearray(_encoded(data, codec) if isinstance(data, str) else _bytes(data))


def _collected(kind: Callable[..., Any]) -> Callable[..., Any]:
    def collect(values: Any = ()) -> Any:
        if not isinstance(values, list | tuple | set | frozenset):
            raise TypeError("a set of a pickle is made from a list")
        return kind(values)

    return collect


def _reconstructed(cls: Any, _base: Any, _state: Any) -> Any:
    """Stand for ``copyreg._reconstructor``: objects of protocols 0 and 1."""
    if not isinstance(cls, pickle_values.FrozenClass):
        raise TypeError("reconstruction of something that is no foreign class")
    kind: Any = cls
    return kind.__new__(kind)


_TABLE: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "argparse.Namespace": pickle_values.Namespace,
    "types.SimpleNamespace": pickle_values.Namespace,
    "builtins.set": _Copying(_collected(set)),
    "builtins.frozenset": _Copying(_collected(frozenset)),
    "builtins.complex": complex,
    "builtins.bytes": _Copying(_bytes),
    "builtins.bytearray": _Copying(_bytearray),
    "builtins.getattr": _Function(_attribute),
    "_codecs.encode": _Copying(_encoded),
    "copyreg._reconstructor": _Function(_reconstructed),
    "torch.Size": _SizeClass(tuple),
    "torch._utils._rebuild_tensor": _Function(_tensor_v2),
    "torch._utils._rebuild_tensor_v2": _Function(_tensor_v2),
    "torch._utils._rebuild_tensor_v3": _Function(_tensor_v3),
    "torch._utils._rebuild_parameter": _Function(_parameter),
    "torch._utils._rebuild_parameter_with_state": _Function(_parameter),
    "torch._tensor._rebuild_from_type_v2": _Function(_from_type),
    "torch.storage.UntypedStorage": _StorageClass(None),
    "torch.UntypedStorage": _StorageClass(None),
    **{
        f"torch.{name}": _StorageClass(dtype)
        for dtype, name in pickle_values.STORAGE_CLASSES.items()
    },
}
