"""``convert --verify``: the target is compared with the source that it was made from."""

from __future__ import annotations

import json

import pytest

from ckptx.conversion import supervisor


@pytest.fixture
def damaged(monkeypatch):
    """Let the disk change one byte of a target between its conversion and the comparison."""
    convert = supervisor.convert

    def convert_and_damage(job, progress):
        report = convert(job, progress)
        with (job.target / "model.safetensors").open("r+b") as file:
            file.seek(-3, 2)
            byte = file.read(1)
            file.seek(-3, 2)
            file.write(bytes([byte[0] ^ 1]))
        return report

    monkeypatch.setattr(supervisor, "convert", convert_and_damage)


@pytest.mark.parametrize(
    "to",
    [
        ("core", "--tp", 2, "--pp", 2),
        ("core", "--ckpt-format", "torch"),
        ("legacy",),
        ("pytorch",),
        ("dcp",),
        ("meta",),
    ],
    ids=lambda to: "-".join(map(str, to)),
)
def test_equal_in_every_format_also_after_a_cast(run, write_llama, tmp_path, to):
    source, target = write_llama(tmp_path / "llama"), tmp_path / "target"
    options = ("--dtype", "bf16", "--verify", "--json")
    code, out, err = run("convert", source, target, "--to", *to, *options)
    assert (code, err) == (0, "")
    found = json.loads(out)["verification"]
    assert found["equal"] is True
    assert found["tensors"] == 31  # 4 layers of 7, embeddings, norm, head: query to value are one
    assert found["bytes"] == sum(
        2 * 16 * rows for rows in (37, 37, 1, *[16 + 8 + 8 + 16 + 24 + 24 + 24 + 1 + 1] * 4)
    )


def test_text_says_which_is_which(run, write_llama, tmp_path):
    source, target = write_llama(tmp_path / "llama"), tmp_path / "target"
    code, out, _ = run("convert", source, target, "--to", "hf", "--verify")
    assert code == 0
    assert "verified" in out
    assert out.splitlines()[-1].startswith("equal: 31 tensors")


def test_a_target_that_differs_stays_and_is_said(run, write_llama, tmp_path, damaged):
    source, target = write_llama(tmp_path / "llama"), tmp_path / "target"
    code, out, err = run("convert", source, target, "--to", "hf", "--verify")
    assert code == 1
    assert "not equal: 1 different of 31 tensors" in out
    assert err == f"error: {target}: differs from its source; the target stays there\n"
    assert (target / "model.safetensors").is_file()


def test_json_of_a_target_that_differs_names_the_tensor(run, write_llama, tmp_path, damaged):
    source, target = write_llama(tmp_path / "llama"), tmp_path / "target"
    code, out, _ = run("convert", source, target, "--to", "hf", "--verify", "--json")
    found = json.loads(out)["verification"]
    assert (code, found["equal"]) == (1, False)
    assert [(one["kind"], one["elements"]) for one in found["differences"]] == [("different", 1)]


def test_a_target_that_cannot_be_read_is_said_to_stay(run, write_llama, tmp_path, monkeypatch):
    convert = supervisor.convert

    def convert_and_cut(job, progress):
        report = convert(job, progress)
        (job.target / "model.safetensors").write_bytes(b"")
        return report

    monkeypatch.setattr(supervisor, "convert", convert_and_cut)
    source, target = write_llama(tmp_path / "llama"), tmp_path / "target"
    code, out, err = run("convert", source, target, "--to", "hf", "--verify")
    assert (code, out) == (1, "")
    assert err.startswith(
        f"error: {target}: converted, and the target stays; but it was not verified: "
    )
