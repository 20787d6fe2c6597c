"""The whole command, in its processes: there and back between transformers and Megatron Core."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.oracles import mcore
from tests.oracles.mcore import Layout

from .conversion import CLOSE, contents, convert, difference, sizes, strict_logits

ROOT = Path(__file__).parents[2]
CKPTX = [Path(sys.executable).with_name("ckptx")]
SCRIPT = [sys.executable, ROOT / "convert.py"]


def run(command: list, *arguments: object) -> str:
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("family", ["llama-2groups", "qwen2-tied"])
def test_there_and_back(family, source_of, tmp_path):
    source = source_of(family)
    one, two, back = (tmp_path / name for name in ("one", "two", "back"))
    run(
        SCRIPT,
        *("--model-type", "GPT", "--loader", "hf", "--saver", "core"),
        *("--load-dir", source.directory, "--save-dir", one),
        *("--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2),
    )
    found = mcore.read(None, Layout(tp=2, pp=2), one, source.tokens)
    assert difference(found[..., :131], source.logits) <= CLOSE

    # Megatron's alias, another form, other sizes, the iteration directory itself.
    options = ("--to", "mcore", "--tp", 4, "--pp", 1, "--ckpt-format", "torch")
    run(CKPTX, "convert", one / "release", two, *options)
    found = mcore.read(None, Layout(tp=4), two, source.tokens, format="torch")
    assert difference(found[..., :131], source.logits) <= CLOSE

    run(CKPTX, "convert", two, back, "--to", "hf")
    assert contents(back) == contents(source.directory)
    for one_side, other_side in ((source.directory, one), (one, two), (two, back)):
        report = json.loads(run(CKPTX, "verify", one_side, other_side, "--json"))
        assert report["equal"] is True
    assert json.loads(run(CKPTX, "inspect", two, "--json"))


def test_what_megatron_wrote(source_of, tmp_path):
    source, layout = source_of("qwen3"), Layout(pp=2, vpp=2)
    model = source.megatron("te", layout)
    expected = mcore.write(model, layout, tmp_path / "core", source.tokens)
    options = ("--to", "hf", "--hf-base", source.directory, "--json")
    report = json.loads(run(CKPTX, "convert", tmp_path / "core", tmp_path / "hf", *options))
    assert report["families"] == {"language": "qwen3"}
    found = strict_logits(tmp_path / "hf", source.tokens)
    assert difference(found, expected[..., :131]) <= CLOSE


def test_processes_change_nothing(source_of, tmp_path):
    """What tests convert in their own process is what the command writes, run after run."""
    source, layout = source_of("llama"), Layout(tp=2, pp=2)
    for name in ("first", "second"):
        options = ("--to", "core", "--tp", layout.tp, "--pp", layout.pp, "--quiet")
        run(CKPTX, "convert", source.directory, tmp_path / name, *options)
    convert(source.directory, tmp_path / "here", "core", **sizes(layout))
    assert contents(tmp_path / "first") == contents(tmp_path / "here")
    manifests = [
        (tmp_path / name / "release" / "ckptx-manifest.json").read_bytes()
        for name in ("first", "second")
    ]
    assert manifests[0] == manifests[1]
    assert str(tmp_path).encode() not in manifests[0]
