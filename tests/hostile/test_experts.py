"""Mixtures of experts that do not divide, or whose rank files do not belong together."""

from __future__ import annotations

import shutil

import pytest
import torch

from ckptx.testing.models import tiny, write_hf

SIZES = ("--tp", "2", "--ep", "2", "--etp", "1", "--ckpt-format", "torch")


@pytest.fixture
def mixture(user):
    user.source.mkdir()
    return write_hf(user.source, tiny("qwen3_moe", dtype="float32"))


@pytest.fixture
def ranks(user, mixture):
    """The same as files per rank, the source from now on."""
    core = user.place / "core"
    assert user.run("convert", user.source, core, "--to", "core", "--quiet", *SIZES) == 0
    shutil.rmtree(user.source)
    core.rename(user.source)
    return user.source / "release"


def change(file, edit):
    state = torch.load(file, weights_only=False)
    edit(state)
    torch.save(state, file)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--ep", "3"), "expert-parallel size 3 does not divide 4 experts"),
        (("--ep", "8"), "expert-parallel size 8 does not divide 4 experts"),
        (("--etp", "16"), "size 16 does not divide moe_ffn_hidden_size 24"),
        (("--etp", "2", "--ckpt-format", "torch"), "overwrites them; use --ckpt-format torch_dist"),
        (("--tp", "16"), "tensor-parallel size 16 does not divide num_attention_heads 8"),
    ],
)
def test_sizes_that_do_not_divide(options, reason, user, mixture):
    assert reason in user.cannot_convert("core", *options)


def test_expert_sizes_of_a_dense_model(user, write_llama):
    write_llama(user.source)
    for option in ("--ep", "--etp"):
        assert "the model has no experts" in user.cannot_convert("core", option, "2")


def test_missing_rank_directory(user, ranks):
    assert sorted(path.name for path in ranks.glob("mp_*")) == ["mp_rank_00_000", "mp_rank_01_001"]
    shutil.rmtree(ranks / "mp_rank_01_001")
    reason = user.cannot_convert("hf")
    assert "1 of 2 rank directories are missing: 'mp_rank_01_001'" in reason


def test_superfluous_rank_directory(user, ranks):
    shutil.copytree(ranks / "mp_rank_00_000", ranks / "mp_rank_00_001")
    assert "'mp_rank_00_001' do not belong to the 2 ranks" in user.cannot_convert("hf")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda state: state.update(iteration=9), "is of iteration 9"),
        (lambda state: vars(state["args"]).update(num_experts=8), "num_experts is 8"),
        (
            lambda state: vars(state["args"]).update(expert_model_parallel_size=1),
            "expert_model_parallel_size is 1",
        ),
    ],
)
def test_rank_directory_of_another_run(edit, reason, user, ranks):
    change(ranks / "mp_rank_01_001" / "model_optim_rng.pt", edit)
    found = user.cannot_convert("hf")
    assert reason in found
    assert "different runs" in found


def test_args_whose_experts_do_not_divide(user, ranks):
    for file in ranks.rglob("*.pt"):
        change(file, lambda state: vars(state["args"]).update(num_experts=5))
    assert "5 experts over expert-parallel size 2" in user.cannot_convert("hf")


def test_missing_and_left_over_experts_are_named(user, ranks):
    def rename(state):
        model = state["model"]
        name = "decoder.layers.1.mlp.experts.local_experts.1.linear_fc2.weight"
        model["decoder.layers.1.mlp.experts.local_experts.2.linear_fc2.weight"] = model.pop(name)

    change(ranks / "mp_rank_01_001" / "model_optim_rng.pt", rename)
    reason = user.cannot_convert("hf")
    assert "missing: 'mp_rank_01_001: decoder.layers.1.mlp.experts.local_experts.1" in reason
    assert "mp_rank_01_001: decoder.layers.1.mlp.experts.local_experts.2.linear_fc2" in reason


def test_copies_of_dense_tensors_that_differ(user, ranks):
    def nudge(state):
        state["model"]["decoder.layers.0.mlp.router.weight"][0, 0] += 1

    change(ranks / "mp_rank_01_001" / "model_optim_rng.pt", nudge)
    reason = user.cannot_convert("hf")
    assert "mp_rank_01_001" in reason or "cop" in reason


def test_pattern_of_layers_that_is_code(user, ranks):
    pattern = "__import__('os').abort()"
    for file in ranks.rglob("*.pt"):
        change(file, lambda state: vars(state["args"]).update(moe_layer_freq=pattern))
    assert "moe_layer_freq" in user.cannot_convert("hf")


def test_config_with_fewer_experts_than_the_weights(user, mixture):
    config = user.source / "config.json"
    config.write_text(config.read_text().replace('"num_experts": 4', '"num_experts": 3'))
    reason = user.cannot_convert("core")
    assert "experts.3.gate_proj.weight" in reason
