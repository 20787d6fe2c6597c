"""Legacy Megatron checkpoints and BERT that are damaged, mixed or something else."""

from __future__ import annotations

import shutil

import pytest
import torch

from ckptx.testing.models import tiny
from tests.formats import legacy_by_hand
from tests.formats.by_hand import even
from tests.oracles import bert

GPT = tiny("gpt", num_query_groups=8)


def change(path, edit):
    state = torch.load(path, weights_only=False)
    edit(state)
    torch.save(state, path)


@pytest.fixture
def ranks(user):
    """The iteration directory of a legacy model at TP2 PP2."""
    legacy_by_hand.write(user.source, GPT, 2, even(4, 2), 40)
    return user.source / "iter_0000010"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda state: state.update(checkpoint_version=1), "checkpoint_version is 1, in mp_rank"),
        (lambda state: state.update(iteration=9), "is of iteration 9"),
        (lambda state: vars(state["args"]).update(num_layers=8), "num_layers is 8"),
        (lambda state: state.update(model={"decoder.final_layernorm.weight": torch.ones(2)}), "of"),
    ],
)
def test_rank_of_another_run(edit, reason, user, ranks):
    change(ranks / "mp_rank_01_001" / "model_optim_rng.pt", edit)
    found = user.cannot_convert("core")
    assert reason in found
    assert "mp_rank_01_001" in found
    assert "different runs" in found


def test_missing_rank(user, ranks):
    shutil.rmtree(ranks / "mp_rank_00_001")
    found = user.cannot_convert("core")
    assert "1 of 4 rank directories are missing: 'mp_rank_00_001'" in found


def test_no_args(user, ranks):
    for path in ranks.rglob("*.pt"):
        change(path, lambda state: state.pop("args"))
    assert "give --hf-base" in user.cannot_convert("core")


def test_the_loader_of_the_other_kind(user, ranks):
    assert "use --loader legacy" in user.cannot_convert("hf", "--from", "core")


def test_missing_and_left_over_tensors_are_named(user, ranks):
    def rename(state):
        encoder = state["model"]["language_model"]["encoder"]
        encoder["layers.1.mlp.gate.weight"] = encoder.pop("layers.1.mlp.dense_4h_to_h.weight")

    change(ranks / "mp_rank_01_000" / "model_optim_rng.pt", rename)
    found = user.cannot_convert("core")
    assert "mp_rank_01_000: language_model.encoder.layers.1.mlp.dense_4h_to_h.weight" in found
    assert "layers.1.mlp.gate.weight" in found


def test_ranks_that_hold_other_norms(user, ranks):
    def nudge(state):
        norm = state["model"]["language_model"]["encoder"]["layers.0.input_norm.weight"]
        norm.view(torch.int16)[3] ^= 1

    change(ranks / "mp_rank_01_000" / "model_optim_rng.pt", nudge)
    assert "differs" in user.cannot_convert("core")


def test_what_a_legacy_model_cannot_be(user, write_llama):
    write_llama(user.source)
    reason = user.cannot_convert("legacy", "--pp", "2", "--decoder-first-pipeline-num-layers", "1")
    assert "spread their layers evenly" in reason


class TestBert:
    @pytest.fixture
    def core(self, user, tmp_path_factory):
        """The iteration directory of a BERT at TP2 PP2."""
        bert.write(user.source)
        assert user.run("convert", user.source, user.target, "--to", "core", *self.options) == 0
        shutil.rmtree(user.source)
        user.target.rename(user.source)
        shutil.rmtree(user.source / "release" / "huggingface")
        return user.source / "release"

    options = ("--tp", "2", "--pp", "2", "--ckpt-format", "torch")

    def test_without_its_binary_head(self, user, core):
        change(
            core / "mp_rank_00_001" / "model_optim_rng.pt",
            lambda state: state["model"].pop("binary_head.weight"),
        )
        reason = user.cannot_convert("hf")
        assert "missing: 'mp_rank_00_001: binary_head.weight'" in reason

    def test_heads_that_differ(self, user, core):
        def nudge(state):
            state["model"]["lm_head.dense.bias"][3] += 1

        change(core / "mp_rank_01_001" / "model_optim_rng.pt", nudge)
        assert "differs" in user.cannot_convert("hf")

    def test_a_config_of_another_model(self, user, core, write_llama):
        base = write_llama(user.place / "llama")
        reason = user.cannot_convert("hf", "--hf-base", base)
        assert "the config at hand is of family llama" in reason
