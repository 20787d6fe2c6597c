"""What Megatron-Bridge saves: a model that run_config.yaml describes, and no args."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from ckptx.errors import CkptxError
from ckptx.registry import registry
from tests.golden.megatron.cases import BRIDGE
from tests.interop.conversion import convert
from tests.oracles import hf

from .test_megatron_versions import GOLDEN, expected

REFUSED = {
    "a class of unknown effect": ({"_target_": "x.GPTOSSProvider120B"}, "_target_"),
    "a field of a class of its own": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    "layers of unknown effect": (
        {"transformer_layer_spec": {"_target_": "x.gemma2_layer_spec", "_call_": False}},
        "transformer_layer_spec",
    ),
    "rows in blocks, or not": (
        {"moe_mlp_glu_interleave_size": 4, "num_moe_experts": None},
        "moe_mlp_glu_interleave_size",
    ),
    "a function of Megatron": ({"glu_linear_offset": 1.0}, "glu_linear_offset"),
}


@pytest.fixture
def saved(tmp_path):
    shutil.copytree(GOLDEN / BRIDGE, tmp_path / "bridge")
    return tmp_path / "bridge"


def edit(saved, **fields):
    path = saved / "iter_0000000" / "run_config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"] |= fields
    path.write_text(yaml.safe_dump(config))


def check(saved, target, **options):
    convert(saved, target, "hf", **options)
    found = load_file(target / "model.safetensors")
    wanted = expected(mixture=False)
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


@pytest.mark.parametrize("tracker", ["latest_checkpointed_iteration.txt", "latest_train_state.pt"])
def test_a_run_is_read_by_either_tracker(tracker, saved, tmp_path):
    for name in {"latest_checkpointed_iteration.txt", "latest_train_state.pt"} - {tracker}:
        (saved / name).unlink()
    assert registry.detect(saved) == "core"
    check(saved, tmp_path / "hf")


@pytest.mark.parametrize("case", REFUSED)
def test_what_may_change_the_function_is_refused_unless_accepted(case, saved, tmp_path):
    fields, name = REFUSED[case]
    edit(saved, **fields)
    with pytest.raises(CkptxError, match=rf"{name}\b"):
        convert(saved, tmp_path / "refused", "hf")
    check(saved, tmp_path / "hf", loader_options={"accept_arg": (name,)})


@pytest.mark.parametrize("fields", [{"vision_config": None}, {"attention_dropout": 0.1}])
def test_what_says_nothing_is_no_reason_to_refuse(fields, saved, tmp_path):
    edit(saved, **fields)
    check(saved, tmp_path / "hf")


@pytest.mark.parametrize(
    ("function", "gated", "kind"),
    [
        ("torch._C._nn.gelu", False, "gelu"),
        ("megatron.core.activations.squared_relu", False, "squared_relu"),
        ("megatron.core.activations.fast_gelu", True, "geglu_tanh"),
        ("torch.nn.functional.relu", False, None),
        ("torch.nn.functional.silu", False, None),
    ],
)
def test_the_activation_is_that_of_the_function(function, gated, kind):
    from ckptx.schemas.megatron_settings.activations import from_args
    from ckptx.schemas.megatron_settings.providers import from_provider

    said = {"activation_func": {"_target_": function, "_call_": False}, "gated_linear_unit": gated}
    if kind is None:
        with pytest.raises(CkptxError, match=r"activation_func .*args cannot say it"):
            from_provider(said)
    else:
        assert from_args(from_provider(said)) == kind


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &a {b: [*a, *a]}\n", "its references say more than"),
        ("model: [1]\n", "expected a mapping, and one at 'model'"),
        ("model: !!python/object/apply:os.system [true]\n", "not valid YAML"),
        ("model: {1: 2}\n", "expected a mapping, and one at 'model'"),
        ("model: {num_layers: 1e9}\n", "do not say"),
        ("model: {_target_: [x]}\n", "is made by"),
        ("model: {activation_func: [x]}\n", "cannot say it"),
    ],
)
def test_a_hostile_config_is_refused_in_a_line(text, says, saved, tmp_path):
    (saved / "iter_0000000" / "run_config.yaml").write_text(text)
    with pytest.raises(CkptxError, match=says):
        convert(saved, tmp_path / "hf", "hf")


def test_a_damaged_tracker_is_refused(saved, tmp_path):
    (saved / "latest_checkpointed_iteration.txt").unlink()
    torch.save({"step": torch.zeros(3)}, saved / "latest_train_state.pt")
    with pytest.raises(CkptxError, match=r"latest_train_state.pt: expected .* number 'step'"):
        convert(saved, tmp_path / "hf", "hf", loader="core")


def test_what_is_written_for_bridge_names_its_iteration_as_bridge_does(tmp_path):
    hf.llama(tmp_path / "hf", num_hidden_layers=1)
    convert(tmp_path / "hf", tmp_path / "core", "core", target_writer="bridge", iteration=12)
    for name in ("latest_train_state.pt", "iter_0000012/train_state.pt"):
        state = torch.load(tmp_path / "core" / name)
        assert (int(state["step"]), bool(state["do_train"])) == (12, False)
    with pytest.raises(CkptxError, match="--target-writer bridge loads torch_dist only"):
        convert(
            *(tmp_path / "hf", tmp_path / "ranks", "core"),
            target_writer="bridge",
            ckpt_format="torch",
        )


def test_its_config_says_what_args_say(tmp_path):
    """Bridge saves no args: without them the same model is read from the config alone."""
    hf.mixtral(tmp_path / "hf")
    sizes = {"target_expert_parallel_size": 2, "target_pipeline_parallel_size": 2}
    convert(tmp_path / "hf", tmp_path / "core", "core", target_writer="bridge", **sizes)
    (place,) = tmp_path.glob("core/iter_*")
    state = torch.load(place / "common.pt", weights_only=False)
    del state["args"]
    torch.save(state, place / "common.pt")
    shutil.rmtree(place / "tokenizer")
    convert(tmp_path / "core", tmp_path / "back", "hf")
    found, wanted = hf.weights(tmp_path / "back"), hf.weights(tmp_path / "hf")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
