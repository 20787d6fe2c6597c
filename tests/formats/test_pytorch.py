"""Single ``.pt`` files through the kit; the loader's sources are written by torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ckptx.errors import FormatError, SchemaError
from ckptx.protocol.messages import PASSTHROUGH
from ckptx.registry import registry
from ckptx.testing.contracts import (
    Checkpoint,
    LoaderTests,
    SaverTests,
    assert_equal,
    assert_equal_arrays,
    assert_one_line,
)
from ckptx.testing.conversion import end_of, loaded, save
from ckptx.testing.models import MODELS, PADDED, messages, tiny, without_family, write_config

from . import legacy_by_hand
from .by_hand import args_of, assert_state, even, padded, rank_states, torch_of

LOADER, SAVER = registry.loader("pytorch"), registry.saver("pytorch")
LLAMA, TIED = MODELS[0], MODELS[6]


def write(path: Path, state: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


def tensors_of(model):
    return {name: torch_of(array) for name, array in model.hf().items()}


class TestHfNames(LoaderTests, SaverTests):
    loader, saver = LOADER, SAVER
    models = (*MODELS, *PADDED)

    def write(self, directory: Path, model) -> Checkpoint:
        write_config(directory, model)
        path = write(directory / "model.pt", tensors_of(model))
        return Checkpoint(path, model.canonical(padded=False))


class TestCoreNames(LoaderTests, SaverTests):
    loader, saver = LOADER, SAVER
    models = MODELS

    def write(self, directory: Path, model) -> Checkpoint:
        stages = even(model.spec.num_layers, 1)
        ((_, models),) = rank_states(model, 1, stages, rows=model.vocabulary)
        state = {name: torch_of(array) for name, array in models["model"].items()}
        args = args_of(model, 1, stages, model.vocabulary)
        path = write(directory / "model.pt", {"args": args, "model": state, "iteration": 3})
        return Checkpoint(path, model.canonical())

    def option_sets(self):
        return [{"target_layout": "core"}, {"layout": "core"}]


class TestUnknownFamily(LoaderTests):
    loader = LOADER
    models = (without_family(LLAMA),)

    def write(self, directory: Path, model) -> Checkpoint:
        path = write(directory / "model.pt", tensors_of(model))
        return Checkpoint(path, {PASSTHROUGH: model.hf()})


@pytest.mark.parametrize("model", [LLAMA, TIED, PADDED[0]], ids=str)
def test_torch_reads_what_was_written(model, tmp_path):
    path = save(SAVER, messages(model, tmp_path / "s"), tmp_path / "model.pt", {})
    assert path == tmp_path / "model.pt"
    assert_state(torch.load(path, weights_only=True), model.hf())
    path = save(SAVER, messages(model, tmp_path / "s"), tmp_path / "core.pt", {"layout": "core"})
    ((_, models),) = rank_states(model, 1, even(4, 1), rows=model.vocabulary)
    assert_state(torch.load(path, weights_only=False)["model"], models["model"])


def test_views_and_shared_storages_are_read_where_they_lie(tmp_path):
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {"whole": whole, "transposed": whole.T, "part": whole[1:3, 2:5], "scalar": whole[1, 1]}
    found = loaded(LOADER, write(tmp_path / "m.pt", state))[PASSTHROUGH]
    expected = {name: tensor.contiguous().numpy() for name, tensor in state.items()}
    assert_equal_arrays(found, expected, "views")


@pytest.mark.parametrize("container", ["model", "state_dict", "model_state_dict", "module"])
def test_a_state_dict_inside_is_found_and_the_rest_named(container, tmp_path):
    write_config(tmp_path, LLAMA)
    state = {container: tensors_of(LLAMA), "optimizer": {"step": 3}, "epoch": 1}
    path = write(tmp_path / "m.pt", state)
    assert_equal(loaded(LOADER, path), LLAMA.canonical())
    dropped = [drop.name for drop in end_of(LOADER.load(path, {})).dropped]
    assert dropped == ["optimizer", "epoch"]


def test_states_that_are_no_tensors_are_named(tmp_path):
    write_config(tmp_path, LLAMA)
    states = {"a._extra_state": {"amax": 1.0}, "b._extra_state": {}, "c._extra_state": None}
    path = write(tmp_path / "m.pt", {**tensors_of(LLAMA), **states})
    assert_equal(loaded(LOADER, path), LLAMA.canonical())
    (dropped,) = end_of(LOADER.load(path, {})).dropped
    assert dropped.name == "2 _extra_state objects"


@pytest.mark.parametrize(
    "path",
    [
        ("fsdp_checkpoint", "model"),
        ("model", "state_dict"),
        ("state_dict", "module"),
        ("fsdp_checkpoint", "model", "state_dict"),
    ],
)
def test_containers_in_containers(path, tmp_path):
    write_config(tmp_path, LLAMA)
    state = tensors_of(LLAMA)
    for depth, key in enumerate(reversed(path)):
        state = {f"other{depth}": 1, "optimizer": {"step": torch.ones(1)}, key: state}
    end = end_of(LOADER.load(write(tmp_path / "m.pt", state), {}))
    assert_equal(loaded(LOADER, tmp_path / "m.pt"), LLAMA.canonical())
    above = [".".join(path[:depth]) for depth in range(len(path))]
    others = {
        f"{before}.{name}".removeprefix(".")
        for depth, before in enumerate(above)
        for name in (f"other{len(path) - 1 - depth}", "optimizer")
    }
    assert {drop.name for drop in end.dropped} == others
    assert f"the weights are those of {'.'.join(path)!r}" in end.notes


def test_a_container_of_itself(tmp_path):
    state: dict[str, object] = {}
    state["model"] = state["state_dict"] = state
    with pytest.raises(FormatError, match="holds itself"):
        list(LOADER.load(write(tmp_path / "m.pt", state), {}))


@pytest.mark.parametrize(
    ("prefixes", "wrap"),
    [
        ((), "_orig_mod."),
        ((), "module."),
        ((), "_orig_mod.module."),
        (("actor.",), "actor."),
        (("actor.", "critic."), "actor.critic."),
        (("net.",), "net._fsdp_wrapped_module."),
    ],
)
def test_prefixes_are_taken_from_names_and_reported(prefixes, wrap, tmp_path):
    write_config(tmp_path, LLAMA)
    path = write(tmp_path / "m.pt", {wrap + name: t for name, t in tensors_of(LLAMA).items()})
    options = {"strip_prefix": prefixes}
    assert_equal(loaded(LOADER, path, options), LLAMA.canonical())
    notes = " ".join(end_of(LOADER.load(path, options)).notes)
    assert all(f"{prefix!r} was taken" in notes for prefix in prefixes)
    assert ("names of wrappers were taken out" in notes) == (
        wrap not in ("actor.", "actor.critic.")
    )


@pytest.mark.parametrize(
    ("state", "prefix", "reason"),
    [
        ({"a.x": torch.ones(1)}, "b.", "no name starts with --strip-prefix 'b.'"),
        ({"a.x": torch.ones(1), "x": torch.ones(1)}, "a.", "is the name of another tensor"),
        ({"module.x": torch.ones(1), "x": torch.ones(1)}, None, "and another tensor are both"),
    ],
)
def test_prefixes_that_do_not_fit(state, prefix, reason, tmp_path):
    path = write(tmp_path / "m.pt", state)
    with pytest.raises(FormatError, match=reason):
        list(LOADER.load(path, {"strip_prefix": (prefix,) if prefix else ()}))


def test_a_whole_checkpoint_of_rlinf_in_one_file(tmp_path):
    write_config(tmp_path, LLAMA)
    state = {"fsdp_checkpoint": {"model": tensors_of(LLAMA), "optimizers": {}}, "extra": 1}
    path = write(tmp_path / "full_weights.pt", state)
    assert_equal(loaded(LOADER, path), LLAMA.canonical())
    dropped = {drop.name for drop in end_of(LOADER.load(path, {})).dropped}
    assert dropped == {"fsdp_checkpoint.optimizers", "extra"}


def test_local_shards_of_rlinf_are_refused(tmp_path):
    folder = tmp_path / "local_shard_checkpoint"
    folder.mkdir()
    path = write(folder / "checkpoint_rank_0.pt", {"model": tensors_of(LLAMA)})
    with pytest.raises(FormatError, match="is one rank's share; give the directory"):
        list(LOADER.load(path, {}))


def test_an_equal_copy_of_tied_embeddings_is_dropped(tmp_path):
    write_config(tmp_path, TIED)
    tensors = tensors_of(TIED)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    path = write(tmp_path / "m.pt", tensors)
    assert_equal(loaded(LOADER, path), TIED.canonical())


def test_padding_is_cut(tmp_path):
    model = PADDED[0]
    target = save(SAVER, messages(model, tmp_path / "s"), tmp_path / "t", {})
    words = loaded(LOADER, target)["embeddings"]["word embeddings"]
    expected = model.canonical(padded=False)["embeddings"]["word embeddings"]
    assert words.tobytes() == expected.tobytes() != padded(expected, 64).tobytes()


@pytest.mark.parametrize(
    "state", [[], torch.zeros(2), {}, {"model": {}}, {"model": {"language_model": {"a": {}}}}]
)
def test_a_file_without_a_state_dict_is_an_error(state, tmp_path):
    with pytest.raises(FormatError) as error:
        list(LOADER.load(write(tmp_path / "m.pt", state), {}))
    assert_one_line(error.value)


def test_an_unknown_model_cannot_change_its_layout(tmp_path):
    path = write(tmp_path / "m.pt", {"scale": torch.zeros(2)})
    with pytest.raises(SchemaError, match="no schema knows"):
        SAVER.plan(LOADER.load(path, {}), {"target_layout": "core"})


@pytest.mark.parametrize("version", [0, 1, 3])
def test_legacy_names(version, tmp_path):
    model = tiny("gpt", num_query_groups=8)
    root = legacy_by_hand.write(tmp_path, model, 1, even(4, 1), 37, version=version)
    (rank,) = root.glob("*/mp_rank_00/model_optim_rng.pt")
    path = rank.rename(tmp_path / "m.pt")
    assert_equal(loaded(LOADER, path), model.canonical())
    target = save(SAVER, LOADER.load(path, {}), tmp_path / "t.pt", {"layout": "legacy"})
    assert_equal(loaded(LOADER, target), model.canonical())
    state = torch.load(target, weights_only=False)
    assert state["checkpoint_version"] == 3.0
    assert set(state["model"]["language_model"]) == {"embedding", "encoder", "output_layer"}


def test_legacy_models_lack_norms_of_heads(tmp_path):
    with pytest.raises(SchemaError, match="norms of query and key heads"):
        SAVER.plan(iter(messages(tiny("qwen3"), tmp_path)), {"layout": "legacy"})
