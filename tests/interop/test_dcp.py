"""FSDP: what `torch.distributed.checkpoint` saves is read, what is written it loads."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from ckptx.errors import FormatError
from tests.oracles import fsdp, hf

from .conversion import contents, convert

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def base(source):
    return {"hf_base": source.directory}


@pytest.mark.parametrize(
    ("family", "world", "container"),
    [
        ("llama", 2, ()),
        ("qwen2-tied", 3, ("model",)),
        pytest.param("mistral", 4, ("app", "model"), marks=pytest.mark.full),
        pytest.param("qwen3", 2, ("fsdp_checkpoint", "model"), marks=pytest.mark.full),
    ],
)
def test_an_fsdp_checkpoint_becomes_the_model_it_was(family, world, container, source_of, tmp_path):
    source = source_of(family)
    fsdp.save(source.directory, tmp_path / "dcp", world, container)
    facts = convert(tmp_path / "dcp", tmp_path / "hf", "hf", **base(source))
    assert contents(tmp_path / "hf") == contents(source.directory)
    assert ("optimizer" in {drop["name"] for drop in facts.dropped}) == bool(container)


@pytest.mark.parametrize(
    ("family", "world", "shards", "container"),
    [
        ("llama", 2, 3, ()),
        ("qwen2-tied", 3, 1, ("app", "model")),
        pytest.param("qwen3", 4, 2, ("model",), marks=pytest.mark.full),
    ],
)
def test_an_fsdp_model_loads_what_is_written(family, world, shards, container, source_of, tmp_path):
    source = source_of(family)
    options = {"shards": shards, "target_container": ".".join(container)}
    convert(source.directory, tmp_path / "dcp", "dcp", **options)
    found = fsdp.load(tmp_path / "dcp", source.directory, world, container)
    expected = load_file(source.directory / "model.safetensors")
    tied = {"lm_head.weight"} if family == "qwen2-tied" else set()
    assert set(found) == set(expected) | tied
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_megatron_becomes_dcp_and_comes_back(source_of, tmp_path):
    source = source_of("qwen2")
    convert(source.directory, tmp_path / "core", "core", target_tensor_parallel_size=2)
    convert(tmp_path / "core", tmp_path / "dcp", "dcp", shards=2)
    convert(tmp_path / "dcp", tmp_path / "hf", "hf")
    assert contents(tmp_path / "hf") == contents(source.directory)


def test_names_that_wrappers_changed(tmp_path):
    hf.llama(tmp_path / "model", num_hidden_layers=2)
    state = load_file(tmp_path / "model" / "model.safetensors")
    wrapped = {
        "_orig_mod." + n.replace("layers.1.", "layers.1._checkpoint_wrapped_module."): t
        for n, t in state.items()
    }
    dcp.save(wrapped, checkpoint_id=str(tmp_path / "dcp"))
    convert(tmp_path / "dcp", tmp_path / "hf", "hf", hf_base=tmp_path / "model")
    assert contents(tmp_path / "hf") == contents(tmp_path / "model")


def test_two_models_in_one_checkpoint_must_be_told_apart(tmp_path):
    hf.llama(tmp_path / "model", num_hidden_layers=2)
    state = load_file(tmp_path / "model" / "model.safetensors")
    other = {name: tensor + 1 for name, tensor in state.items()}
    dcp.save({"actor": state, "critic": other}, checkpoint_id=str(tmp_path / "dcp"))
    with pytest.raises(FormatError, match="found 'actor', 'critic'; say which with --container"):
        convert(tmp_path / "dcp", tmp_path / "hf", "hf", hf_base=tmp_path / "model")
    chosen = {"loader_options": {"container": "actor"}, "hf_base": tmp_path / "model"}
    convert(tmp_path / "dcp", tmp_path / "hf", "hf", **chosen)
    assert contents(tmp_path / "hf") == contents(tmp_path / "model")
