"""Bad checkpoints of verl and RLinf, as a user of the command meets them."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.oracles import rlinf, verl

from .test_bad_input import Bomb

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
WORLD = 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory, write_llama):
    """What verl's ranks have saved at two steps, and RLinf's at one."""
    place = tmp_path_factory.mktemp("trained")
    model = write_llama(place / "model")
    verl.save(model, place / "global_step_10" / "actor", WORLD)
    rlinf.save(model, place / "rlinf" / "global_step_10" / "actor", 2)
    return place


@pytest.fixture
def actor(trained, user):
    """A copy of a step of verl as the source; the path is its actor."""
    shutil.copytree(trained / "global_step_10", user.source)
    return user.source / "actor"


def model_file(actor, rank, world=WORLD):
    return actor / f"model_world_size_{world}_rank_{rank}.pt"


def test_it_is_converted_while_nothing_is_wrong(actor, trained, user):
    assert user.run("convert", user.source, user.target, "--to", "hf") == 0
    found = load_file(user.target / "model.safetensors")
    expected = load_file(trained / "model" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("rank", [0, 2])
def test_missing_rank(rank, actor, user):
    model_file(actor, rank).unlink()
    reason = user.cannot_convert("hf")
    assert f"1 of 4 rank files are missing: 'model_world_size_4_rank_{rank}.pt'; copy" in reason


def test_rank_too_many(actor, user):
    shutil.copy(model_file(actor, 3), model_file(actor, 4))
    assert "rank_4.pt: expected ranks 0 to 3" in user.cannot_convert("hf")


def test_files_of_two_world_sizes(actor, user):
    shutil.copy(model_file(actor, 0), model_file(actor, 0, 8))
    assert "holds the files of 4 and 8 ranks" in user.cannot_convert("hf")


def test_rank_under_another_name(actor, user):
    shutil.copy(model_file(actor, 0), model_file(actor, 2))
    assert "was saved by rank 0, the file's name says 2" in user.cannot_convert("hf")


@pytest.mark.parametrize("text", ['{"world_size": 2}', "{"])
def test_config_that_contradicts_or_is_broken(text, actor, user):
    (actor / "fsdp_config.json").write_text(text)
    assert "fsdp_config.json" in user.cannot_convert("hf")


@pytest.mark.parametrize("left", [0, -30])
def test_truncated_rank(left, actor, user):
    path = model_file(actor, 1)
    os.truncate(path, left if left >= 0 else path.stat().st_size + left)
    assert path.name in user.cannot_convert("hf")


def test_ranks_without_weights(actor, user):
    for rank in range(WORLD):
        torch.save({}, model_file(actor, rank))
    assert "the files of the 4 ranks hold no weights" in user.cannot_convert("hf")


def test_step_without_weights(actor, user):
    for path in actor.glob("model_*"):
        path.unlink()
    assert "not a checkpoint that any loader recognises" in user.cannot_convert("hf")
    reason = user.cannot_convert("hf", "--from", "verl")
    assert "give a step that verl has saved, or say which model with --actor-dir" in reason


@pytest.mark.parametrize("name", ["model", "extra_state"])
def test_pickle_that_calls(name, actor, user):
    torch.save({"x": Bomb(user.place)}, actor / f"{name}_world_size_4_rank_1.pt")
    reason = user.cannot_convert("hf", "--extra-state")
    assert "system" in reason
    assert not (user.place / "executed").exists()


def test_states_of_two_steps(actor, user):
    path = actor / "extra_state_world_size_4_rank_3.pt"
    state = torch.load(path, weights_only=False)
    state["lr_scheduler"]["last_epoch"] = 7
    torch.save(state, path)
    reason = user.cannot_convert("hf", "--extra-state")
    assert "rank_3.pt: its scheduler is at step 7, that of rank 0 at 2" in reason


def test_options_of_the_other_workers(actor, user):
    for option in ("--is-value-model", "--tie-word-embedding"):
        assert "are for those of Megatron" in user.cannot_convert("hf", option)
    assert "no name starts with --strip-prefix 'x.'" in user.cannot_convert(
        "hf", "--strip-prefix", "x."
    )


def test_megatron_workers_without_weights(user, trained):
    actor = user.source / "actor"
    for folder in ("dist_ckpt", "huggingface"):
        (actor / folder).mkdir(parents=True)
    shutil.copy(trained / "model" / "config.json", actor / "huggingface")
    assert "holds no metadata.json, which is written last" in user.cannot_convert("hf")
    metadata = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (actor / "dist_ckpt" / "metadata.json").write_text(json.dumps(metadata))
    assert ".metadata: cannot be opened: No such file or directory" in user.cannot_convert("hf")
    reason = user.cannot_convert("hf", "--extra-state")
    assert "was saved by Megatron workers; --extra-state is for those of FSDP" in reason


def test_rlinf_both_steps_of_its_scripts(user, trained):
    dcp = trained / "rlinf" / "global_step_10" / "actor" / "dcp_checkpoint"
    file = user.place / "model.pt"
    assert user.run("convert", dcp, file, "--to", "pytorch") == 0
    base = ("--hf-base", trained / "model")
    assert user.run("convert", file, user.target, "--to", "hf", *base) == 0
    found = (user.target / "model.safetensors").read_bytes()
    assert found == (trained / "model" / "model.safetensors").read_bytes()


def test_rlinf_damaged(user, trained):
    shutil.copytree(trained / "rlinf" / "global_step_10", user.source)
    shards = sorted(user.source.glob("actor/dcp_checkpoint/*.distcp"))
    os.truncate(shards[0], 1000)
    assert shards[0].name in user.cannot_convert("hf")
    shards[0].unlink()
    assert shards[0].name in user.cannot_convert("hf")
    whole = user.source / "actor" / "model_state_dict"
    whole.mkdir()
    torch.save({"optimizer": {}}, whole / "full_weights.pt")
    assert "holds no state dict of tensors" in user.cannot_convert("hf")
