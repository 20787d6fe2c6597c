from __future__ import annotations

import argparse
import collections
import copyreg
import datetime
import enum
import io
import pathlib
import pickle
import pickletools
import signal
import sys
import types

import numpy as np
import pytest

from ckptx.containers import pickle_reader
from ckptx.containers.pickle_values import (
    Call,
    EnumValue,
    Global,
    Instance,
    Record,
    StubClass,
    TorchDtype,
    TorchSize,
)
from ckptx.containers.pickle_writer import dumps
from ckptx.errors import FormatError, PlanError

pytest.importorskip("torch")

import torch

PLAIN = {
    "none": None,
    "bools": [True, False],
    "ints": [0, 255, 256, 65535, 65536, -1, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**63],
    "huge": [-(2**300), 1 << 2050],
    "floats": [0.5, -0.0, float("inf"), 1e-310],
    "text": ["", "é\n\0", "x" * 300, "x" * 300],
    "bytes": [b"", b"\0\xff\n"],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, (4,))],
    "empty": [[], {}, set()],
    "set": {"b", "a", "c"},
    "ordered": collections.OrderedDict(b=1, a=2),
    ("a", 1): {1: {2: 3}},
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_read_as_pickle_reads_them(protocol):
    value = {**PLAIN, "more": [frozenset({1}), bytearray(b"ab"), 1 + 2j]}
    assert pickle_reader.loads(pickle.dumps(value, protocol), file="f") == value


def test_plain_values_are_written_as_pickle_and_torch_read_them(tmp_path):
    data = dumps(PLAIN)
    assert pickle.loads(data) == PLAIN
    assert list(pickle.loads(data)) == list(PLAIN)
    assert max(op.proto for op, _, _ in pickletools.genops(data)) == 2


def test_output_depends_on_values_only():
    key = "".join(["a", "b"])  # equal to "ab", another object
    assert dumps([key, {"ab": key}, {"x", "y"}]) == dumps(["ab", {"ab": "ab"}, {"y", "x"}])


def test_more_strings_than_one_byte_memo_numbers():
    value = [f"name {i // 2}" for i in range(2000)]
    assert pickle.loads(dumps(value)) == value


@pytest.mark.parametrize("value", [object(), np.int64(1), print, signal.SIGTERM, 1j])
def test_other_types_are_not_written(value):
    with pytest.raises(PlanError, match="cannot be stored"):
        dumps({"a": [value]})


def test_a_value_that_holds_itself_is_not_written():
    value: list[object] = []
    value.append(value)
    with pytest.raises(PlanError, match="holds itself"):
        dumps(value)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", [argparse.Namespace, types.SimpleNamespace])
def test_namespaces_are_namespaces(kind, protocol):
    value = kind(a=1, dtype=torch.bfloat16, size=torch.Size([2, 3]), s=signal.SIGTERM)
    found = pickle_reader.loads(pickle.dumps(value, protocol), file="f")
    assert isinstance(found, argparse.Namespace)
    assert vars(found) == {
        "a": 1,
        "dtype": TorchDtype("bfloat16"),
        "size": (2, 3),
        "s": EnumValue("signal", "Signals", 15),
    }


def test_foreign_values_are_written_by_name():
    value = {
        "args": argparse.Namespace(dtype=TorchDtype("float8_e4m3fn"), shape=TorchSize((2, 3))),
        "signal": EnumValue("signal", "Signals", 15),
        "class": Global("collections", "Counter"),
        "date": Call(Global("datetime", "date"), (2020, 1, 2)),
        "object": Instance(Global("argparse", "Namespace"), {"x": 1}),
        "twice": [Instance(Global("argparse", "Namespace"), {"y": y}) for y in (2, [3])],
        "none": Instance(Global("argparse", "Namespace"), None),
    }
    assert pickle.loads(dumps(value)) == {
        "args": argparse.Namespace(dtype=torch.float8_e4m3fn, shape=torch.Size([2, 3])),
        "signal": signal.SIGTERM,
        "class": collections.Counter,
        "date": datetime.date(2020, 1, 2),
        "object": argparse.Namespace(x=1),
        "twice": [argparse.Namespace(y=2), argparse.Namespace(y=[3])],
        "none": argparse.Namespace(),
    }


