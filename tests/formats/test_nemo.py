"""NeMo 2: the model in ``context/model.yaml``, the weights behind ``module.``, and no args."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from ckptx.errors import CkptxError
from ckptx.registry import registry
from tests.golden.megatron.cases import BRIDGE
from tests.interop.conversion import convert

from .test_bridge import check
from .test_megatron_versions import GOLDEN

LLAMA = "nemo.collections.llm.gpt.model.llama."


@pytest.fixture
def saved(tmp_path):
    """A run of Bridge's, arranged as NeMo 2 arranges it; the fields of both are the same."""
    source, target = GOLDEN / BRIDGE / "iter_0000000", tmp_path / "nemo"
    reader = dcp.FileSystemReader(source)
    tensors = {
        name: torch.empty(one.size, dtype=one.properties.dtype)
        for name, one in reader.read_metadata().state_dict_metadata.items()
        if hasattr(one, "size")
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    named = {f"module.{name}": tensor for name, tensor in tensors.items()}
    dcp.save(named, storage_writer=dcp.FileSystemWriter(target / "weights"), no_dist=True)
    shutil.copy(source / "metadata.json", target / "weights")
    torch.save({"global_step": 10, "epoch": 0}, target / "weights" / "common.pt")
    (target / "context").mkdir()
    model = yaml.safe_load((source / "run_config.yaml").read_text())["model"]
    fields = {name: value for name, value in model.items() if name not in OF_BRIDGE}
    fields["_target_"] = f"{LLAMA}Llama3Config8B"
    write(target, fields)
    return target


OF_BRIDGE = {"should_pad_vocab", "hf_model_id", "mtp_enabled", "restore_modelopt_state"}


def write(target, fields):
    model = {"_target_": f"{LLAMA}LlamaModel", "config": fields, "optim": None}
    (target / "context" / "model.yaml").write_text(yaml.safe_dump(model))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("part", ["", "weights"])
def test_the_context_describes_the_weights(part, saved, tmp_path):
    assert registry.detect(saved / part) == "core"
    check(saved / part, tmp_path / "hf")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_scaling_of_llama_3_is_that_of_its_fields(saved, tmp_path):
    context = yaml.safe_load((saved / "context" / "model.yaml").read_text())["config"]
    scaled = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
    named = {**context, **scaled, "scale_factor": 32.0, "_target_": f"{LLAMA}Llama32Config1B"}
    write(saved, named)
    convert(saved, tmp_path / "hf", "hf")
    config = yaml.safe_load((tmp_path / "hf" / "config.json").read_text())
    assert config["rope_scaling"]["factor"] == 32.0
    write(saved, named | {"old_context_len": 4096})
    with pytest.raises(CkptxError, match="Llama32Config1B has 'old_context_len'"):
        convert(saved, tmp_path / "refused", "hf")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_without_a_context_the_config_is_asked_for(saved, tmp_path):
    write(saved, {"num_layers": 2})
    with pytest.raises(CkptxError, match=r"holds no args .*--hf-base"):
        convert(saved, tmp_path / "refused", "hf")
