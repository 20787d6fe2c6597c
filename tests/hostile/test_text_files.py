"""Hostile JSON and YAML beside the weights, and files that lead elsewhere."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
import torch

from tests.work import at_most

GIB = 1 << 30
INDEX = "model.safetensors.index.json"

JSON = {
    "deep lists": '{"a":' + "[" * 200_000,
    "deep, and closed": '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
    "deep objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "a huge number": '{"hidden_size":' + "9" * 100_000 + "}",
    "a huge exponent": '{"hidden_size":1e999999999}',
    "not UTF-8": b'{"a":"\xff\xfe"}',
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "NUL": '{"a":1}\0\0',
    "a name only": '"x"',
    "a number only": "1",
    "nothing": "",
    "a string without end": '{"a":"',
    "a million braces": "{" * 1_000_000,
}
VALUES = {
    "NaN": float("nan"),
    "infinity": float("inf"),
    "a large number": 10**30,
    "4300 digits": 10**4299,
    "negative": -1,
    "zero": 0,
    "half": 0.5,
    "true": True,
    "none": None,
    "text": "16",
    "a list": [16],
    "an object": {"a": 16},
    "deep": json.loads("[" * 500 + "]" * 500),
}
FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "intermediate_size", "head_dim", "rope_theta", "rms_norm_eps", "hidden_act"),
    *("architectures", "model_type", "tie_word_embeddings", "torch_dtype", "rope_scaling"),
    *("quantization_config", "max_position_embeddings"),
)


def is_one_line(user, code: int, *, refused: bool = True) -> None:
    assert "internal error" not in user.errors, user.errors
    assert " failed: " not in user.errors, user.errors
    assert "Traceback" not in user.errors
    lines = [line for line in user.errors.splitlines() if line.startswith("error: ")]
    # What can still be shown is shown, with what is wrong under its health.
    assert len(lines) == (code != 0) or (not refused and "health " in user.output)
    assert code in ((1,) if refused else (0, 1)), user.errors
    assert all(len(line) < 5000 and line.isprintable() for line in lines)


@pytest.fixture
def llama(user, write_llama):
    return write_llama(user.source, shards=2)


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_json(file, name, llama, user):
    content = JSON[name]
    (llama / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with at_most():
        code = user.run("inspect", user.source)
    is_one_line(user, code, refused=False)


@pytest.mark.full
@pytest.mark.parametrize("name", ["deep, and closed", "a huge number", "not UTF-8"])
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_json_of_a_conversion(file, name, llama, user):
    content = JSON[name]
    (llama / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    code = user.run("convert", user.source, user.target, "--to", "core")
    is_one_line(user, code)
    assert list(user.place.iterdir()) == [user.source]


@pytest.mark.parametrize(
    "field",
    [
        pytest.param(one, marks=pytest.mark.full if place % 4 else ())
        for place, one in enumerate(FIELDS)
    ],
)
def test_values_of_a_config(field, llama, user):
    from ckptx.errors import CkptxError
    from ckptx.registry.open import open_checkpoint

    config = json.loads((llama / "config.json").read_text())
    stumbled = []
    for name, value in VALUES.items():
        (llama / "config.json").write_text(json.dumps(config | {field: value}))
        try:
            open_checkpoint(user.source, "hf")
        except CkptxError as error:
            stumbled += [f"{name}: long"] * (len(str(error)) > 5000)
        except Exception as error:
            stumbled.append(f"{name}: {error!r:.200}")
    assert not stumbled, "\n".join(stumbled)


def test_keys_that_are_given_twice(llama, user):
    """JSON readers differ in which they keep: an index that does not say is refused."""
    text = (llama / INDEX).read_text()
    (llama / INDEX).write_text(
        text.replace('"weight_map": {', '"weight_map": {"a": "x", "a": "y", ')
    )
    code = user.run("convert", user.source, user.target, "--to", "core")
    is_one_line(user, code)


@pytest.mark.parametrize(
    "shard",
    [
        *("../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors", "", ".", "..", "/"),
        *("a\0b", "x" * 300, "x/y.safetensors", "secret.safetensors\n", 1, None, ["x"], {"a": 1}),
    ],
)
def test_an_index_that_points_elsewhere(shard, llama, user):
    (user.place / "secret.safetensors").write_bytes(b"secret")
    index = json.loads((llama / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = shard
    (llama / INDEX).write_text(json.dumps(index))
    code = user.run("inspect", user.source)
    is_one_line(user, code, refused=False)
    assert "secret" not in user.output.replace("secret.safetensors", "")


@pytest.mark.parametrize("count", [10_000, pytest.param(1_000_000, marks=pytest.mark.full)])
def test_an_index_of_many_tensors(count, llama, user):
    """The work grows with their number, and no faster."""
    index = {"weight_map": {f"a{n}": f"b{n}.safetensors" for n in range(count)}}
    (llama / INDEX).write_text(json.dumps(index))
    with at_most(2_000_000 + 50 * count):
        code = user.run("inspect", user.source)
    is_one_line(user, code, refused=False)
    assert len(user.output + user.errors) < 5000


@pytest.mark.full
@pytest.mark.parametrize("name", ["/dev/zero", "/dev/stdin", "/proc/self/mem", "loop", "directory"])
@pytest.mark.parametrize("file", ["config.json", INDEX, "model-00001-of-00002.safetensors"])
def test_links(file, name, llama, user):
    """Links to devices are no files; one to itself is none either."""
    path = llama / file
    path.unlink()
    if name == "directory":
        path.mkdir()
    else:
        path.symlink_to(path.name if name == "loop" else name)
    code = user.run("inspect", user.source)
    is_one_line(user, code, refused=False)


def test_a_pipe_for_a_file(llama, user):
    """Opening a pipe waits for a writer: nobody does."""
    for file in ("config.json", "tokenizer.json", "model-00001-of-00002.safetensors", INDEX):
        path = llama / file
        kept = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        code = user.run("inspect", user.source, "--from", "hf")
        is_one_line(user, code, refused=False)
        path.unlink()
        if kept is not None:
            path.write_bytes(kept)


LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)
)
YAML = {
    "a call": "convertor: !!python/object/apply:os.system ['touch executed']\n",
    "a new object": "convertor: !!python/object/new:os.system ['touch executed']\n",
    "a module": "convertor: !!python/module:antigravity\n",
    "a name": "convertor: !!python/name:os.system\n",
    "a billion laughs": LAUGHS + "convertor: {ckpt_path: *a39, save_path: *a39}\n",
    "laughs as a key": LAUGHS + "convertor: *a39\n",
    "laughs as names": LAUGHS + "convertor: {? *a39 : 1}\n",
    "itself": "convertor: &a {ckpt_path: *a, save_path: *a}\n",
    "deep": "convertor: " + "[" * 20_000,
    "deep blocks": "".join(" " * n + "a:\n" for n in range(1000)),
    "merges": "a: &a {b: 1}\nconvertor:\n  <<: [*a, 1]\n",
    "not UTF-8": b"convertor: \xff\xfe\n",
    "control characters": "convertor: {ckpt_path: a\x1b[2J}\n",
    "a time": "convertor: {ckpt_path: 2001-99-99, save_path: 99999-01-01}\n",
    "a large number": "convertor: {ckpt_path: " + "9" * 5000 + "}\n",
    "a sexagesimal": "convertor: {ckpt_path: " + "1:" * 5000 + "1}\n",
    "many documents": "--- 1\n" * 1000,
    "empty": "",
}


@pytest.mark.parametrize("name", YAML)
def test_yaml(name, user, monkeypatch):
    monkeypatch.chdir(user.place)
    file = user.place / "convertor.yaml"
    content = YAML[name]
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with at_most():
        code = user.run("from-config", file)
    assert code in (1, 2), user.output[:500]
    assert "internal error" not in user.errors
    (line,) = [line for line in user.errors.splitlines() if line.startswith("error: ")]
    assert line.isprintable()
    assert len(line) < 5000
    assert list(user.place.iterdir()) == [file]


def limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2 * GIB, 2 * GIB))
    resource.setrlimit(resource.RLIMIT_CPU, (20, 20))


def claims(path: Path, name: str) -> None:
    """Write a file of some bytes that claims to be large."""
    import struct

    from .test_pickles import archive

    if name == "a sparse header":
        with path.open("wb") as file:
            file.write(struct.pack("<Q", 99_999_999) + b"{")
            file.truncate(200_000_000)
    elif name == "a sparse pickle":
        archive(path, b"\x80\x02N.")
        with path.open("r+b") as file:
            file.truncate(1 << 40)
    elif name == "a number of a hundred megabytes":
        archive(path, b"\x80\x02\x8b" + struct.pack("<i", 100 << 20) + bytes(99 << 20))
    else:
        torch.save({"a": torch.zeros(1).expand(1 << 50)}, path)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("a sparse header", "model.safetensors"),
        ("a sparse pickle", "model.pt"),
        ("a number of a hundred megabytes", "model.pt"),
        ("a tensor of a petabyte", "model.pt"),
    ],
)
def test_claims_under_limits(name, file, user):
    """In 2 GiB of addresses and 20 seconds of processor time, threads' stacks included."""
    user.source = user.place / file
    claims(user.source, name)
    form = "pytorch" if file.endswith(".pt") else "hf"
    arguments = ("convert", user.source, user.target, "--from", form, "--to", "hf")
    code = user.run_apart(*arguments, preexec_fn=limit)
    is_one_line(user, code)
    assert list(user.place.iterdir()) == [user.source]
