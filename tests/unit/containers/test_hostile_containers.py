"""Files made to attack: nothing in them runs, every one is a FormatError, soon."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import random
import struct
import zipfile

import pytest

from ckptx.containers import dcp, pickle_reader, safetensors, torch_zip
from ckptx.containers.pickle_values import Namespace, TorchSize
from ckptx.errors import FormatError
from tests.work import at_most

pytest.importorskip("torch")

import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

CALLS = ["os.system", "eval", "exec", "open", "os.mkdir", "pickle.loads", "getattr", "map"]


@pytest.fixture(autouse=True)
def _quickly():
    with at_most():
        yield


# Pickles


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("how", CALLS)
def test_calls_are_refused(bomb, how, protocol):
    for value in (bomb(how), {"model": [1, {"x": bomb(how)}]}, {("key",): bomb(how)}):
        data = pickle.dumps(value, protocol)
        with pytest.raises(FormatError, match=r"a\.pt"):
            pickle_reader.loads(data, file="a.pt")


@pytest.mark.parametrize("how", CALLS)
def test_calls_are_refused_in_every_container(bomb, how, tmp_path):
    torch.save({"a": bomb(how)}, tmp_path / "a.pt")
    with pytest.raises(FormatError, match=r"nothing was run|expected a readable pickle"):
        torch_zip.read(tmp_path / "a.pt", 0)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(bomb(how)))
    with pytest.raises(FormatError, match=r"nothing was run|expected a readable pickle"):
        dcp.read_metadata(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02c__builtin__\ngetattr\nc__builtin__\ngetattr\nX\x08\0\0\0__call__\x86R.",
        b"\x80\x02c__builtin__\ngetattr\ncargparse\nNamespace\nX\x08\0\0\0__init__\x86R.",
        b"\x80\x02c__builtin__\n__import__\nX\2\0\0\0os\x85R.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x80\x04\x8c\x08builtins\x8c\x0dgetattr.__self\x93.",
        b"\x80\x02cos\nsystem\n.",
        b"\x80\x02cposix\nsystem\n.",
        b"\x80\x02coperator\nattrgetter\n.",
        b"\x80\x02ctypes\nFunctionType\n.",
        b"\x80\x02ccollections\nnamedtuple\n.",
        b"\x80\x02ccollections\nOrderedDict.__init__\n.",
        b"\x80\x02cbuiltins\nbytes\nJ\xff\xff\xff\x7f\x85R.",
        b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
        b"\x80\x02(cos\nsystem\nX\4\0\0\0trueo.",  # OBJ
        b"(ios\nsystem\nX\4\0\0\0true.",  # INST
        b"cos\nsystem\n(S'true'\ntR.",  # protocol 0
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02P1\n.",  # a persistent id that is text
        b"\x80\x02K\1Q.",
        b"\x80\x02(X\7\0\0\0storageK\1K\2K\3K\4tQ.",
        b"\x80\x02",
        b"",
        b"\x80\xff.",
        b"\x80\x02R.",
        b"\x80\x02h\7.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x02X\xff\xff\xff\xff.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.",
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # LONG_BINPUT: the unpickler would allocate 32 GiB
        b"\x80\x02Np99999999999\n.",
        b"\x80\x02" + b"}" + b"2" * 1000 + b".",  # DUP
        b"\x80\x02ccollections\nOrderedDict\nN\x85R.",
    ],
)
def test_hostile_opcodes(data):
    with pytest.raises(FormatError):
        pickle_reader.loads(data, file="a.pt")


def test_classes_cannot_be_changed_by_a_pickle():
    """BUILD with a pair sets attributes; on a class that would change the program."""
    for name in (b"argparse\nNamespace", b"torch\nSize", b"megatron.a\nB", b"_codecs\nencode"):
        data = b"\x80\x02c" + name + b"\nN}X\1\0\0\0aK\1s\x86b."
        with pytest.raises(FormatError, match=r"tried to set|readable pickle"):
            pickle_reader.loads(data, file="a.pt")
    assert not hasattr(Namespace, "a")
    assert not hasattr(TorchSize, "a")


def test_deep_nesting_is_an_error(tmp_path):
    deep = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", deep)
    with pytest.raises(FormatError, match="nested too deeply"):
        torch_zip.read(path, 0)


def test_a_pickle_beyond_the_limit_is_refused():
    with pytest.raises(FormatError, match="at most 10 bytes"):
        pickle_reader.loads(pickle.dumps("x" * 100), file="a", limit=10)


def test_every_truncation_of_a_pickle_is_an_error():
    value = {"a": [1, 2.5, b"x", "text", (1, 2)], "n": torch.Size([1])}
    for protocol in (2, 4):
        data = pickle.dumps(value, protocol)
        for size in range(len(data)):
            with pytest.raises(FormatError):
                pickle_reader.loads(data[:size], file="a")


def test_random_damage_is_an_error_or_a_value(tmp_path):
    """No exception but FormatError, and no hang, whatever byte is changed."""
    rng = random.Random(0)
    stream = io.BytesIO()
    torch.save({"a": torch.ones(3), "b": [torch.zeros(2, 2), "x", 1.5]}, stream)
    good = stream.getvalue()
    path = tmp_path / "a.pt"
    refused = 0
    for _ in range(400):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            torch_zip.read(path, 0)
        except FormatError:
            refused += 1
    assert refused > 100


def test_the_scan_knows_every_opcode_of_the_picklers():
    """All opcodes of protocols 2 to 5 that CPython's pickler emits; the others are refused."""
    emitted = set()
    values = ({"a": (1, 2.5, -3, 2**70, None, True)}, [b"x", "y" * 300, set(), frozenset({1})])
    for protocol in range(2, 6):
        for value in (*values, list(range(2000)), torch.Size([1]), bytearray(b"x"), (1, 2, 3, 4)):
            data = pickle.dumps(value, protocol)
            emitted |= {op.name for op, _, _ in pickletools.genops(data)}
            assert pickle_reader.loads(data, file="a") == value
    assert len(emitted) >= 30


