"""Families of other packages: found by their entry point, tested by their own suites."""

from __future__ import annotations

import json
import shutil

import pytest

from ckptx.testing.models import read_safetensors
from tests.families.conftest import ROOT, declare, run
from tests.oracles import hf

OLMO2 = ROOT / "schemas" / "families" / "dense" / "olmo2.py"
NEUTRAL = {
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 0.5,
}


def suite(*arguments, **where):
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, **where)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    return done.stdout


def test_the_example_passes_its_tests(granite):
    place = ROOT / "examples" / "ckptx-family" / "tests"
    suite(place, "-k", "comes_back or refused or other_formats", path=granite)


@pytest.fixture(scope="module")
def core(granite, tmp_path_factory):
    """A Granite with neutral factors, and what Megatron gets of it."""
    place = tmp_path_factory.mktemp("core")
    config = hf.granite(place / "hf", num_attention_heads=16, **NEUTRAL)
    assert config.hidden_size // config.num_attention_heads == 4
    for formats in ("torch_dist", "torch"):
        done = run(
            *("-m", "ckptx", "convert", place / "hf", place / formats, "--to", "core"),
            *("--ckpt-format", formats, "--tp", "2"),
            path=granite,
        )
        assert done.returncode == 0, done.stderr
    return place


@pytest.mark.parametrize("name", ["torch_dist", "torch"])
def test_without_its_package_the_error_says_what_to_install(name, core, tmp_path):
    done = run("-m", "ckptx", "convert", core / name, tmp_path / "back", "--to", "hf")
    assert done.returncode != 0
    assert "pip install ckptx-granite" in done.stderr
    assert "ckptx-granite 0.1.0" in done.stderr


def test_the_command_brings_it_back(core, granite, tmp_path):
    done = run("-m", "ckptx", "convert", core / "torch", tmp_path / "b", "--to", "hf", path=granite)
    assert done.returncode == 0, done.stderr
    assert read_safetensors(tmp_path / "b") == read_safetensors(core / "hf")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["model_type"] == "granite"


def test_a_family_taken_out_of_the_tree_is_a_package(tmp_path):
    """OLMo 2's own file, installed beside a ckptx that lacks it, passes OLMo 2's interop tests."""
    tree, site = tmp_path / "tree", tmp_path / "site"
    ours = shutil.ignore_patterns("__pycache__", OLMO2.name)
    for name in ("ckptx", "schemas", "plugins"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ours)
    for name in ("interop", "oracles", "schemas", "families"):
        python = shutil.ignore_patterns("__pycache__", "*.json", "*.safetensors", "data")
        shutil.copytree(ROOT / "tests" / name, tree / "tests" / name, ignore=python)
    for name in ("pyproject.toml", "tests/__init__.py", "tests/conftest.py"):
        shutil.copy(ROOT / name, tree / name)
    declare(site, "ckptx-olmo2", "schema_olmo2 = ckptx_olmo2:FAMILY")
    shutil.copy(OLMO2, site / "ckptx_olmo2.py")
    path = (tree, site)
    asked = (
        "from ckptx.registry import registry; import ckptx;"
        "print(registry.family_owner('olmo2').distribution, ckptx.__file__)"
    )
    done = run("-c", asked, path=path, cwd=tree)
    assert done.stdout.split() == ["ckptx-olmo2", str(tree / "ckptx" / "__init__.py")], done.stderr
    found = suite("tests/interop/test_dense_families.py", "-k", "olmo2", path=path, cwd=tree)
    assert " passed" in found
    suite("tests/schemas/test_dense_configs.py", "-k", "olmo2", path=path, cwd=tree)
