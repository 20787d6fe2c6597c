"""Settings that the files of a Megatron checkpoint prove need not be in its args."""

from __future__ import annotations

import pytest
import torch

from ckptx.errors import CkptxError
from tests.interop.conversion import convert
from tests.oracles import hf

UNEVEN = {"target_pipeline_parallel_size": 2, "decoder_first_pipeline_num_layers": 1}
VIRTUAL = {"target_pipeline_parallel_size": 2, "pipeline_model_parallel_layout": "Et|tt|t|L"}


def with_args(root, **changes):
    """Change the args of every rank's file; None takes an entry away."""
    for file in root.glob("*/mp_rank_*/model_optim_rng.pt"):
        state = torch.load(file, weights_only=False)
        for name, value in changes.items():
            if value is None:
                vars(state["args"]).pop(name, None)
            else:
                setattr(state["args"], name, value)
        torch.save(state, file)


@pytest.mark.parametrize(
    ("layers", "stages", "names"),
    [
        (3, UNEVEN, ["decoder_first_pipeline_num_layers"]),
        (4, UNEVEN, ["decoder_first_pipeline_num_layers"]),
        (4, VIRTUAL, ["pipeline_model_parallel_layout", "virtual_pipeline_model_parallel_size"]),
    ],
)
def test_layers_are_where_the_files_have_them(layers, stages, names, tmp_path):
    hf.llama(tmp_path / "hf", num_hidden_layers=layers)
    convert(tmp_path / "hf", tmp_path / "core", "core", ckpt_format="torch", **stages)
    with_args(tmp_path / "core", **dict.fromkeys(names))
    convert(tmp_path / "core", tmp_path / "back", "hf")
    expected, found = hf.weights(tmp_path / "hf"), hf.weights(tmp_path / "back")
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    # What comes of it at the same sizes is placed alike.
    convert(tmp_path / "core", tmp_path / "same", "core", ckpt_format="torch")
    for file in (tmp_path / "core").glob("*/mp_rank_*/*.pt"):
        own, other = (
            torch.load(root / file.relative_to(tmp_path / "core"), weights_only=False)
            for root in (tmp_path / "core", tmp_path / "same")
        )
        for key in (key for key in own if key.startswith("model")):
            assert own[key].keys() == other[key].keys()


def test_args_and_files_that_place_layers_otherwise_are_named(tmp_path):
    hf.llama(tmp_path / "hf", num_hidden_layers=4)
    convert(tmp_path / "hf", tmp_path / "core", "core", ckpt_format="torch", **UNEVEN)
    with_args(tmp_path / "core", decoder_first_pipeline_num_layers=3)
    with pytest.raises(CkptxError, match=r"first stage 3\) .* \[3, 1\] .* rank files \[1, 3\]"):
        convert(tmp_path / "core", tmp_path / "refused", "hf")


def test_the_gate_of_a_shared_expert_is_seen(tmp_path):
    hf.qwen2_moe(tmp_path / "hf", num_hidden_layers=1)
    convert(tmp_path / "hf", tmp_path / "core", "core", ckpt_format="torch")
    with_args(tmp_path / "core", moe_shared_expert_gate=None)
    convert(tmp_path / "core", tmp_path / "back", "hf")
    expected, found = hf.weights(tmp_path / "hf"), hf.weights(tmp_path / "back")
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    with_args(tmp_path / "core", moe_shared_expert_gate=False)
    with pytest.raises(CkptxError, match=r"gate False, and the files hold a shared_experts\.gate"):
        convert(tmp_path / "core", tmp_path / "refused", "hf")
    accepted = {"accept_arg": ["moe_shared_expert_gate"]}
    convert(tmp_path / "core", tmp_path / "accepted", "hf", loader_options=accepted)
    assert found.keys() == hf.weights(tmp_path / "accepted").keys()