# Torch archives


def saved(path, value=None):
    torch.save({"a": torch.arange(4.0), "b": torch.ones(3)} if value is None else value, path)
    return path.read_bytes()


def test_every_truncation_of_an_archive_is_an_error(tmp_path):
    path = tmp_path / "a.pt"
    good = saved(path)
    for size in range(0, len(good), 7):
        path.write_bytes(good[:size])
        with pytest.raises(FormatError, match=r"a\.pt"):
            torch_zip.read(path, 0)


def rewritten(path, change):
    """The archive with its members' data changed, stored again by zipfile."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("a/data/0"), "not in the archive"),
        (lambda m: m.update({"a/data/0": b"x" * 15}), "15 bytes"),
        (lambda m: m.pop("a/data.pkl"), "expected one data.pkl"),
        (lambda m: m.update({"b/data.pkl": b""}), "found 2"),
        (lambda m: m.update({"a/byteorder": b"big"}), "little-endian"),
        (
            lambda m: m.update({"a/data.pkl": m["a/data.pkl"].replace(b"K\4\x85", b"K\5\x85")}),
            "needs",
        ),
        (
            lambda m: m.update({"a/data.pkl": m["a/data.pkl"].replace(b"FloatS", b"CharS")}),
            "16 bytes",
        ),
    ],
)
def test_archives_that_contradict_themselves(tmp_path, change, message):
    path = tmp_path / "a.pt"
    saved(path)
    rewritten(path, change)
    with pytest.raises(FormatError, match=message):
        torch_zip.read(path, 0)


def test_negative_strides_and_offsets_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    for old, new in ((b"K\1\x85", b"J\xff\xff\xff\xff\x85"), (b"QK\0K", b"QJ\xf0\xff\xff\xffK")):
        saved(path, torch.arange(4.0))

        def change(members, old=old, new=new):
            data = members["a/data.pkl"]
            assert old in data or old[:2] + b"\0K" in data
            members["a/data.pkl"] = data.replace(old, new)

        rewritten(path, change)
        with pytest.raises(FormatError, match="natural"):
            torch_zip.read(path, 0)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_members_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(1, 2))
        archive.writestr("a/data.pkl", pickle.dumps(2, 2))
    with pytest.raises(FormatError, match="listed twice"):
        torch_zip.read(path, 0)


def test_compressed_members_are_named(tmp_path):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps([0] * 100, 2))
    with pytest.raises(FormatError, match=r"'a/data\.pkl' is compressed.*torch\.save"):
        torch_zip.read(path, 0)


def central_entries(data):
    position = data.index(b"PK\1\2")
    while data[position : position + 4] == b"PK\1\2":
        name, extra, comment = struct.unpack_from("<3H", data, position + 28)
        yield position, data[position + 46 : position + 46 + name].decode()
        position += 46 + name + extra + comment


@pytest.mark.parametrize(
    ("field", "layout", "value", "message"),
    [
        (8, "<H", 0x0809, "encrypted"),
        (20, "<2I", (1 << 30, 1 << 30), "ends after"),
        (20, "<2I", (0xFFFFFFFF, 0xFFFFFFFF), "zip64"),
        (42, "<I", 0, "another name"),
        (42, "<I", 1 << 30, "starts beyond"),
        (20, "<2I", (800, 800), "overlap|ends after"),
    ],
)
def test_directories_that_lie(tmp_path, field, layout, value, message):
    path = tmp_path / "a.pt"
    data = bytearray(saved(path))
    entries = dict((name, position) for position, name in central_entries(bytes(data)))
    values = value if isinstance(value, tuple) else (value,)
    struct.pack_into(layout, data, entries["a/data/0"] + field, *values)
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message):
        torch_zip.read(path, 0)


def test_absurd_entry_counts_cost_nothing(tmp_path):
    path = tmp_path / "a.pt"
    data = bytearray(saved(path))
    record = data.index(b"PK\6\6")
    struct.pack_into("<2Q", data, record + 24, 1 << 60, 1 << 60)
    path.write_bytes(data)
    with pytest.raises(FormatError, match="its directory would have"):
        torch_zip.read(path, 0)


def test_legacy_files_say_how_to_save_them_again(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match=r"torch before 1\.6.*torch\.save\(torch\.load"):
        torch_zip.read(path, 0)


def test_files_that_are_no_files(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FormatError, match=path.name):
            torch_zip.read(path, 0)
        with pytest.raises(FormatError, match=path.name):
            safetensors.read_header(path)


# Safetensors


def header_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def one(dtype="U8", shape=(4,), span=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": one("F4")}, "'a'.*F4.*does not convert"),
        ({"a": one("Q8")}, "'a'.*Q8"),
        ({"a": one(shape=(5,))}, "'a': expected 5 bytes"),
        ({"a": one(shape=(-4,))}, "non-negative"),
        ({"a": one(shape=(4.0,))}, "non-negative"),
        ({"a": one(shape=(True, 4))}, "non-negative"),
        ({"a": one(shape=(2**40, 2**40))}, "expected .* bytes"),
        ({"a": one(span=(4, 0))}, "data_offsets"),
        ({"a": one(span=(0, 4, 4))}, "data_offsets"),
        ({"a": one(span=(2, 6))}, "gap"),
        ({"a": one(), "b": one()}, "'b' overlaps"),
        ({"a": one(), "b": one(span=(8, 12))}, "'b' leaves a gap"),
        ({"a": one(), "b": one(span=(4, 8))}, "truncated"),
        ({}, "tail"),
        ({"a": {"dtype": "U8", "shape": [4]}}, "data_offsets"),
        ({"a": 1}, "found 1"),
        ({"a": one(), "__metadata__": {"x": 1}}, "strings to strings"),
        ({"a": one(), "__metadata__": []}, "strings to strings"),
        (b'{"a":1,"a":2}', "given twice"),
        (b'{"a":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}', "given twice"),
        (b"[]", "starts with"),
        (b" {}", "starts with"),
        (b'{"\xff":1}', "JSON"),
        (b'{"a":' + b"[" * 100_000, "JSON"),
        (b'{"a":' + b"9" * 10_000 + b"}", "JSON"),
        (b"{", "JSON"),
    ],
)
def test_headers_that_lie(tmp_path, header, message):
    path = header_file(tmp_path / "a.safetensors", header, b"1234")
    with pytest.raises(FormatError, match=message) as caught:
        safetensors.tensors(path, 0)
    assert "a.safetensors" in str(caught.value)


@pytest.mark.parametrize("claim", [100_000_001, 2**63, 2**64 - 1, 1000])
def test_header_lengths_that_lie(tmp_path, claim):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", claim) + b"{}")
    with pytest.raises(FormatError, match="header of"):
        safetensors.read_header(path)
    path.write_bytes(b"{}")
    with pytest.raises(FormatError, match="only 2 bytes"):
        safetensors.read_header(path)


# DCP


@pytest.fixture
def directory(tmp_path):
    def make(**changes):
        item = io.BytesIO()
        torch.save(torch.ones(4), item)
        (tmp_path / "f").write_bytes(item.getvalue())
        place = {"relative_path": "f", "offset": 0, "length": len(item.getvalue())}
        box = {"size": (4,), "offsets": (0,), "sizes": (4,), "dtype": torch.float32}
        place |= {key: value for key, value in changes.items() if key not in box}
        box |= {key: value for key, value in changes.items() if key in box}
        chunk = ChunkStorageMetadata(torch.Size(box["offsets"]), torch.Size(box["sizes"]))
        properties = TensorProperties(dtype=box["dtype"])
        entry = TensorStorageMetadata(properties, torch.Size(box["size"]), [chunk])
        storage = {MetadataIndex("w", box["offsets"]): _StorageInfo(**place)}
        value = Metadata({"w": entry, "o": BytesStorageMetadata()}, None, storage)
        (tmp_path / ".metadata").write_bytes(pickle.dumps(value))
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relative_path": "../f"}, "inside the directory"),
        ({"relative_path": "/etc/passwd"}, "inside the directory"),
        ({"relative_path": "x/../../f"}, "inside the directory"),
        ({"relative_path": ""}, "inside the directory"),
        ({"relative_path": "f\0"}, "inside the directory"),
        ({"relative_path": "absent"}, "absent: cannot be opened"),
        ({"relative_path": "."}, "inside the directory|regular file"),
        ({"offset": 1}, "truncated"),
        ({"length": 1 << 60}, "truncated"),
        ({"length": 500}, "'w' at byte 0|item 'w'"),
        ({"length": 0}, "item 'w'"),
        ({"offset": -1}, "offset and length"),
        ({"offset": "0"}, "offset and length"),
        ({"transform_descriptors": ["stream.zstd/1"]}, "stream.zstd/1"),
        ({"size": (5,)}, "chunks hold 4 elements"),
        ({"offsets": (1,)}, "outside"),
        ({"size": (2,), "sizes": (2,)}, r"expected float32 \[2\]"),
        ({"dtype": torch.int32}, r"expected int32 \[4\]"),
        ({"dtype": torch.complex128}, "does not convert"),
        ({"sizes": (2, 2)}, "chunk"),
    ],
)
def test_metadata_that_lies(directory, changes, message):
    with pytest.raises(FormatError, match=message):
        dcp.tensors(dcp.read_metadata(directory(**changes)), [])


def test_the_untouched_directory_is_fine(directory):
    metadata = dcp.read_metadata(directory())
    assert dcp.tensors(metadata, [])["w"].shape == (4,)
    with pytest.raises(FormatError, match="place is missing"):
        dcp.read_object(metadata, "o", [])
    with pytest.raises(FormatError, match="'x' is not in the checkpoint"):
        dcp.tensors(metadata, [], ["x"])


@pytest.mark.parametrize("value", [1, {}, [], torch.Size([1]), Metadata({}), Metadata({1: 2})])
def test_other_pickles_as_metadata(tmp_path, value):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(value))
    if value == Metadata({}):
        assert dcp.read_metadata(tmp_path).tensors == {}
    else:
        with pytest.raises(FormatError, match=r"\.metadata"):
            dcp.read_metadata(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_random_damage_of_a_directory(tmp_path):
    rng = random.Random(0)
    values = {"a": torch.ones(3, 2), "b": torch.zeros(4).bfloat16(), "o": 1}
    torch_dcp.save(values, checkpoint_id=tmp_path, no_dist=True)
    good = (tmp_path / ".metadata").read_bytes()
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / ".metadata").write_bytes(data)
        try:
            dcp.tensors(dcp.read_metadata(tmp_path), [])
        except FormatError:
            refused += 1
    assert refused > 100
