"""Tuples that are made to be hashed for ever, or until the stack ends; honest ones pass."""

from __future__ import annotations

import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ckptx.containers import dcp, pickle_reader, pickle_scan, torch_zip
from ckptx.errors import FormatError

from .conftest import ROOT
from .pickle_catalogue import call, named, tensor, text

MEMORY = 2 << 30

MEMOS = {
    "BINPUT": (lambda n: b"q" + bytes([n]), lambda n: b"h" + bytes([n])),
    "LONG_BINPUT": (lambda n: b"r" + struct.pack("<I", n), lambda n: b"j" + struct.pack("<I", n)),
    "MEMOIZE": (lambda _: b"\x94", lambda n: b"h" + bytes([n])),
}
_SIZE = named("torch", "Size")
_FROZEN = named("builtins", "frozenset")
JOINS = {  # what pushes an object that holds another one twice, and is hashed with it
    "TUPLE": lambda one: b"(" + one + one + b"t",
    "TUPLE2": lambda one: one + one + b"\x86",
    "TUPLE2, with small ones": lambda one: b"K\1K\2\x86" + one + one + b"\x87",
    "TUPLE3, around a number": lambda one: one + b"K\1" + one + b"\x87",
    "a size": lambda one: _SIZE + one + one + b"\x86\x85R",
    "a size of a mark": lambda one: _SIZE + b"((" + one + one + b"ttR",
    "a thousand": lambda one: b"(" + one * 1000 + b"t",
    "FROZENSET of pairs": lambda one: b"(" + one + b"K\1\x86" + one + b"K\2\x86\x91",
    "frozenset of pairs": lambda one: _FROZEN + b"](" + one + b"K\1\x86" + one + b"K\2\x86e\x85R",
    "a tensor of sizes": lambda one: tensor(size=one + one + b"\x86", stride=one + b"\x85"),
    "arguments": lambda one: named("torch", "x") + one + one + b"\x86",
    "a state": lambda one: named("torch.nn", "X") + b")\x81" + one + one + b"\x86",
}
CALLED = {"arguments": b"R", "a state": b"b"}  # the tuple is in the memo before they consume it
USES = {  # what hashes it
    "SETITEM": lambda key: b"}" + key + b"K\1s",
    "SETITEMS": lambda key: b"}(" + key + b"K\1u",
    "an ordered dictionary": lambda key: named("collections", "OrderedDict") + b")R" + key + b"Ns",
    "pairs": lambda key: call(named("collections", "OrderedDict"), b"]" + key + b"K\1\x86a"),
    "ADDITEMS": lambda key: b"\x8f(" + key + b"\x90",
    "FROZENSET": lambda key: b"(" + key + b"\x91",
    "set": lambda key: call(named("builtins", "set"), b"]" + key + b"a"),
    "frozenset": lambda key: call(_FROZEN, b"]" + key + b"a"),
}


def chain(join: str, memo: str, first: int = 0, links: int = 60) -> bytes:
    """Opcodes that leave nothing on the stack, and the last link of a chain in the memo."""
    put, get = MEMOS[memo]
    data = b"K\1\x85" + put(first) + b"0"
    for n in range(first, first + links):
        data += JOINS[join](get(n)) + put(n + 1) + CALLED.get(join, b"") + b"0"
    return data


def bombs() -> dict[str, bytes]:
    found = {}
    for join in JOINS:
        for memo, (_, get) in MEMOS.items():
            for use in USES:
                found[f"{join}, {memo}, {use}"] = chain(join, memo) + USES[use](get(60))
        # Two chains that are equal: their last links have one hash, and are compared.
        get = MEMOS["BINPUT"][1]
        both = chain(join, "BINPUT") + chain(join, "BINPUT", 100)
        found[f"{join}, compared"] = both + b"}(" + get(60) + b"N" + get(160) + b"Nu"
    for name, deep in {
        "TUPLE1": b")" + b"\x85" * 300_000,
        "TUPLE1, in the memo": b")" + b"\x85q\1" * 300_000,
        "TUPLE": b"(" * 300_000 + b"t" * 300_000,
        "TUPLE2": b")" + b"K\1\x86" * 300_000,
        "sizes": _SIZE * 200_000 + b")" + b"\x85R" * 200_000,
        "FROZENSET": b"(" * 300_000 + b"\x91" * 300_000,
    }.items():
        for use in USES:
            found[f"deep {name}, {use}"] = USES[use](deep)
    large = b"(" + b"K\1" * 100_000 + b"tq\1"
    found["one of many, often"] = large + b"0}(" + b"h\1N" * 100_000 + b"u"
    return found


