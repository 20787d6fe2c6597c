"""Rank files of Megatron that are copies, and honest ones that are alike."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from ckptx.errors import FormatError
from ckptx.registry import registry
from ckptx.testing.contracts import assert_equal, unpadded
from ckptx.testing.conversion import loaded, save
from ckptx.testing.models import MIXTURES, TinyModel, messages, tiny

LOADER, SAVER = registry.loader("core"), registry.saver("core")
MIXTRAL = next(model for model in MIXTURES if model.spec.family == "mixtral")

EXPERTS = ("mlp l0 weight W", "mlp l0 weight V", "mlp l1 weight")


def sizes(tp=1, pp=1, ep=None, layout=None):
    return {
        "ckpt_format": "torch",
        "target_tensor_parallel_size": tp,
        "target_pipeline_parallel_size": pp,
        "target_expert_parallel_size": ep,
        "pipeline_model_parallel_layout": layout,
    }


def ranks(root: Path) -> list[Path]:
    return sorted(root.glob("release/*/*.pt"))


def notes(root: Path) -> str:
    return " ".join([*LOADER.load(root, {})][-1].notes)


@pytest.fixture
def repeating(monkeypatch):
    """Return a function after which tiny models have arrays that repeat themselves.

    ``period(message, key)`` is the number of entries along the first axis that come again and
    again, or of layers; None leaves an array alone.
    """
    honest = TinyModel.canonical

    def repeat(period):
        def canonical(model, **more):
            found = honest(model, **more)
            for message, arrays in found.items():
                for key, array in arrays.items():
                    count = period(message, key)
                    if count is not None:
                        arrays[key] = array[np.arange(len(array)) % count]
            return found

        monkeypatch.setattr(TinyModel, "canonical", canonical)

    return repeat


def test_a_stage_of_one_embedding_row_and_its_padding(tmp_path):
    model = tiny(vocab_size=1, num_layers=2)
    root = save(SAVER, messages(model, tmp_path / "s"), tmp_path / "t", sizes(2, 2, layout="E|ttL"))
    first, second, *_ = [path.read_bytes() for path in sorted(root.rglob("mp_rank_*_000/*.pt"))]
    assert first == second, "the case"
    assert_equal(unpadded(loaded(LOADER, root), model), model.canonical())


def of_experts(_, key):
    return 1 if key in EXPERTS else None


def of_experts_and_router(_, key):
    """Two experts in turns, and the router with them: granular upcycling."""
    return 2 if key in (*EXPERTS, "router weight") else None


@pytest.mark.parametrize("period", [of_experts, of_experts_and_router])
@pytest.mark.parametrize("tp", [1, 2])
def test_experts_that_were_made_from_one_layer(period, tp, repeating, tmp_path):
    repeating(period)
    root = save(SAVER, messages(MIXTRAL, tmp_path / "s"), tmp_path / "t", sizes(tp, ep=2))
    if tp == 1:
        assert len({path.read_bytes() for path in ranks(root)}) == 1, "the case"
    assert_equal(unpadded(loaded(LOADER, root), MIXTRAL), MIXTRAL.canonical())
    assert "rank files hold the same weights" in notes(root)


@pytest.mark.parametrize("ep", [2, 4])
def test_a_copy_of_other_experts_is_refused(ep, tmp_path):
    root = save(SAVER, messages(MIXTRAL, tmp_path / "s"), tmp_path / "t", sizes(ep=ep))
    one, other = ranks(root)[:2]
    other.write_bytes(one.read_bytes())
    with pytest.raises(FormatError, match=r"mp_rank_00_001/.*: is a copy of .*mp_rank_00_000"):
        loaded(LOADER, root)


@pytest.mark.parametrize("tp", [1, 2])
def test_layers_that_repeat(tp, monkeypatch, tmp_path):
    """A merge may have a block of layers twice; a copied stage shows where other ranks differ."""
    honest = TinyModel.canonical

    def canonical(model, **more):
        found = honest(model, **more)
        return {**found, "transformer layer 2": found["transformer layer 1"]}

    monkeypatch.setattr(TinyModel, "canonical", canonical)
    model = tiny(num_layers=4)
    root = save(SAVER, messages(model, tmp_path / "s"), tmp_path / "t", sizes(tp, 4))
    assert_equal(unpadded(loaded(LOADER, root), model), model.canonical())
    assert "'mp_rank_00_002' as 'mp_rank_00_001'" in notes(root).replace(" as ", "' as '")


def test_a_copy_of_another_stage_is_refused(tmp_path):
    root = save(SAVER, messages(tiny(), tmp_path / "s"), tmp_path / "t", sizes(2, 4))
    shutil.copy(
        root / "release/mp_rank_01_001/model_optim_rng.pt",
        root / "release/mp_rank_01_002/model_optim_rng.pt",
    )
    with pytest.raises(FormatError, match=r"mp_rank_01_002/.*: is a copy of .*mp_rank_01_001"):
        loaded(LOADER, root)
