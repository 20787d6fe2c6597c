"""verl: what sharded models save, rank by rank, becomes the very model that was sharded."""

from __future__ import annotations

import json
import random
import shutil
from functools import cache

import numpy as np
import pytest
import torch

from ckptx.errors import ConversionError, FormatError
from ckptx.registry import registry
from ckptx.testing import faults
from tests.oracles import hf, verl

from .conversion import contents, convert

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def full(*values):
    return pytest.param(*values, marks=pytest.mark.full)


@pytest.mark.parametrize(
    ("family", "how", "world"),
    [
        ("llama", "fsdp", 1),
        ("llama", "fsdp", 2),
        ("qwen2-tied", "fsdp", 3),
        full("qwen3", "fsdp", 4),
        full("mistral", "unnamed", 4),
        ("qwen3", "unnamed", 2),
        ("llama", "columns", 4),
        ("qwen2", "ddp x fsdp", 2),
        ("qwen2-tied", "ddp x fsdp", 4),
        full("llama", "ddp x fsdp", 6),
        ("qwen2", "tp", 2),
        full("qwen3-tied", "tp", 4),
        full("llama", "fsdp x tp", 2),
        ("llama", "fsdp x tp", 4),
        full("qwen2-tied", "fsdp x tp", 6),
        ("qwen2", "fsdp x tp", 6),
        full("llama", "fsdp x tp", 8),
        full("qwen2", "ddp x fsdp x tp", 4),
        full("llama", "ddp x fsdp x tp", 8),
        ("llama", "older mesh", 4),
        full("qwen2", "older mesh", 6),
        full("llama", "fsdp1", 1),
        ("llama", "fsdp1", 3),
        ("qwen2-tied", "fsdp1", 2),
        full("qwen3", "fsdp1", 4),
        full("llama", "fsdp1-mesh", 1),
        ("llama", "fsdp1-mesh", 3),
        full("qwen2-tied", "fsdp1-mesh", 2),
        full("qwen2", "fsdp1-ddp x fsdp", 2),
        ("qwen2", "fsdp1-ddp x fsdp", 4),
        full("llama", "fsdp1-ddp x fsdp", 6),
    ],
)
def test_the_ranks_together_are_the_model(family, how, world, source_of, tmp_path):
    source = source_of(family)
    verl.save(source.directory, tmp_path / "actor", world, how)
    assert registry.detect(tmp_path / "actor") == "verl"
    convert(tmp_path / "actor", tmp_path / "hf", "hf")
    assert contents(tmp_path / "hf") == contents(source.directory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_stay(dtype, tmp_path):
    hf.llama(tmp_path / "model", num_hidden_layers=2, vocab_size=133, dtype=dtype)
    verl.save(tmp_path / "model", tmp_path / "actor", 3)
    convert(tmp_path / "actor", tmp_path / "hf", "hf")
    assert contents(tmp_path / "hf") == contents(tmp_path / "model")


def test_more_ranks_than_rows(tmp_path):
    hf.llama(tmp_path / "model", num_hidden_layers=2, vocab_size=2)
    verl.save(tmp_path / "model", tmp_path / "actor", 3)
    convert(tmp_path / "actor", tmp_path / "hf", "hf")
    assert contents(tmp_path / "hf") == contents(tmp_path / "model")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, and what its ranks have saved, written once for each sharding."""
    root = tmp_path_factory.mktemp("verl")
    hf.llama(root / "model", num_hidden_layers=2)

    @cache
    def written(how: str, world: int):
        target = root / f"{how}-{world}" / "actor"
        verl.save(root / "model", target, world, how)
        return target

    written.model = root / "model"
    return written


@pytest.fixture
def actor(saved, tmp_path):
    """Copies of what was saved, to be damaged."""

    def copied(how: str, world: int):
        return shutil.copytree(saved(how, world), tmp_path / how / "actor")

    return copied


def refused(actor, tmp_path, **options):
    target = tmp_path / "refused"
    with pytest.raises((FormatError, ConversionError)) as caught:
        convert(actor, target, "hf", **options)
    assert not target.exists()
    message = str(caught.value)
    assert "\n" not in message
    return message


def rank_file(actor, rank, world=2):
    return actor / f"model_world_size_{world}_rank_{rank}.pt"


def test_a_step_and_a_run_mean_their_actor(saved, tmp_path):
    step = tmp_path / "run" / "global_step_10"
    shutil.copytree(saved("fsdp", 2), step / "actor")
    (step / "data.pt").write_bytes(b"12345")
    (step / "critic").mkdir()
    facts = convert(step, tmp_path / "hf", "hf")
    assert contents(tmp_path / "hf") == contents(saved.model)
    dropped = {drop["name"]: drop["bytes"] for drop in facts.dropped}
    files = list(step.glob("actor/*.pt"))
    for kind in ("optim", "extra_state"):
        sizes = [file.stat().st_size for file in files if file.name.startswith(kind)]
        assert dropped.pop(f"{kind}_world_size_2_rank_*.pt") == sum(sizes) > 0
    assert dropped == {"data.pt": 5, "critic": 0}

    shutil.copytree(saved("fsdp1", 3), step / "critic", dirs_exist_ok=True)
    facts = convert(step, tmp_path / "critic", "hf", loader_options={"actor_dir": "critic"})
    assert contents(tmp_path / "critic") == contents(saved.model)
    assert {"actor", "data.pt"} < {drop["name"] for drop in facts.dropped}

    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("10")
    facts = convert(tmp_path / "run", tmp_path / "core", "core")
    assert "global_step_10" in " ".join(facts.notes)
    assert (tmp_path / "core" / "iter_0000010").is_dir()
    convert(tmp_path / "core", tmp_path / "back", "hf")
    assert contents(tmp_path / "back") == contents(saved.model)

    assert "holds 'actor', 'critic' and no x; convert it with --actor-dir actor" in refused(
        step, tmp_path, loader="verl", loader_options={"actor_dir": "x"}
    )
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("11")
    assert "global_step_11, which is not there" in refused(
        tmp_path / "run", tmp_path, loader="verl"
    )


def same(found, expected):
    """Whether two nested states are equal, and of the same types."""
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, np.ndarray):
        return found.dtype == expected.dtype and np.array_equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in found)
    if isinstance(expected, list | tuple):
        alike = type(found) is type(expected) and len(found) == len(expected)
        return alike and all(map(same, found, expected))
    return type(found) is type(expected) and found == expected


@pytest.mark.parametrize("saver", ["hf", "pytorch"])
def test_extra_states_are_kept_if_asked(saver, actor, saved, tmp_path):
    source = actor("fsdp", 2)
    target = tmp_path / "kept"
    facts = convert(source, target, saver, loader_options={"extra_state": True})
    assert not any("extra_state" in drop["name"] for drop in facts.dropped)
    states = [
        torch.load(source / f"extra_state_world_size_2_rank_{rank}.pt", weights_only=False)
        for rank in range(2)
    ]
    found = torch.load(target / "extra_state_merged.pt", weights_only=False)
    assert same(found.pop("ranks"), states)
    assert found.pop("world_size") == 2
    assert same(found, states[0])
    assert not same(states[0]["rng"], states[1]["rng"])
    np.random.set_state(found["rng"]["numpy"])
    torch.set_rng_state(found["rng"]["cpu"])
    random.setstate(found["rng"]["random"])
    scheduler = json.loads((target / "lr_scheduler_state.json").read_text())
    assert scheduler == json.loads(json.dumps(states[0]["lr_scheduler"]))
    assert scheduler["last_epoch"] == 2
    if saver == "hf":
        extra = {"extra_state_merged.pt", "lr_scheduler_state.json"}
        weights = {n: d for n, d in contents(target).items() if n not in extra}
        assert weights == contents(saved.model)


def test_no_scheduler(actor, tmp_path):
    source = actor("fsdp", 2)
    for rank in range(2):
        path = source / f"extra_state_world_size_2_rank_{rank}.pt"
        state = torch.load(path, weights_only=False)
        torch.save({**state, "lr_scheduler": None}, path)
    facts = convert(source, tmp_path / "hf", "hf", loader_options={"extra_state": True})
    assert any("no scheduler was saved" in note for note in facts.notes)
    assert not (tmp_path / "hf" / "lr_scheduler_state.json").exists()


def test_extra_states_that_cannot_be_kept(actor, tmp_path):
    source = actor("fsdp", 2)
    path = source / "extra_state_world_size_2_rank_1.pt"
    torch.save({"lr_scheduler": torch.device("cpu")}, path)
    wish = {"loader_options": {"extra_state": True}}
    message = refused(source, tmp_path, **wish)
    assert f"{path}: holds a torch.device, which cannot be carried over" in message
    torch.save([1], path)
    assert "expected a dictionary, found list" in refused(source, tmp_path, **wish)
    faults.truncate(path)
    assert path.name in refused(source, tmp_path, **wish)
    path.unlink()
    message = refused(source, tmp_path, **wish)
    assert "1 of 2 files are missing: 'extra_state_world_size_2_rank_1.pt'; copy them" in message


def test_weights_beside_the_config_are_left_by_name(actor, saved, tmp_path):
    source = actor("fsdp", 2)
    (source / "fsdp_config.json").unlink()  # older verl has none
    shutil.copy(saved.model / "model.safetensors", source / "huggingface")
    facts = convert(source, tmp_path / "hf", "hf")
    assert contents(tmp_path / "hf") == contents(saved.model)
    assert "huggingface/model.safetensors" in {drop["name"] for drop in facts.dropped}


def test_a_config_beside_the_ranks_is_carried(actor, saved, tmp_path):
    source = actor("tp", 2)
    for name in ("config.json", "generation_config.json"):
        shutil.move(source / "huggingface" / name, source)
    (source / "huggingface").rmdir()
    for rank in range(2):
        state = torch.load(rank_file(source, rank), weights_only=False)
        state["model.layers.0.mlp._extra_state"] = torch.zeros(5, dtype=torch.uint8)
        torch.save(state, rank_file(source, rank))
    facts = convert(source, tmp_path / "hf", "hf")
    assert contents(tmp_path / "hf") == contents(saved.model)
    dropped = {drop["name"]: drop["bytes"] for drop in facts.dropped}
    assert dropped.pop("model.layers.0.mlp._extra_state") == 10
    assert set(dropped) == {f"{kind}_world_size_2_rank_*.pt" for kind in ("extra_state", "optim")}


def test_a_missing_rank(actor, tmp_path):
    source = actor("fsdp", 3)
    rank_file(source, 1, 3).unlink()
    message = refused(source, tmp_path)
    assert "1 of 3 rank files are missing: 'model_world_size_3_rank_1.pt'" in message


def test_a_rank_too_many(actor, tmp_path):
    source = actor("fsdp", 2)
    faults.duplicate(rank_file(source, 1), "model_world_size_2_rank_2.pt")
    assert "rank_2.pt: expected ranks 0 to 1" in refused(source, tmp_path)


def test_files_of_two_world_sizes(actor, saved, tmp_path):
    source = actor("fsdp", 2)
    shutil.copy(rank_file(saved("fsdp", 3), 0, 3), source)
    assert "holds the files of 2 and 3 ranks" in refused(source, tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (json.dumps({"world_size": 4}), "says 4 ranks, the names of the files 2"),
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
    ],
)
def test_a_config_that_contradicts(config, message, actor, tmp_path):
    source = actor("fsdp", 2)
    (source / "fsdp_config.json").write_text(config)
    assert message in refused(source, tmp_path)


@pytest.mark.parametrize("how", ["fsdp", "fsdp1"])
def test_a_file_under_the_name_of_another_rank(how, actor, tmp_path):
    source = actor(how, 2)
    shutil.copy(rank_file(source, 0), rank_file(source, 1))
    assert "was saved by rank 0, the file's name says 1" in refused(source, tmp_path)


@pytest.mark.parametrize("how", ["fsdp", "fsdp1"])
def test_files_of_more_ranks_than_there_are(how, actor, saved, tmp_path):
    source = actor(how, 2)
    for rank in range(2):
        shutil.copy(rank_file(saved(how, 3), rank, 3), rank_file(source, rank))
    assert "the file's name says 2" in refused(source, tmp_path)


def test_a_rank_of_another_model(actor, saved, tmp_path):
    hf.llama(tmp_path / "other", num_hidden_layers=2, vocab_size=130)
    verl.save(tmp_path / "other", tmp_path / "wide", 2)
    source = actor("fsdp", 2)
    shutil.copy(rank_file(tmp_path / "wide", 1), source)
    message = refused(source, tmp_path)
    assert "expected float32 [131, 64], as in rank 0, found float32 [130, 64] in rank 1" in message

    hf.llama(tmp_path / "shorter", num_hidden_layers=1)
    verl.save(tmp_path / "shorter", tmp_path / "short", 2)
    shutil.copy(rank_file(tmp_path / "short", 1), source)
    assert "rank_1.pt: expected the tensors of the other ranks" in refused(source, tmp_path)


def test_copies_that_differ(actor, tmp_path):
    source = actor("tp", 2)
    path = rank_file(source, 1)
    state = torch.load(path, weights_only=False)
    state["model.norm.weight"][3] += 1
    torch.save(state, path)
    assert "copy 1 of 2 differs from copy 0 at element 3" in refused(source, tmp_path)


def test_a_sum_that_was_not_taken(actor, tmp_path):
    message = refused(actor("partial", 2), tmp_path)
    assert "'model.norm.weight': found placement Partial, expected Shard or Replicate" in message


def test_a_truncated_file(actor, tmp_path):
    source = actor("fsdp", 2)
    faults.truncate(rank_file(source, 1))
    assert "model_world_size_2_rank_1.pt" in refused(source, tmp_path)


def test_an_adapter_needs_its_alpha(actor, tmp_path):
    source = actor("tp", 2)
    for rank in range(2):
        state = torch.load(rank_file(source, rank), weights_only=False)
        state["model.layers.0.mlp.up_proj.lora_A.default.weight"] = torch.ones(2, 64)
        torch.save(state, rank_file(source, rank))
    assert "nothing says their lora_alpha" in refused(source, tmp_path)


@pytest.mark.parametrize("how", ["fsdp1", "tp"])
def test_one_rank_is_not_taken_for_a_model(how, saved, tmp_path):
    message = refused(rank_file(saved(how, 2), 0), tmp_path, loader="pytorch")
    assert "is what one rank holds of a tensor; give the directory" in message


@pytest.mark.parametrize("value", [7, {"a": 1}, torch.device("cpu")])
def test_a_value_that_is_no_tensor(value, actor, tmp_path):
    source = actor("tp", 2)
    for rank in range(2):
        state = torch.load(rank_file(source, rank), weights_only=False)
        state["model.norm.weight"] = value
        torch.save(state, rank_file(source, rank))
    assert "'model.norm.weight': expected a tensor, a DTensor" in refused(source, tmp_path)