def limited(program: str, *arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run Python, with a limit to its time and memory."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))

    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        **{"capture_output": True, "text": True, "cwd": ROOT, **settings},
        preexec_fn=limit,
    )


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.full)])
def test_no_bomb_goes_off(tmp_path, step):
    """In a process of their own, as they would end this one: each is refused or read, soon."""
    path = tmp_path / "bombs"
    prefixes = (b"", b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")
    data = {
        name: prefixes[number % len(prefixes)] + one + b"."
        for number, (name, one) in enumerate(list(bombs().items())[::step])
    }
    path.write_bytes(pickle.dumps(data))
    program = """
import pickle, sys
from tests.work import at_most
from ckptx.containers import pickle_reader as pickles
from ckptx.errors import FormatError
for name, data in pickle.load(open(sys.argv[1], "rb")).items():
    print(name, flush=True)
    try:
        with at_most():
            pickles.loads(data, file="a.pt")
        print("read")
    except FormatError as error:
        assert str(error).isprintable() and len(str(error)) < 300, error
        print("refused:", error)
"""
    done = limited(program, str(path))
    assert done.returncode == 0, (done.stdout[-300:], done.stderr[-2000:])
    lines = done.stdout.splitlines()
    read = {name for name, end in zip(lines[::2], lines[1::2], strict=True) if end == "read"}
    # Records are hashed by what they are, not by what they hold; frozen sets once.
    allowed = {name for name in data if name.startswith(("a state", "arguments"))}
    assert read <= allowed, sorted(read - allowed)[:10]


BOMB = chain("TUPLE2", "BINPUT") + USES["SETITEM"](b"h\x3c")
DEEP = USES["SETITEM"](b")" + b"\x85" * 300_000)


@pytest.mark.parametrize("key", [BOMB, DEEP], ids=["shared", "deep"])
@pytest.mark.parametrize("command", ["inspect", "verify", "convert"])
def test_commands_refuse(command, key, user, monkeypatch):
    with zipfile.ZipFile(user.source.with_suffix(".pt"), "w") as members:
        inner = b"\x80\x02}" + text("model") + key + b"s."
        members.writestr("archive/data.pkl", inner)
        members.writestr("archive/version", b"3\n")
    user.source.mkdir()
    source = user.source.with_suffix(".pt").rename(user.source / "model.pt")
    rest = {"verify": [source], "convert": [user.target, "--to", "pytorch"]}.get(command, [])
    limit = {"timeout": 60, "run": user.run_apart}
    message = user.is_refused(command, source, *rest, **limit)
    assert "model.pt" in message
    assert "tuple" in message


def reached(value: Any) -> int:
    """Values of a tree, counted one by one."""
    return sum(1 + (reached(one) if isinstance(one, tuple | frozenset) else 0) for one in value)


def depth(value: Any) -> int:
    inner = [depth(one) for one in value if isinstance(one, tuple | frozenset)]
    return 1 + max(inner, default=0)


LEAVES = st.none() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)