def test_shared_instances_are_one_object():
    shared = Instance(Global("argparse", "Namespace"), {"x": 1}, shared=True)
    first, second = pickle.loads(dumps([shared, shared]))
    assert first is second


class Stage(enum.Enum):
    ONE = 1


class Foreign:
    def __init__(self):
        self.a = [1]
        self.b = Stage.ONE


class Listing(list):
    pass


@pytest.fixture
def foreign(monkeypatch):
    """Classes that pretend to be Megatron's while they are pickled."""
    for cls in (Stage, Foreign, Listing):
        monkeypatch.setattr(cls, "__module__", "megatron.core.enums")
    module = types.ModuleType("megatron.core.enums")
    module.Stage, module.Foreign, module.Listing = Stage, Foreign, Listing
    monkeypatch.setitem(__import__("sys").modules, "megatron.core.enums", module)


@pytest.mark.parametrize("protocol", [2, 4])
def test_foreign_objects_become_records(foreign, protocol):
    data = pickle.dumps([Foreign(), Listing([1, 2]), Foreign], protocol)
    record, listing, cls = pickle_reader.loads(data, file="f")
    assert (type(record).module, type(record).name) == ("megatron.core.enums", "Foreign")
    assert record.state == {"a": [1], "b": EnumValue("megatron.core.enums", "Stage", 1)}
    assert listing.items == [1, 2]
    assert cls is type(record)


def test_records_survive_the_queue(foreign):
    value = pickle_reader.loads(
        pickle.dumps([Foreign(), Foreign, argparse.Namespace(a=1)]), file="f"
    )
    again = pickle.loads(pickle.dumps(value))
    assert again[0].state == value[0].state
    assert again[1:] == value[1:]
    assert type(again[0]) is again[1]


def test_enum_members_by_name_become_nested_stubs():
    # Python 3.11.0 to 3.11.3 pickled enum members as getattr(class, name).
    data = b"\x80\x02c__builtin__\ngetattr\ncmegatron.core.enums\nModelType\nX\1\0\0\0a\x86R."
    found = pickle_reader.loads(data, file="f")
    assert isinstance(found, StubClass)
    assert found.name == "ModelType.a"


def test_objects_of_the_libraries_are_records():
    value = {
        "path": pathlib.PosixPath("/a/b"),
        "array": np.arange(3),
        "state": np.random.RandomState(0).get_state()[1],
        "date": datetime.datetime(2020, 1, 1),
        "stream": io.BytesIO(b"abc"),
        "device": torch.device("cpu"),
        "default": collections.defaultdict(list, a=[1]),
        "deque": collections.deque([1, 2]),
    }
    for protocol in (2, 4):
        found = pickle_reader.loads(pickle.dumps(value, protocol), file="f")
        assert all(isinstance(item, Record) for item in found.values())
        assert found["default"].pairs == [("a", [1])]
        assert found["deque"].items == [1, 2]
        assert found["device"].args == ("cpu",)


@pytest.mark.parametrize("module", ["acme.model", "__main__", "swift.megatron.argument"])
def test_objects_of_any_package_are_inert_records(module):
    data = b"\x80\x02c%b\nThing\n)\x81}X\1\0\0\0aK\1sb." % module.encode()
    found = pickle_reader.loads(data, file="f.pt")
    assert (type(found).module, type(found).name, found.state) == (module, "Thing", {"a": 1})
    assert module not in sys.modules or module == "__main__"


def test_unknown_globals_of_the_standard_library_are_named():
    data = b"\x80\x02cshlex\nsplit\n)\x81}X\1\0\0\0aK\1sb."
    with pytest.raises(FormatError, match=r"f\.pt.*'shlex\.split'.*nothing was run"):
        pickle_reader.loads(data, file="f.pt")


def test_copyreg_objects_of_old_protocols_are_read():
    data = pickle.dumps(argparse.Namespace(a=1), 2)
    old = data.replace(
        b"cargparse\nNamespace\nq\0)\x81",
        b"ccopy_reg\n_reconstructor\ncargparse\nNamespace\nc__builtin__\nobject\nN\x87R",
    )
    assert old != data
    assert copyreg._reconstructor  # the function that the pickle names
    assert pickle_reader.loads(old, file="f") == argparse.Namespace(a=1)
