"""Hostile pickles, as opcodes: each entry pushes one object, or tries to.

`REFUSED` must never be read. `ODD` are inert, and lie: what reads them must refuse them or pass
them by. Calls that a plain unpickler would make touch the file `CANARY` in the working directory.
"""

from __future__ import annotations

import struct

CANARY = "executed"
SHELL = f"touch {CANARY}"


def text(value: str | bytes) -> bytes:
    """BINUNICODE."""
    data = value.encode() if isinstance(value, str) else value
    return b"X" + struct.pack("<I", len(data)) + data


def named(module: str, name: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{name}\n".encode()


def stacked(module: bytes, name: bytes) -> bytes:
    """STACK_GLOBAL, its names computed by other opcodes."""
    return module + name + b"\x93"


def call(function: bytes, *args: bytes) -> bytes:
    """REDUCE."""
    return function + b"(" + b"".join(args) + b"tR"


def number(value: int) -> bytes:
    """LONG1."""
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def storage(key: bytes = text("0"), numel: bytes = number(16), kind: str = "FloatStorage") -> bytes:
    """A persistent id of torch."""
    parts = text("storage"), named("torch", kind), key, text("cpu"), numel
    return b"(" + b"".join(parts) + b"tQ"


def tensor(
    place: bytes = storage(),
    offset: bytes = b"K\0",
    size: bytes = b"K\x10\x85",
    stride: bytes = b"K\1\x85",
) -> bytes:
    """A call of ``_rebuild_tensor_v2``."""
    rest = b"\x89" + named("collections", "OrderedDict") + b")R"
    return call(named("torch._utils", "_rebuild_tensor_v2"), place, offset, size, stride, rest)


def bomb(first: bytes, join: bytes, depth: int, start: int = 10) -> bytes:
    """Objects that each hold the one before twice: 2 ** depth when they are walked as a tree."""
    data = first + b"q" + bytes([start])
    for index in range(start, start + depth):
        data += b"0" + join % {b"i": bytes([index])} + b"q" + bytes([index + 1])
    return data


PYTHON = text(f"open({CANARY!r}, 'w')")
SYSTEM = named("posix", "system")
GETATTR = named("builtins", "getattr")

_CODE = {
    "os.system": call(named("os", "system"), text(SHELL)),
    "posix.system": call(SYSTEM, text(SHELL)),
    "nt.system": call(named("nt", "system"), text(SHELL)),
    "subprocess.Popen": call(
        named("subprocess", "Popen"), b"]" + text("touch") + b"a" + text(CANARY) + b"a"
    ),
    "subprocess.check_output": call(
        named("subprocess", "check_output"), b"]" + text("touch") + b"a" + text(CANARY) + b"a"
    ),
    "eval": call(named("builtins", "eval"), PYTHON),
    "exec": call(named("builtins", "exec"), PYTHON),
    "eval of Python 2": call(named("__builtin__", "eval"), PYTHON),
    "compile": call(named("builtins", "compile"), PYTHON, text("x"), text("exec")),
    "__import__": call(named("builtins", "__import__"), text("antigravity")),
    "open for writing": call(named("builtins", "open"), text(CANARY), text("w")),
    "io.open": call(named("io", "open"), text(CANARY), text("w")),
    "_io.FileIO": call(named("_io", "FileIO"), text(CANARY), text("w")),
    "_io.open_code": call(named("_io", "open_code"), text("/etc/passwd")),
    "getattr of getattr": call(GETATTR, GETATTR, text("__self__")),
    "getattr chain to import": call(
        call(GETATTR, call(GETATTR, GETATTR, text("__self__")), text("__import__")), text("os")
    ),
    "getattr of a number": call(GETATTR, b"K\1", text("__class__")),
    "getattr of a dictionary": call(GETATTR, b"}", text("__class__")),
    "getattr with a default": call(GETATTR, named("torch", "device"), text("x"), SYSTEM),
    "setattr": call(named("builtins", "setattr"), named("torch", "Size"), text("x"), b"K\1"),
    "delattr": call(named("builtins", "delattr"), named("torch", "Size"), text("__new__")),
    "globals": call(named("builtins", "globals")),
    "vars": call(named("builtins", "vars")),
    "breakpoint": call(named("builtins", "breakpoint")),
    "map": call(named("builtins", "map"), SYSTEM, b"]" + text(SHELL) + b"a"),
    "filter": call(named("builtins", "filter"), SYSTEM, b"]" + text(SHELL) + b"a"),
    "itertools.starmap": call(named("itertools", "starmap"), SYSTEM, b"]" + text(SHELL) + b"\x85a"),
    "functools.reduce": call(named("functools", "reduce"), SYSTEM, b"]"),
    "partial of system": call(named("functools", "partial"), SYSTEM, text(SHELL)),
    "defaultdict of system": call(named("collections", "defaultdict"), SYSTEM),
    "operator.methodcaller": call(named("operator", "methodcaller"), text("system"), text(SHELL)),
    "_operator.attrgetter": call(named("_operator", "attrgetter"), text("__class__")),
    "importlib.import_module": call(named("importlib", "import_module"), text("antigravity")),
    "importlib below": call(named("importlib._bootstrap", "_load_unlocked"), b"N"),
    "runpy": call(named("runpy", "_run_code"), PYTHON, b"}"),
    "code": call(named("code", "InteractiveInterpreter")),
    "pty.spawn": call(named("pty", "spawn"), text(SHELL)),
    "ctypes.CDLL": call(named("ctypes", "CDLL"), text("libc.so.6")),
    "types.FunctionType": call(named("types", "FunctionType"), b"N", b"}"),
    "types.CodeType": named("types", "CodeType"),
    "marshal.loads": call(named("marshal", "loads"), text("x")),
    "pickle in a pickle": call(named("pickle", "loads"), b"C\x03\x80\x02N"),
    "_pickle.Unpickler": call(named("_pickle", "Unpickler"), b"N"),
    "shelve.open": call(named("shelve", "open"), text(CANARY)),
    "logging.config": call(named("logging.config", "dictConfig"), b"}"),
    "logging file": call(named("logging", "FileHandler"), text(CANARY)),
    "timeit": call(named("timeit", "timeit"), PYTHON),
    "cProfile": call(named("cProfile", "run"), PYTHON),
    "bdb": call(named("bdb", "Bdb.run"), PYTHON),
    "pdb": call(named("pdb", "run"), PYTHON),
    "pydoc.pipepager": call(named("pydoc", "pipepager"), text(""), text(SHELL)),
    "webbrowser": call(named("webbrowser", "open"), text("file:///")),
    "shutil.rmtree": call(named("shutil", "rmtree"), text(".")),
    "pathlib writes": call(named("pathlib", "Path.write_text"), text(CANARY)),
    "tempfile": call(named("tempfile", "mktemp")),
    "signal.raise_signal": call(named("signal", "raise_signal"), number(9)),
    "sys.exit": call(named("sys", "exit"), b"K\0"),
    "exit": call(named("builtins", "exit")),
    "gc": call(named("gc", "get_objects")),
    "socket": call(named("socket", "create_connection"), text("localhost") + number(9) + b"\x86"),
    "urllib": call(named("urllib.request", "urlopen"), text("file:///etc/passwd")),
    "zipimport": call(named("zipimport", "zipimporter"), text("a.zip")),
    "pip": call(named("pip._internal", "main"), b"]"),
    "setuptools": call(named("setuptools.command.setopt", "edit_config"), text(CANARY)),
    "distutils": call(named("distutils.file_util", "write_file"), text(CANARY), b"]"),
    "of ckptx": call(named("ckptx.cli.main", "main"), b"]"),
    "code of ckptx": call(named("ckptx.containers.pickle_reader", "_Unpickler"), b"N"),
    "a stub of ckptx": call(named("ckptx.containers.pickle_values", "stub"), text("os"), text("x")),
    "weakref": call(named("weakref", "finalize"), b"N", SYSTEM, text(SHELL)),
    "atexit": call(named("atexit", "register"), SYSTEM, text(SHELL)),
    "copyreg.add_extension": call(
        named("copyreg", "add_extension"), text("os"), text("system"), b"K\1"
    ),
    "copyreg.__newobj__": call(named("copyreg", "__newobj__"), named("torch", "Size")),
    "copyreg of system": call(
        named("copyreg", "_reconstructor"), SYSTEM, named("builtins", "object"), b"N"
    ),
    "codecs.open": call(named("codecs", "open"), text(CANARY), text("w")),
    "_codecs.decode": call(named("_codecs", "decode"), text("x"), text("rot13")),
    "_codecs with a codec": call(named("_codecs", "encode"), text("x"), text("zlib_codec")),
    "collections.namedtuple": call(named("collections", "namedtuple"), text("x"), PYTHON),
    "enum made": call(named("enum", "EnumMeta"), text("x"), b")", b"}"),
    "type made": call(named("builtins", "type.__new__"), text("x"), b")", b"}"),
}

_NAMES = {
    "STACK_GLOBAL of the memo": text("system") + b"q\1" + text("posix") + b"q\2" + b"h\2h\1\x93",
    "STACK_GLOBAL of bytes": stacked(b"C\5posix", b"C\6system"),
    "STACK_GLOBAL of encoded bytes": stacked(
        call(named("_codecs", "encode"), text("posix")), text("system")
    ),
    "STACK_GLOBAL of numbers": stacked(b"K\1", b"K\2"),
    "STACK_GLOBAL of lists": stacked(b"]", b"]"),
    "STACK_GLOBAL of records": stacked(
        call(named("torch", "device"), text("cpu")), call(named("torch", "device"), text("cpu"))
    ),
    "STACK_GLOBAL of one name": text("posix") + b"\x93",
    "STACK_GLOBAL of none": b"\x93",
    "dots in a name": named("os", "path.os.system"),
    "dots through a namespace": named("argparse", "Namespace.__init__.__globals__"),
    "dots through a size": named("argparse", "_sys.modules"),
    "dots through a dictionary": named("collections", "OrderedDict.__class__.__base__"),
    "dots through a set": named("builtins", "set.__class__"),
    "dots through getattr": named("builtins", "getattr.__self__.eval"),
    "dots through encode": named("_codecs", "encode.__self__"),
    "leading dot": named(".os", "system"),
    "trailing dot": named("os.", "system"),
    "empty module": named("", "system"),
    "empty name": named("os", ""),
    "spaces": named(" os", "system "),
    "carriage return": named("os\r", "system"),
    "NUL": named("os\0", "system"),
    "full-width letters": named("\uff4f\uff53", "system"),
    "not UTF-8": b"c\xff\xfe\nsystem\n",
    "an escape": named("os\x1b[2J", "system"),
    "builtins by another name": named("builtins.builtins", "eval"),
    "dunder": named("builtins", "__build_class__"),
    "loader of builtins": named("builtins", "__loader__.load_module"),
    "a name of a megabyte": named("os", "x" * (1 << 20)),
}

_OPCODES = {
    "GET of nothing": b"h\x07",
    "LONG_BINGET of nothing": b"j\xff\xff\xff\xff",
    "GET as text": b"Nq\1g1\n",
    "PUT as text": b"Np1\n",
    "PUT below zero": b"Np-1\n",
    "PUT of nothing": b"q\0",
    "PUT far away": b"Nr\xff\xff\xff\x7f",
    "PUT a little far": b"Nr\xff\xff\xff\0",
    "MEMOIZE of nothing": b"\x94",
    "POP of nothing": b"0",
    "POP_MARK without mark": b"1",
    "DUP": b"N2",
    "TUPLE without mark": b"K\1K\2t",
    "TUPLE3 of two": b"K\1K\2\x87",
    "APPEND to a number": b"K\1K\2a",
    "APPEND to a tuple": b")K\2a",
    "APPENDS to a string": text("x") + b"(K\1K\2e",
    "APPENDS to a namespace": named("argparse", "Namespace") + b")R(K\1K\2e",
    "SETITEM of a list": b"]K\1K\2s",
    "SETITEM of a tuple": b")K\1K\2s",
    "SETITEMS of odd number": b"}(K\1K\2K\3u",
    "SETITEM of a storage": storage() + b"K\1K\2s",
    "ADDITEMS to a list": b"](K\1K\2\x90",
    "a list as key": b"}]K\2s",
    "a dictionary as key": b"}}K\2s",
    "a list in a set": b"\x8f(]\x90",
    "a list in a frozenset": b"(]\x91",
    "EXT1": b"\x82\1",
    "EXT2": b"\x83\1\0",
    "EXT4": b"\x84\1\0\0\0",
    "INST": b"(" + text(SHELL) + b"iposix\nsystem\n",
    "OBJ": b"(" + SYSTEM + text(SHELL) + b"o",
    "NEWOBJ of a function": SYSTEM + text(SHELL) + b"\x85\x81",
    "NEWOBJ of a string": text("x") + b")\x81",
    "NEWOBJ of getattr": GETATTR + b")\x81",
    "NEWOBJ without a tuple": named("argparse", "Namespace") + b"N\x81",
    "NEWOBJ_EX of a function": SYSTEM + text(SHELL) + b"\x85}\x92",
    "NEWOBJ_EX without a dictionary": named("torch", "Size") + b")N\x92",
    "NEWOBJ_EX of a size": named("torch", "Size") + b")}" + text("x") + b"K\1s\x92",
    "REDUCE of a number": b"K\1)R",
    "REDUCE of a storage": storage() + b")R",
    "REDUCE of a storage class": named("torch", "FloatStorage") + b"K\1\x85R",
    "REDUCE without a tuple": named("torch", "Size") + b"NR",
    "REDUCE of a string": text("os.system") + text(SHELL) + b"\x85R",
    "REDUCE of a namespace's object": named("argparse", "Namespace") + b")R)R",
    "BUILD of a number": b"K\1}" + text("x") + b"K\1sb",
    "BUILD of None": b"N}b",
    "BUILD of a list": b"]}" + text("append") + SYSTEM + b"sb",
    "BUILD of a dictionary": b"}}" + text("__class__") + SYSTEM + b"sb",
    "BUILD of getattr": GETATTR + b"}" + text("_call") + SYSTEM + b"sb",
    "BUILD of getattr's slots": GETATTR
    + b"N}"
    + text("_call")
    + named("torch", "Size")
    + b"s\x86b",
    "BUILD of a class": named("argparse", "Namespace") + b"}" + text("x") + b"K\1sb",
    "BUILD of a class's slots": named("torch", "Size") + b"N}" + text("x") + b"K\1s\x86b",
    "BUILD of a stub's class": named("torch.nn", "X") + b"N}" + text("args") + b"K\1s\x86b",
    "BUILD of a dtype": named("torch", "float32") + b"](" + text("os") + b"eb",
    "BUILD of a dtype with a list": named("torch", "float32") + b"]]ab",
    "BUILD of a dtype's slots": named("torch", "float32") + b"N}" + text("name") + b"]s\x86b",
    "BUILD of a storage": storage() + b"](N" + text("0") + b"]eb",
    "BUILD of a tensor": tensor() + b"](" + text("float32") + b"K\1K\1K\1K\1K\1eb",
    "BUILD of a tensor with lists": tensor() + b"](]]]]]]eb",
    "BUILD of an enum": named("torch.x", "E") + b")Rb",
    "BUILD with a namespace's class": (
        named("argparse", "Namespace")
        + b")RN}"
        + text("__class__")
        + named("torch", "Size")
        + b"s\x86b"
    ),
    "BUILD with a namespace's dictionary": (
        named("argparse", "Namespace") + b")RN}" + text("__dict__") + b"K\1s\x86b"
    ),
    "BUILD with keys that are no names": named("argparse", "Namespace") + b")R}K\1K\2sb",
    "persistent id: a number": b"K\1Q",
    "persistent id: a list": b"]Q",
    "persistent id: a storage": storage() + b"Q",
    "persistent id: short": b"(" + text("storage") + b"K\1K\2tQ",
    "persistent id: another kind": b"(" + text("module") + b"K\1K\2K\3K\4tQ",
    "persistent id: a class that is none": storage(kind="nn.Module"),
    "persistent id: a key that is a number": storage(key=b"K\1"),
    "persistent id: a size that is text": storage(numel=text("16")),
    "persistent id: a size that is true": storage(numel=b"\x88"),
    "persistent id as text": b"P1\n",
    "a frame that is too long": b"\x95\xff\xff\xff\xff\xff\xff\xff\x7fN\x85",
    "a string beyond the end": b"X\xff\xff\xff\x7fx",
    "a long string beyond the end": b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffx",
    "bytes beyond the end": b"B\xff\xff\xff\x7fx",
    "long bytes beyond the end": b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fx",
    "a bytearray beyond the end": b"\x96\xff\xff\xff\xff\xff\xff\xff\x7fx",
    "a buffer": b"\x97",
    "a read-only buffer": b"\x97\x98",
    "a number of negative length": b"\x8b\xff\xff\xff\xffx",
    "a number beyond the end": b"\x8b\xff\xff\xff\x7fx",
    "a number as text": b"L" + b"9" * 5000 + b"L\n",
    "an int as text": b"I1\n",
    "a float as text": b"F1.5\n",
    "a string as text": b"S'x'\n",
    "a unicode string as text": b"Vx\n",
    "a string that is not UTF-8": b"X\2\0\0\0\xff\xfe",
    "a lone surrogate": b"X\3\0\0\0\xed\xa0",
    "protocol 6": b"\x80\x06N",
    "protocol 255": b"\x80\xffN",
    "bytes of a number": call(named("builtins", "bytes"), number(1 << 40)),
    "a bytearray of a number": call(named("builtins", "bytearray"), number(1 << 40)),
    "a set of a dictionary": call(named("builtins", "set"), b"}"),
    "a size of a number": call(named("torch", "Size"), number(1 << 40)),
    "a dictionary of a number": call(named("collections", "OrderedDict"), b"K\1"),
    "a tensor of no storage": tensor(place=b"N"),
    "a tensor of a record": tensor(place=call(named("torch", "device"), text("cpu"))),
    "a tensor of an untyped storage": tensor(place=storage(kind="UntypedStorage")),
    "a tensor of a size that is a number": tensor(size=b"K\1"),
    "a tensor of strides that are None": tensor(stride=b"N"),
    "a tensor of too few arguments": call(named("torch._utils", "_rebuild_tensor_v2"), storage()),
    "a tensor without dtype": call(
        named("torch._utils", "_rebuild_tensor_v3"),
        *(storage(), b"K\0", b"K\1\x85", b"K\1\x85", b"\x89", b"N", text("float32")),
    ),
    "an unknown opcode": b"\xff",
}

REFUSED = {**_CODE, **_NAMES, **_OPCODES}

_ORDERED = named("collections", "OrderedDict") + b")R"

ODD = {
    "of the user": call(named("__main__", "Evil"), text(SHELL)),
    "an object of the user": named("__main__", "Evil") + b")\x81",
    "of a test": call(named("tests.hostile.conftest", "User"), b"N", b"N"),
    "case": named("OS", "System"),
    "prefix only": named("torchvision_evil", "x"),
    "prefix of numpy": named("numpyevil", "x"),
    "foreign code of torch": call(named("torch.hub", "load"), text("x"), text("y")),
    "foreign code of numpy": call(named("numpy.testing._private.utils", "runstring"), PYTHON, b"}"),
    "os through torch": call(named("torch", "os.system"), text(SHELL)),
    "os through numpy": call(named("numpy.f2py.os", "system"), text(SHELL)),
    "getattr of a stub": call(
        call(GETATTR, named("torch", "x"), text("__class__.__base__.__subclasses__"))
    ),
    "reconstructed array": call(
        named("numpy.core.multiarray", "_reconstruct"),
        *(named("numpy", "ndarray"), b"K\0\x85", b"C\1b"),
    )
    + b"(K\1K\1\x85N\x89C\0tb",
    "an array of objects": call(named("numpy", "ndarray"), b"K\1\x85", text("O")),
    "an enum of text": call(named("torch.x", "E"), text("__class__")),
    "an enum of a large number": call(named("signal", "Signals"), number(1 << 200)),
    "a record with attributes of a class": (
        named("torch.nn", "X")
        + b")\x81}"
        + text("__class__")
        + SYSTEM.replace(b"posix", b"torch")
        + b"sb"
    ),
    "a record whose state is itself": named("torch.nn", "X") + b")\x81q\1h\1b",
    "a namespace whose dictionary holds it": (
        named("argparse", "Namespace") + b")Rq\1}" + text("x") + b"h\1sb"
    ),
    "a namespace of odd names": named("argparse", "Namespace") + b")R}" + text("a b\0") + b"K\1sb",
    "a dictionary with other items": _ORDERED + b"}" + text("items") + b"K\1sb",
    "a dictionary with other methods": _ORDERED
    + b"}("
    + b"".join(text(name) + b"N" for name in ("items", "keys", "values", "get", "__iter__"))
    + b"ub",
    "a list of itself": b"]q\1h\1a",
    "a dictionary of itself": b"}q\1" + text("x") + b"h\1s",
    "a tuple of a list of itself": b"]q\1h\1\x85a",
    "lists of lists": bomb(b"]", b"](h%(i)sh%(i)se", 60),
    "tuples of tuples": bomb(b")", b"h%(i)sh%(i)s\x86", 60),
    "dictionaries of dictionaries": bomb(
        b"}", b"}(" + text("a") + b"h%(i)s" + text("b") + b"h%(i)su", 60
    ),
    "deep lists": b"]" * 3000 + b"a" * 2999,
    "deep tuples": b")" + b"\x85" * 3000,
    "deep records": b"N" + (b"q\1" + named("torch.nn", "X") + b"h\1\x85R") * 3000,
    "a large number": b"\x8b" + struct.pack("<I", 20_000) + b"\xff" * 19_999 + b"\x7f",
    "a key that is a number": b"}K\1K\2s",
    "a key that is None": b"}NK\2s",
    "a key that is a record": b"}" + named("torch.nn", "X") + b")\x81K\2s",
    "a key that is a tuple": b"})K\2s",
    "a key with NUL and escapes": b"}" + text("a\0b\nc\x1b[2Jd\u202e") + tensor() + b"s",
    "a key that leaves the directory": b"}" + text("../../x") + tensor() + b"s",
    "not a number": b"G\x7f\xf8\0\0\0\0\0\0",
    "a class": named("torch.nn", "Module"),
    "a dtype": named("torch", "float32"),
    "a storage": storage(),
    "a storage that is not there": storage(key=text("../../x")),
    "a storage too large": storage(numel=number(1 << 70)),
    "a tensor": tensor(),
    "a tensor of another key": tensor(place=storage(key=text("../../etc/passwd"))),
    "a tensor beyond its storage": tensor(size=number(1 << 40) + b"\x85"),
    "a tensor of negative size": tensor(size=number(-1) + b"\x85"),
    "a tensor of a huge offset": tensor(offset=number(1 << 70)),
    "a tensor of a negative offset": tensor(offset=number(-16)),
    "a tensor of an offset of text": tensor(offset=text("0")),
    "a tensor of sizes of text": tensor(size=text("x") + b"\x85", stride=text("y") + b"\x85"),
    "a tensor of sizes as a string": tensor(size=text("16"), stride=text("1")),
    "a tensor of nested sizes": tensor(size=b"K\1\x85\x85", stride=b"K\1\x85\x85"),
    "a tensor of strides of lists": tensor(stride=b"]\x85"),
    "a tensor of too many strides": tensor(stride=b"K\1K\1\x86"),
    "a tensor repeated 2**60 times": tensor(size=number(1 << 60) + b"\x85", stride=b"K\0\x85"),
    "a tensor of a thousand axes": tensor(
        size=b"(" + b"K\1" * 1000 + b"t", stride=b"(" + b"K\1" * 1000 + b"t"
    ),
    "a tensor of complex128": tensor(place=storage(kind="ComplexDoubleStorage", numel=b"K\4")),
    "a wrapper of nothing": call(
        named("torch._tensor", "_rebuild_from_type_v2"),
        *(
            named("torch._utils", "_rebuild_wrapper_subclass"),
            named("torch.x", "DTensor"),
            b")",
            b"N",
        ),
    ),
    "a wrapper with a state of tuples": call(
        named("torch._tensor", "_rebuild_from_type_v2"),
        named("torch._utils", "_rebuild_wrapper_subclass"),
        named("torch.distributed.tensor", "DTensor"),
        b"(N" + named("torch", "float32") + b"K\4\x85N" + b"t",
        bomb(b")", b"h%(i)sh%(i)s\x86", 60),
    ),
    "a shard of itself": call(
        named("torch._tensor", "_rebuild_from_type_v2"),
        named("torch._utils", "_rebuild_wrapper_subclass"),
        named("torch.distributed._shard.sharded_tensor.api", "ShardedTensor"),
        b"(N" + named("torch", "float32") + b"K\4\x85N" + b"t",
        b"(]q\1h\1aNNN" + b"t",
    ),
}
