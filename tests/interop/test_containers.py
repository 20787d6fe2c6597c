"""Where in the files of a training the model lies: any depth, found without being asked."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

import ckptx
from tests.record.sources import _family

pytestmark = pytest.mark.filterwarnings("ignore:.*single process:UserWarning")
PATHS = [
    ("state", "model"),
    ("actor_module",),
    ("app", "model"),
    ("policy", "state_dict"),
    ("trainer", "state", "agent", "policy"),
]
MOMENTS = {"state": {0: {"step": torch.ones(()), "exp_avg": torch.ones(3, 2)}}}


@pytest.fixture
def base(tmp_path):
    return _family("llama")(tmp_path / "base")


def nested(path, state):
    for key in reversed(path):
        state = {key: state, "epoch": 3, "rng_state": torch.zeros(4), "optimizer": MOMENTS}
    return state


def write(value, place, form, base):
    place.mkdir()
    shutil.copy(base / "config.json", place)
    if form == "pt":
        torch.save(value, place / "last.ckpt")
        return place / "last.ckpt"
    dcp.save(value, checkpoint_id=place)
    return place


def assert_is(source, expected, tmp_path, **options):
    report = ckptx.convert(source, tmp_path / "out", to="hf", **options)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    return report


@pytest.mark.parametrize("form", ["pt", "dcp"])
@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_a_model_is_found_at_any_depth(path, form, base, tmp_path):
    state = load_file(base / "model.safetensors")
    source = write(nested(path, state), tmp_path / "run", form, base)
    report = assert_is(source, state, tmp_path)
    assert any(repr(".".join(path)) in note for note in report.notes) or len(path) == 1
    assert "(0 bytes)" not in str(report)


@pytest.mark.parametrize("form", ["pt", "dcp"])
def test_an_average_is_weights_too(form, base, tmp_path):
    state = load_file(base / "model.safetensors")
    average = {name: tensor + 1 for name, tensor in state.items()}
    both = {"model": state, "ema_model": average, "optimizer": MOMENTS}
    source = write(both, tmp_path / "run", form, base)
    report = assert_is(source, state, tmp_path)
    assert any("'ema_model' holds weights, too: --container" in note for note in report.notes)
    shutil.rmtree(tmp_path / "out")
    assert_is(source, average, tmp_path, container="ema_model")
    with pytest.raises(ckptx.FormatError, match="no container 'ema'; found 'ema_model', 'model'"):
        ckptx.convert(source, tmp_path / "none", to="hf", container="ema")


@pytest.mark.parametrize("form", ["pt", "dcp"])
def test_of_two_models_the_one_that_fits_the_config_is_taken(form, base, tmp_path):
    state = load_file(base / "model.safetensors")
    other = {f"net.{n}.weight": torch.ones(3, 2) for n in range(40)}
    source = write({"actor": state, "critic": other}, tmp_path / "run", form, base)
    report = assert_is(source, state, tmp_path)
    assert any("'critic' holds weights, too" in note for note in report.notes)
    config = json.loads((base / "config.json").read_text())
    config["architectures"] = ["SomethingElse"]
    for folder in {source, source.parent}:
        if (folder / "config.json").exists():
            (folder / "config.json").write_text(json.dumps({**config, "model_type": "other"}))
    with pytest.raises(ckptx.FormatError, match="found 'actor', 'critic'; say which"):
        ckptx.convert(source, tmp_path / "none", to="hf")


def test_a_model_in_the_client_state_of_deepspeed(tmp_path):
    from tests.formats import zero_by_hand

    state = {"model.a.weight": torch.arange(6.0).reshape(3, 2), "model.b.weight": torch.ones(2)}
    zero_by_hand.write(tmp_path / "zero", state, 2, 2)
    (file,) = (tmp_path / "zero").rglob("mp_rank_00_model_states.pt")
    average = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({**torch.load(file, weights_only=False), "ema": average}, file)
    ckptx.convert(tmp_path / "zero", tmp_path / "out", to="hf", container="ema", no_config=True)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], average[name]) for name in average)
    with pytest.raises(ckptx.FormatError, match="no container 'other'; found 'ema', 'module'"):
        ckptx.convert(tmp_path / "zero", tmp_path / "no", to="hf", container="other")


def shards_of(state, place, suffix, numbers, count=2, stem="model"):
    from safetensors.torch import save_file

    names = sorted(state)
    for number in numbers:
        part = {name: state[name] for name in names[number % 2 :: 2]}
        file = place / f"{stem}-{number:05d}-of-{count:05d}{suffix}"
        if suffix == ".bin":
            torch.save(part, file)
        else:
            save_file(part, file, {"format": "pt"})


@pytest.mark.parametrize("numbers", [(1, 2), (0, 1)])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_numbers_of_shards_prove_them_complete_without_an_index(suffix, numbers, base, tmp_path):
    state = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    shards_of(state, base, suffix, numbers)
    assert_is(base, state, tmp_path)
    (last,) = base.glob(f"*{numbers[-1]:05d}-of-*")
    last.unlink()
    missing = f"of 2 number {numbers[-1]} is missing; copy it"
    if numbers[0] == 0:  # then the first may be 1
        missing = "missing"
    with pytest.raises(ckptx.FormatError, match=missing):
        ckptx.convert(base, tmp_path / "none", to="hf")


def test_shards_of_two_sets_are_refused(base, tmp_path):
    state = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    shards_of(state, base, ".safetensors", (1, 2))
    shards_of(state, base, ".safetensors", (1, 2, 3), count=3)
    with pytest.raises(ckptx.FormatError, match=r"several sets .*model-00001-of-00002"):
        ckptx.convert(base, tmp_path / "none", to="hf")


@pytest.mark.parametrize("sharded", [False, True])
def test_a_directory_that_is_called_as_a_file_is_read(sharded, base, tmp_path):
    """DeepSpeed's script makes pytorch_model.bin a directory since release 0.15.3."""
    state = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    inside = base / "pytorch_model.bin"
    inside.mkdir()
    if sharded:
        shards_of(state, inside, ".bin", (1, 2), stem="pytorch_model")
        names = sorted(state)
        homes = {
            name: f"pytorch_model-{2 - place % 2:05d}-of-00002.bin"
            for place, name in enumerate(names)
        }
        index = {"metadata": {"total_size": 1}, "weight_map": homes}
        (inside / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(state, inside / "pytorch_model.bin")
    assert_is(base, state, tmp_path)


def test_a_model_that_fsdp_has_gathered(base, tmp_path):
    """As accelerate and Trainer save it with FULL_STATE_DICT, under names of memory."""
    state = load_file(base / "model.safetensors")
    place = tmp_path / "checkpoint-5"
    place.mkdir()
    torch.save(state, place / "pytorch_model_fsdp.bin")
    torch.save(MOMENTS, place / "optimizer.bin")
    (place / "trainer_state.json").write_text("{}")
    report = assert_is(place, state, tmp_path, hf_base=base)
    assert {drop["name"] for drop in report.dropped} == {"optimizer.bin", "trainer_state.json"}


def test_a_model_that_has_two_names_has_both(base, tmp_path):
    """One dictionary in two places, as pickles keep it: an optimizer's own, and two roles."""
    state = load_file(base / "model.safetensors")
    source = write({"optimizer": {"model": state}, "model": state}, tmp_path / "one", "pt", base)
    assert_is(source, state, tmp_path)
    both = write({"actor": state, "critic": state}, tmp_path / "two", "pt", base)
    with pytest.raises(ckptx.FormatError, match="found 'actor', 'critic'; say which"):
        ckptx.convert(both, tmp_path / "none", to="hf")
    shutil.rmtree(tmp_path / "out")
    assert_is(both, state, tmp_path, container="critic")


@pytest.mark.parametrize("named", [{}, {"from_": "core"}])
def test_a_directory_above_is_told_of_what_lies_below(named, base, tmp_path):
    for name in ("first", "second"):
        ckptx.convert(base, tmp_path / "runs" / name, to="core")
    with pytest.raises(ckptx.CkptxError, match=r"checkpoints lie below it: give .*first, .*second"):
        ckptx.convert(tmp_path / "runs", tmp_path / "out", to="hf", **named)
