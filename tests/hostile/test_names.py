"""Names that come from files: nothing is written elsewhere, and nothing odd reaches a terminal."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from .conftest import fingerprint

HOSTILE = {
    "a way up": "../../x",
    "absolute": "/tmp/ckptx-hostile/x",
    "home": "~/x",
    "NUL": "a\0b",
    "a new line": "a\nerror: b",
    "a return": "a\rb",
    "an escape": "a\x1b[2J\x1b]0;owned\x07b",
    "an eight-bit escape": "a\x9b2Jb",
    "written backwards": "a\u202eb",
    "no width": "a\u200bb",
    "a line of Unicode": "a\u2028b",
    "empty": "",
    "a dot": ".",
    "two dots": "..",
    "a megabyte": "x" * (1 << 20),
    "a surrogate": "a\\ud800b",
    "markup": "<script>alert(1)</script>",
    "a format": "%s%n{0.__class__}",
    "a name of an index": "__metadata__x",
}
CONFIG = {"architectures": ["OddForCausalLM"], "model_type": "odd"}


def weights(path: Path, name: str) -> None:
    """A safetensors file of one tensor, whose name need not be one that libraries write."""
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header = json.dumps({name: entry}).replace("\\\\ud800", "\\ud800").encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<4f", 1, 2, 3, 4))


def sample(*everyday: str) -> list:
    """All names, those of every day and others for the whole grid."""
    return [
        pytest.param(name, marks=() if name in everyday else pytest.mark.full) for name in HOSTILE
    ]


@pytest.fixture(params=sample("a way up", "an escape"))
def named(request, user):
    user.source.mkdir()
    (user.source / "config.json").write_text(json.dumps(CONFIG))
    weights(user.source / "model.safetensors", HOSTILE[request.param])
    return HOSTILE[request.param]


def is_harmless(user, code: int, shown: bool = False) -> None:
    """One line refuses it, or `inspect` has ``shown`` it and says what does not fit."""
    assert "internal error" not in user.errors
    assert "Traceback" not in user.errors
    assert " failed: " not in user.errors
    for line in (user.output + user.errors).split("\n"):
        assert line.isprintable(), line[:200]
    if code and not (shown and "health" in user.output):
        lines = [line for line in user.errors.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, user.errors[:500]
        assert len(lines[0]) < 5000


@pytest.mark.parametrize("saver", ["hf", "pytorch", "dcp"])
def test_tensors(saver, named, user):
    """Either the target has the tensor, or there is no target; nothing else is there."""
    before = fingerprint(user.source)
    code = user.run("convert", user.source, user.target, "--to", saver)
    is_harmless(user, code)
    assert fingerprint(user.source) == before
    assert {path.name for path in user.place.iterdir()} <= {"source", "target"}
    assert user.target.exists() == (code == 0)
    if code == 0:
        assert len(list(user.target.rglob("*"))) < 6
        code = user.run("verify", user.source, user.target, "--from-b", saver)
        is_harmless(user, code)
        assert code == 0


@pytest.mark.parametrize("command", ["inspect", "print-tensor", "plan", "verify"])
def test_shown(command, named, user):
    arguments = {"plan": [user.target, "--to", "hf"], "verify": [user.source]}.get(command, [])
    code = user.run(command, user.source, *arguments)
    is_harmless(user, code)
    assert list(user.place.iterdir()) == [user.source]


@pytest.mark.parametrize("name", sample("a megabyte", "an escape"))
def test_missing_and_left_over(name, user, write_llama):
    """Of a model that is known, a tensor too many is named in the one line that refuses it."""
    write_llama(user.source)
    (user.source / "model.safetensors").unlink()
    weights(user.source / "model.safetensors", HOSTILE[name])
    code = user.run("convert", user.source, user.target, "--to", "core")
    is_harmless(user, code)
    assert code == 1
    assert list(user.place.iterdir()) == [user.source]


@pytest.mark.parametrize("name", sample("an escape"))
def test_keys_of_a_pickle(name, user):
    user.source = user.place / "model.pt"
    torch.save({"w": torch.ones(2), HOSTILE[name]: 1, "o": {HOSTILE[name]: 2}}, user.source)
    for saver in ("pytorch", "core"):
        code = user.run("convert", user.source, user.target, "--to", saver)
        is_harmless(user, code)
    assert {path.name for path in user.place.iterdir()} <= {"model.pt", "target"}


@pytest.mark.parametrize("name", ["a new line", "an escape", "written backwards"])
def test_paths(name, user, write_llama):
    """Directories may be called anything; what is said of them is one clean line."""
    user.source = user.place / HOSTILE[name]
    write_llama(user.source)
    (user.source / "model.safetensors").write_bytes(b"no")
    code = user.run("convert", user.source, user.target, "--to", "hf")
    is_harmless(user, code)
    assert code == 1


@pytest.mark.full
@pytest.mark.parametrize("field", ["architectures", "model_type", "torch_dtype", "hidden_act"])
@pytest.mark.parametrize("name", ["an escape", "a new line", "a megabyte", "NUL"])
def test_words_of_a_config(field, name, user, write_llama):
    value = HOSTILE[name]
    write_llama(user.source, **{field: [value] if field == "architectures" else value})
    for saver in ("core", "hf"):
        code = user.run("convert", user.source, user.target, "--to", saver, "--overwrite")
        is_harmless(user, code)
    code = user.run("inspect", user.source)
    is_harmless(user, code, shown=True)
