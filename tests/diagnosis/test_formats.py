"""Mistakes are told across formats, and in files that real frameworks have written."""

from __future__ import annotations

import shutil

import pytest

from ckptx.cli import main as cli
from ckptx.verification.compare import compare

torch = pytest.importorskip("torch")


def convert(source, target, *options):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["convert", str(source), str(target), "--quiet", *map(str, options)])
    assert not stopped.value.code
    return target


def only(comparison):
    (finding,) = comparison.diagnoses
    assert len(finding.tensors) == len(comparison.differences)
    return finding


@pytest.fixture
def llama(weights_of, tmp_path):
    weights = weights_of("llama")
    return weights.write(tmp_path / "llama", weights.copy())


def test_megatron_with_a_mistake(weights_of, llama, tmp_path):
    weights = weights_of("llama")
    state = weights.copy()
    for name in weights.state:
        if "gate_proj" in name:
            other = name.replace("gate", "up")
            state[name], state[other] = state[other], state[name]
    wrong = weights.write(tmp_path / "wrong", state)
    megatron = convert(wrong, tmp_path / "core", "--to", "core", "--tp", 4, "--pp", 3)
    ranks = convert(wrong, tmp_path / "ranks", "--to", "core", "--tp", 2, "--ckpt-format", "torch")
    assert compare(megatron, ranks).equal
    for one in (megatron, ranks):
        assert only(compare(llama, one)).mistakes == ("gate-up-exchanged",)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_dcp_of_torch(weights_of, llama, tmp_path):
    import torch.distributed.checkpoint as dcp

    weights = weights_of("llama")
    state = weights.copy()
    target = tmp_path / "dcp"
    dcp.save({"model": state}, checkpoint_id=target, no_dist=True)
    shutil.copy(llama / "config.json", target)
    assert compare(llama, target).equal
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    shutil.rmtree(target)
    dcp.save({"model": state}, checkpoint_id=target, no_dist=True)
    shutil.copy(llama / "config.json", target)
    assert only(compare(llama, target)).mistakes == ("head-overwritten",)


def test_legacy_files_of_another_version_than_they_say(weights_of, tmp_path):
    weights = weights_of("square")
    source = weights.write(tmp_path / "hf", weights.copy())
    legacy = convert(source, tmp_path / "legacy", "--to", "legacy", "--tp", 2)
    assert compare(source, legacy).equal
    for file in legacy.rglob("*.pt"):
        content = torch.load(file, weights_only=False)
        content["checkpoint_version"] = 0
        torch.save(content, file)
    assert only(compare(source, legacy)).mistakes == ("qkv-order",)


def test_manifest_of_another_directory(llama, tmp_path):
    from ckptx.verification.manifest_check import check

    first = convert(llama, tmp_path / "first", "--to", "hf")
    copy = shutil.copytree(first, tmp_path / "copy")
    assert check(copy, first / "ckptx-manifest.json").equal