def _hashed(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    shared = inner.map(lambda one: (one, one, (one,)))
    return st.lists(inner, max_size=6).map(tuple) | st.frozensets(inner, max_size=3) | shared


HASHED = st.deferred(lambda: st.recursive(LEAVES, _hashed, max_leaves=12))


def _values(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    mappings = st.dictionaries(HASHED, inner, max_size=3)
    return st.lists(inner, max_size=4) | mappings | st.sets(HASHED, max_size=3)


VALUES = st.deferred(lambda: st.recursive(HASHED, _values, max_leaves=8))


@given(VALUES, st.integers(2, 5))
@settings(max_examples=100, deadline=None)
def test_what_is_ordinary_is_read(value, protocol):
    data = pickle.dumps(value, protocol)
    assert pickle_reader.loads(data, file="a.pt") == pickle.loads(data)


@given(HASHED, st.integers(2, 5))
@settings(max_examples=100, deadline=None)
def test_weights_are_those_of_the_tree(value, protocol):
    """What the unpickler counts as it goes, counted again on the objects that Python has made."""
    value = (value, "last")
    weigh = pickle_reader._Weights("a.pt")._weigh
    assert weigh(pickle.loads(pickle.dumps(value, protocol))) == (reached(value), depth(value))


def nested(levels: int) -> tuple[Any, ...]:
    value: tuple[Any, ...] = ("x",)
    for _ in range(levels - 1):
        value = (value, "x")
    return value


def of_size(size: int) -> tuple[Any, ...]:
    """A tuple of tuples that holds ``size`` values."""
    inner = ("x",) * 9
    value = (inner,) * (size // 10) + ("x",) * (size % 10)
    assert reached(value) == size
    return value


@pytest.mark.parametrize("protocol", range(2, 6))
def test_the_limits_are_those_that_are_stated(protocol):
    for key in (
        nested(pickle_reader.MAX_TUPLE_DEPTH),
        of_size(pickle_reader.MAX_KEY),
        frozenset(range(1000)),
    ):
        value = {key: 1, "again": key}
        assert pickle_reader.loads(pickle.dumps(value, protocol), file="a.pt") == value
        assert pickle_reader.loads(pickle.dumps({key}, protocol), file="a.pt") == {key}
    data = pickle.dumps(nested(pickle_reader.MAX_TUPLE_DEPTH + 1), protocol)
    with pytest.raises(FormatError, match=r"a\.pt: found tuples nested over 100 deep"):
        pickle_reader.loads(data, file="a.pt")
    for large in (of_size(pickle_reader.MAX_KEY + 1), tuple(range(pickle_reader.MAX_KEY + 1))):
        data = pickle.dumps({large: 1}, protocol)
        with pytest.raises(FormatError, match=r"a\.pt: .* a tuple that is too large"):
            pickle_reader.loads(data, file="a.pt")


@pytest.mark.parametrize("protocol", range(2, 6))
def test_tuples_that_are_no_keys_may_be_large(protocol, tmp_path):
    value = {"flat": tuple(range(5000)), "nested": of_size(5000), "set": set(range(5000))}
    data = pickle.dumps(value, protocol)
    assert pickle_reader.loads(data, file="a.pt") == value
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as members:
        members.writestr("archive/data.pkl", data)
    read = torch_zip.read(tmp_path / "a.pt", 0)
    assert read == value
    assert type(read["nested"]) is type(read["flat"]) is tuple


def test_a_large_tuple_stays_one_where_it_is_called_with():
    """REDUCE takes its arguments from one."""
    inner = b"(" + b"K\1" * 600 + b"tq\1h\1\x86q\2"
    record = pickle_reader.loads(b"\x80\2" + named("torch.nn", "X") + inner + b"R.", file="a.pt")
    assert record.args == ((1,) * 600,) * 2
    assert type(record.args) is tuple
    with pytest.raises(FormatError, match=r"torch\.Size is made from a tuple"):
        pickle_reader.loads(b"\x80\2" + _SIZE + inner + b"\x85R.", file="a.pt")


# Copies: a few bytes hand the same large thing to a call, or a reader, again and again.

TIMES = 20_000
LARGE = b"(" + b"K\1" * 100_000
COPIES = {
    "encode": text("x" * 100_000) + b"q\1",
    "arguments": LARGE + b"tq\1",
    "list": b"]" + LARGE + b"eq\1",
}
COPYING = {
    "encode": (named("_codecs", "encode"), b"h\1\x85R"),
    "bytearray": (named("builtins", "bytearray"), b"h\1\x85R"),
    "set": (named("builtins", "set"), b"h\1\x85R"),
    "frozenset": (named("builtins", "frozenset"), b"h\1\x85R"),
    "a size": (_SIZE, b"h\1\x85R"),
    "a call": (named("torch.nn", "X"), b"h\1R"),
    "an object": (named("torch.nn", "X"), b"h\1\x81"),
}


def copies() -> dict[str, bytes]:
    found = {}
    for large, made in COPIES.items():
        for name, (function, use) in COPYING.items():
            again = (b"h\2" + use) * TIMES
            found[f"{name} of {large}"] = made + b"0" + function + b"q\x020](" + again + b"e."
    return found


def test_copies_are_bounded(tmp_path):
    """What would take gigabytes is refused; a few bytes that are no copies may be read."""
    path = tmp_path / "copies"
    path.write_bytes(pickle.dumps(copies()))
    program = """
import pickle, re, sys
from ckptx.containers import pickle_reader as pickles
from ckptx.errors import FormatError
for name, data in pickle.load(open(sys.argv[1], "rb")).items():
    print(name, flush=True)
    try:
        pickles.loads(data, file="a.pt")
    except FormatError as error:
        assert "MemoryError" not in str(error), error
# Not ru_maxrss, which a process inherits from the one that started it.
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
    done = limited(program, str(path))
    assert done.returncode == 0, (done.stdout[-300:], done.stderr[-2000:])
    assert int(done.stdout.split()[-1]) < 500 << 10  # KiB


@pytest.mark.parametrize("protocol", range(2, 6))
def test_honest_copies_are_made(protocol):
    value = [bytes(range(256)) * 1000, bytearray(b"\xff" * 9999), set(range(9999)), frozenset("ab")]
    assert pickle_reader.loads(pickle.dumps(value, protocol), file="a.pt") == value


def test_tensors_that_share_their_chunks_are_refused(tmp_path):
    """A list of chunks is read for every tensor that has it: their number would be squared."""
    chunks = [ChunkStorageMetadata(torch.Size([n]), torch.Size([1])) for n in range(2000)]
    properties = TensorProperties(torch.float32)
    entry = TensorStorageMetadata(properties, torch.Size([2000]), chunks)
    metadata = Metadata({f"t{n}": entry for n in range(2000)}, storage_data={})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(FormatError, match="share a list of chunks"):
        dcp.read_metadata(tmp_path)


@pytest.mark.parametrize("levels", [1, 60])
def test_an_encoding_that_is_no_name_is_refused(levels, tmp_path):
    """It would be shown in the message: 2**60 lists."""
    value: list[object] = []
    for _ in range(levels):
        value = [value, value]
    index, info = MetadataIndex("t", torch.Size([0])), _StorageInfo("a", 0, 1)
    info.transform_descriptors = [value]
    metadata = Metadata({}, storage_data={index: info})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(FormatError, match="encoding has no name"):
        dcp.read_metadata(tmp_path)


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("sound", [True, False])
def test_either_way_to_scan_reads_the_same(sound, protocol, monkeypatch):
    """Python before 3.11.5 cannot run the pattern that knows small tuples."""
    monkeypatch.setattr(pickle_scan, "_RE_IS_SOUND", sound and pickle_scan._RE_IS_SOUND)
    value = [
        *((1, 2.5, None), ("a", (True, (2**40, b"b"))), (), {(1, 2): ("x",) * 70}),
        *({"k": [1, -1, 2**70, 70_000]}, frozenset("ab"), {i: (i,) for i in range(300)}),
    ]
    assert pickle_reader.loads(pickle.dumps(value, protocol), file="a.pt") == value


@pytest.mark.parametrize("sound", [True, False])
@pytest.mark.parametrize(
    "opcode", [b"r\xff\xff\xff\xff", b"c" + b"x" * 2000, b"i", b"\x82\x01"], ids=repr
)
def test_either_way_to_scan_refuses_the_same(sound, opcode, monkeypatch):
    monkeypatch.setattr(pickle_scan, "_RE_IS_SOUND", sound and pickle_scan._RE_IS_SOUND)
    with pytest.raises(FormatError, match="opcode of protocol 2 to 5 at byte 4"):
        pickle_reader.loads(b"\x80\x02K\x01" + opcode + b"N." * 9, file="a.pt")
