"""RLinf: whatever form a step was saved in, it becomes the model that was trained."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from ckptx.errors import FormatError, SchemaError
from ckptx.registry import registry
from ckptx.testing import faults
from tests.oracles import hf, mcore, rlinf

from .conversion import CLOSE, LAYOUTS, contents, convert, difference, strict_logits
from .test_verl import full

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def state_of(model):
    return load_file(model / "model.safetensors")


@pytest.mark.parametrize(
    ("family", "world", "version", "form"),
    [
        ("llama", 2, "fsdp2", "dcp"),
        ("qwen2-tied", 3, "fsdp2", "local_shard"),
        full("llama", 1, "fsdp2", "local_shard"),
        full("llama", 4, "fsdp2", "local_shard"),
        ("llama", 2, "fsdp", "local_shard"),
    ],
)
def test_sharded_forms(family, world, version, form, source_of, tmp_path):
    source = source_of(family)
    step = tmp_path / "global_step_10"
    rlinf.save(source.directory, step / "actor", world, version, form)
    assert registry.detect(step) == registry.detect(step / "actor") == "rlinf"
    facts = convert(step, tmp_path / "hf", "hf", hf_base=source.directory)
    assert contents(tmp_path / "hf") == contents(source.directory)
    if form == "local_shard":
        dropped = {drop["name"] for drop in facts.dropped}
        assert dropped >= {"optimizers", "lr_schedulers", "rng"}
        folder = step / "actor" / "local_shard_checkpoint"
        assert registry.detect(folder) == "rlinf"
    facts = convert(step, tmp_path / "core", "core", hf_base=source.directory)
    assert (tmp_path / "core" / "iter_0000010").is_dir()


@pytest.mark.parametrize("name", [full("full_weights.pt"), "full_weigths.pt"])
def test_whole_weights_come_first(name, source_of, tmp_path):
    source = source_of("llama")
    step = tmp_path / "global_step_10"
    rlinf.save(source.directory, step / "actor", 2)
    folder = step / "actor" / "model_state_dict"
    folder.mkdir()
    torch.save(state_of(source.directory), folder / name)
    (step / "data").mkdir()
    facts = convert(step, tmp_path / "hf", "hf", hf_base=source.directory)
    assert contents(tmp_path / "hf") == contents(source.directory)
    assert {"dcp_checkpoint", "data"} == {drop["name"] for drop in facts.dropped}
    assert any(name in note for note in facts.notes)
    for place in (folder, folder / name, step / "actor"):
        convert(place, tmp_path / "again", "hf", hf_base=source.directory)
        assert contents(tmp_path / "again") == contents(source.directory)
        shutil.rmtree(tmp_path / "again")


@pytest.mark.parametrize("form", ["dcp", full("whole")])
def test_prefixes_are_taken_from_names(form, source_of, tmp_path):
    source = source_of("llama")
    actor = tmp_path / "global_step_10" / "actor"
    actor.mkdir(parents=True)
    state = {f"net.{name}": tensor for name, tensor in state_of(source.directory).items()}
    if form == "dcp":
        nested = {"fsdp_checkpoint": {"model": state}}
        dcp.save(nested, checkpoint_id=str(actor / "dcp_checkpoint"), no_dist=True)
    else:
        torch.save(state, actor / "full_weights.pt")
    facts = convert(
        tmp_path / "global_step_10",
        tmp_path / "hf",
        "hf",
        loader_options={"strip_prefix": ("net.",)},
        hf_base=source.directory,
    )
    assert contents(tmp_path / "hf") == contents(source.directory)
    assert any("'net.' was taken from the start of" in note for note in facts.notes)


@pytest.mark.full  # by the command in tests/hostile
def test_dcp_to_pt_to_safetensors(source_of, tmp_path):
    """The two steps of RLinf's own scripts, without a model or its config."""
    source = source_of("llama")
    rlinf.save(source.directory, tmp_path / "actor", 2)
    convert(tmp_path / "actor" / "dcp_checkpoint", tmp_path / "model.pt", "pytorch")
    found = torch.load(tmp_path / "model.pt")
    expected = state_of(source.directory)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    convert(tmp_path / "model.pt", tmp_path / "out", "hf")
    again = state_of(tmp_path / "out")
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("layout", [full("tp2"), "tp2-pp2", full("pp2-vpp2"), "pp2-first1"])
def test_megatron_ranks_without_args_and_a_base_model(layout, source_of, tmp_path):
    source = source_of("qwen2-tied")
    model = hf.mcore_model(source.config, pad_to=128 * LAYOUTS[layout].tp)
    actor = tmp_path / "global_step_10" / "actor"
    expected = mcore.write(model, LAYOUTS[layout], actor, source.tokens, format="torch")
    for path in actor.rglob("model_optim_rng.pt"):
        state = torch.load(path, weights_only=False)
        del state["args"]
        torch.save(state, path)
    convert(
        tmp_path / "global_step_10", tmp_path / "hf", "hf", loader="rlinf", hf_base=source.directory
    )
    found = strict_logits(tmp_path / "hf", source.tokens)
    assert difference(found, expected[..., : source.config.vocab_size]) < CLOSE


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, and the local shards of two FSDP versions."""
    root = tmp_path_factory.mktemp("rlinf")
    hf.llama(root / "model", num_hidden_layers=2)
    for version in ("fsdp2", "fsdp"):
        rlinf.save(root / "model", root / version, 3, version, "local_shard")
    return root


@pytest.fixture
def shards(saved, tmp_path):
    def copied(version="fsdp2"):
        source = saved / version / "local_shard_checkpoint"
        return shutil.copytree(source, tmp_path / "actor" / "local_shard_checkpoint")

    return copied


def refused(source, saved, tmp_path, base=True):
    with pytest.raises((FormatError, SchemaError)) as caught:
        convert(
            source,
            tmp_path / "refused",
            "hf",
            loader="rlinf",
            hf_base=saved / "model" if base else None,
        )
    assert not (tmp_path / "refused").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_local_shards_need_a_known_model(shards, saved, tmp_path):
    message = refused(shards(), saved, tmp_path, base=False)
    assert "do not say how long whole tensors are; give --hf-base" in message


def test_missing_shards(shards, saved, tmp_path):
    source = shards()
    (source / "checkpoint_rank_2.pt").unlink()
    message = refused(source, saved, tmp_path)  # nothing in the files says that there were three
    assert "the shares of 2 ranks do not make the config's model: a rank is missing" in message
    (source / "checkpoint_rank_0.pt").unlink()
    message = refused(source, saved, tmp_path)
    assert "1 of at least 2 rank files are missing: 'checkpoint_rank_0.pt'; copy them" in message


@pytest.mark.parametrize("to", ["hf", "peft"])
def test_missing_shards_of_a_model_with_more_than_its_config_says(to, shards, saved, tmp_path):
    source = shards()
    own = {"score.weight": torch.ones(1, 64)}
    if to == "peft":
        matrix = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.default.weight"
        own = {matrix.format("A"): torch.ones(1, 64), matrix.format("B"): torch.ones(9, 1)}
    for rank in range(3):
        path = source / f"checkpoint_rank_{rank}.pt"
        state = torch.load(path)
        if to == "peft":
            state["model"] = {f"base_model.model.{n}": t for n, t in state["model"].items()}
        state["model"] |= {
            name: next(iter(torch.chunk(tensor, 3)[rank:]), tensor[:0])
            for name, tensor in own.items()
        }
        torch.save(state, path)
    (source / "checkpoint_rank_2.pt").unlink()
    alpha = {"lora_alpha": 2.0} if to == "peft" else {}
    how = {"loader": "rlinf", "loader_options": alpha, "hf_base": saved / "model"}
    with pytest.raises(SchemaError, match="a rank is missing"):
        convert(source, tmp_path / "out", to, **how)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fsdp_version": "fsdp3"}, "says fsdp_version 'fsdp3', expected 'fsdp' or 'fsdp2'"),
        ({"fsdp_version": "fsdp"}, "are of FSDP versions fsdp2 and fsdp"),
        ({"model": {}}, "expected a dictionary with the tensors of 'model'"),
        ({"model": {"x": torch.ones(1)}}, "the files are of different runs"),
        ({"model": {"x": 1}}, "'x': expected a tensor, found int"),
    ],
)
def test_a_shard_of_another_run(change, reason, shards, saved, tmp_path):
    source = shards()
    path = source / "checkpoint_rank_1.pt"
    torch.save(torch.load(path) | change, path)
    assert reason in refused(source, saved, tmp_path)


def test_shards_of_other_sizes(shards, saved, tmp_path):
    source = shards()
    path = source / "checkpoint_rank_1.pt"
    state = torch.load(path)
    state["model"]["model.norm.weight"] = torch.ones(3)
    torch.save(state, path)
    message = refused(source, saved, tmp_path)
    assert "ranks hold '22', '3', '20' rows, FSDP 2 gives" in message


def test_copies_of_other_shapes(shards, saved, tmp_path):
    source = shards("fsdp")
    path = source / "checkpoint_rank_1.pt"
    state = torch.load(path)
    state["model"]["model.norm.weight"] = torch.ones(3)
    torch.save(state, path)
    assert "where FSDP 1 gives all the whole tensor" in refused(source, saved, tmp_path)


def test_a_truncated_shard(shards, saved, tmp_path):
    source = shards()
    faults.truncate(source / "checkpoint_rank_1.pt")
    assert "checkpoint_rank_1.pt" in refused(source, saved, tmp_path)


def test_one_shard_and_nothing_at_all(shards, saved, tmp_path):
    source = shards()
    with pytest.raises(FormatError, match="is one rank's share; give the directory"):
        convert(source / "checkpoint_rank_0.pt", tmp_path / "hf", "hf", loader="pytorch")
    (tmp_path / "empty").mkdir()
    assert "give a step that RLinf has saved" in refused(tmp_path / "empty", saved, tmp_path)
