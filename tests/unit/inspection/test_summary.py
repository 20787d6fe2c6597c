"""``inspect`` and ``print-tensor`` on checkpoints of every format, against torch."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from ckptx.containers import torch_zip
from ckptx.errors import PlanError
from ckptx.inspection import summary
from ckptx.inspection.layers import parse_layers
from ckptx.inspection.summary import Wanted, inspect
from ckptx.inspection.text import render
from ckptx.inspection.values import parse_slice
from ckptx.registry import registry
from ckptx.registry.open import open_checkpoint
from ckptx.tensors.lazy import stored
from ckptx.tensors.placement import placement_of
from ckptx.testing.conversion import convert, save
from ckptx.testing.models import messages, tiny
from ckptx.text.tree import Row, tree

pytest.importorskip("torch")

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

DEEPSPEED = Path(__file__).resolve().parents[2] / "golden" / "deepspeed"
Q = "model.layers.2.self_attn.q_proj.weight"
FORMATS = {
    "hf": ("hf", {}),
    "torch_dist": ("core", {"target_tensor_parallel_size": 2, "target_pipeline_parallel_size": 2}),
    "torch": (
        "core",
        {
            "target_tensor_parallel_size": 2,
            "target_pipeline_parallel_size": 2,
            "ckpt_format": "torch",
        },
    ),
    "legacy": ("legacy", {"target_tensor_parallel_size": 2}),
    "meta": ("meta", {"target_shards": 2}),
    "dcp": ("dcp", {"shards": 2, "target_container": "model"}),
    "pytorch": ("pytorch", {}),
}


@pytest.fixture(scope="module")
def llama(write_llama, tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("source") / "llama", shards=2, vocab_size=38)


@pytest.fixture(scope="module")
def weights(llama):
    return {name: t for file in llama.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.fixture(scope="module")
def checkpoints(llama, tmp_path_factory):
    """The same model in every format that has a saver."""
    place = tmp_path_factory.mktemp("formats")
    loader = registry.loader("hf")
    return {
        name: convert(loader, llama, registry.saver(saver), place / name, options)
        for name, (saver, options) in FORMATS.items()
    }


def write_verl(directory: Path, weights: dict[str, torch.Tensor], world: int) -> Path:
    """Write whole tensors of one rank as verl does, or their halves of two by hand."""
    directory.mkdir(parents=True)
    for rank in range(world):
        torch.save(weights, directory / f"model_world_size_{world}_rank_{rank}.pt")
        torch.save({"rank": rank}, directory / f"optim_world_size_{world}_rank_{rank}.pt")
    return directory


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_tells_the_same_model(name, checkpoints, weights):
    found = inspect(checkpoints[name], wanted=Wanted(stats=True))
    content = found.to_json()
    json.dumps(content, allow_nan=False)
    assert content["healthy"], content["problems"]
    assert content["family"] == "llama"
    assert content["names"] == "huggingface"
    assert content["parameters"] == sum(tensor.numel() for tensor in weights.values())
    rows = {row["name"]: row for row in content["tensors"]}
    assert set(rows) == set(weights)
    for key, tensor in weights.items():
        row = rows[key]
        assert row["shape"] == list(tensor.shape)
        assert row["dtype"] == "float32"
        stats, wide = row["stats"], tensor.double()
        assert stats["min"] == wide.min().item()
        assert stats["max"] == wide.max().item()
        assert math.isclose(stats["mean"], wide.mean().item(), rel_tol=1e-12, abs_tol=1e-15)
        assert math.isclose(stats["std"], wide.std().item(), rel_tol=1e-12)
        assert (stats["nan"], stats["inf"]) == (0, 0)
        covered = sum(shard["elements"] for shard in row["shards"])
        assert covered % tensor.numel() == 0
        assert covered >= tensor.numel()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torch_dist", {"tp": 2, "pp": 2, "vpp": None, "ckpt_format": "torch_dist"}),
        ("torch", {"tp": 2, "pp": 2, "ckpt_format": "torch"}),
        ("legacy", {"tp": 2, "pp": 1}),
        ("meta", {"tp": 2}),
    ],
)
def test_parallel_sizes_are_told(name, expected, checkpoints):
    parallel = inspect(checkpoints[name]).to_json()["parallel"]
    assert {key: parallel[key] for key in expected} == expected


def test_quantised_weights_say_what_they_are_made_of(llama, weights, tmp_path):
    place = tmp_path / "fp8"
    place.mkdir()
    config = json.loads((llama / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]},
        "torch_dtype": "bfloat16",
    }
    (place / "config.json").write_text(json.dumps(config))
    codes = weights[Q].to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 0.5], [2.0, 4.0]])
    rest = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(rest | {Q: codes, f"{Q}_scale_inv": scale}, place / "model.safetensors")
    found = inspect(place, wanted=Wanted(tree=True, stats=True))
    (row,) = (row for row in found.to_json()["tensors"] if row["name"] == Q)
    assert (row["dtype"], row["stored_dtypes"]) == ("bfloat16", ["float32", "float8_e4m3fn"])
    blocks = scale.repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert row["stats"]["max"] == (codes.float() * blocks).bfloat16().max().item()
    assert found.to_json()["dtypes"]["float8_e4m3fn"]["tensors"] == 1
    assert "bfloat16 [16, 16] of float32 and float8_e4m3fn" in render(found, 100)


def test_sizes_of_experts_are_told_of_experts_only(checkpoints, tmp_path):
    assert "TP 2, PP 2, torch_dist" in render(inspect(checkpoints["torch_dist"]), 80)
    mixture = tiny("mixtral")
    saver, options = registry.saver("core"), {"target_expert_parallel_size": 2}
    place = save(saver, messages(mixture, tmp_path / "source"), tmp_path / "core", options)
    assert "TP 1, PP 1, EP 2, ETP 1" in render(inspect(place), 80)


def test_shards_say_which_rank_holds_what(checkpoints):
    rows = {row["name"]: row for row in inspect(checkpoints["torch"]).to_json()["tensors"]}
    place = "mp_rank_{:02d}_001/model_optim_rng.pt"
    assert rows[Q]["cut"] == "cut in 2 along axis 0"
    assert rows[Q]["shards"] == [
        {"file": place.format(0), "box": [[0, 8], [0, 16]], "elements": 128},
        {"file": place.format(1), "box": [[8, 16], [0, 16]], "elements": 128},
    ]
    assert rows[Q.replace("q_proj", "o_proj")]["cut"] == "cut in 2 along axis 1"
    norm = rows["model.layers.2.input_layernorm.weight"]
    assert norm["cut"] == "2 copies"
    assert [shard["box"] for shard in norm["shards"]] == [[[0, 16]], [[0, 16]]]


@pytest.mark.parametrize("case", ["zero1_bf16_frozen", "zero2_bf16_groups", "zero3_bf16"])
def test_deepspeed_tells_stage_ranks_and_state(case):
    content = inspect(DEEPSPEED / case, wanted=Wanted(stats=True)).to_json()
    assert content["parallel"]["zero_stage"] == int(case[4])
    assert content["parallel"]["world_size"] == (2 if case.startswith("zero1") else 3)
    assert content["iteration"] == 3
    state = {entry["name"]: entry["bytes"] for entry in content["training_state"]}
    assert state["exp_avg"] == state["exp_avg_sq"] > 0
    expected = load_file(DEEPSPEED / f"{case}.safetensors")
    for row in content["tensors"]:
        tied = expected["model.embed_tokens.weight"]
        wide = expected.get(row["name"], tied).double()
        assert row["stats"]["max"] == wide.max().item()
        assert math.isclose(row["stats"]["std"], wide.std().item(), rel_tol=1e-12)


def test_verl_tells_its_ranks_and_which_is_missing(tmp_path, weights, run):
    place = write_verl(tmp_path / "actor", weights, 1)
    content = inspect(place).to_json()
    assert (content["format"], content["parallel"]) == ("verl", {"world_size": 1})
    assert [entry["name"] for entry in content["training_state"]] == [
        "optim_world_size_1_rank_*.pt"
    ]
    (place / "model_world_size_1_rank_0.pt").rename(place / "model_world_size_2_rank_0.pt")
    code, out, err = run("inspect", place, "--json")
    assert code == 1
    assert "1 of 2 rank files are missing" in err
    content = json.loads(out)
    assert (content["healthy"], content["format"]) == (False, "verl")
    assert "rank files are missing" in content["problems"][0]["message"]


def test_run_of_verl_whose_tracker_points_nowhere_is_told(tmp_path, weights, run):
    write_verl(tmp_path / "run" / "global_step_10" / "actor", weights, 1)
    tracker = tmp_path / "run" / "latest_checkpointed_iteration.txt"
    tracker.write_text("10")
    assert inspect(tmp_path / "run").iteration == 10
    tracker.write_text("20")
    code, _, err = run("inspect", tmp_path / "run")
    assert code == 1
    assert "points to global_step_20, which is not there" in err


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
        *(torch.float8_e5m2, torch.int64, torch.int32, torch.uint8, torch.bool),
    ],
    ids=str,
)
def test_statistics_are_those_of_torch(dtype, tmp_path):
    torch.manual_seed(0)
    values = (torch.randn(3, 350_001) * 20 + 7).to(dtype)  # a block and a bit
    save_file({"x": values}, tmp_path / "x.safetensors")
    found = inspect(tmp_path / "x.safetensors", wanted=Wanted(stats=True)).statistics["x"]
    wide = values.double()
    assert (found.elements, found.nan, found.inf) == (values.numel(), 0, 0)
    assert found.zeros == int((wide == 0).sum())
    assert (found.minimum, found.maximum) == (wide.min().item(), wide.max().item())
    assert math.isclose(found.mean, wide.mean().item(), rel_tol=1e-12)
    assert math.isclose(found.std, wide.std().item(), rel_tol=1e-11)


def test_memory_does_not_grow_with_the_tensors(tmp_path):
    head = {"w": {"dtype": "F32", "shape": [16384, 8192], "data_offsets": [0, 1 << 29]}}
    data = json.dumps(head).encode()
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + (1 << 29))  # 512 MiB that take no room
    code = (
        "from pathlib import Path\n"
        "from ckptx.inspection.summary import Wanted, inspect\n"
        f"found = inspect(Path({str(tmp_path / 'x.safetensors')!r}), wanted=Wanted(stats=True))\n"
        "assert found.statistics['w'].zeros == 16384 * 8192\n"
        "print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200 << 10  # KiB, Python and numpy included


def test_what_is_not_finite_is_counted_left_out_and_told(tmp_path, run):
    values = torch.randn(4000, dtype=torch.bfloat16)
    values[3], values[70], values[100] = math.nan, math.inf, -math.inf
    save_file({"x": values, "y": torch.full((3,), math.nan)}, tmp_path / "x.safetensors")
    code, out, err = run("inspect", tmp_path / "x.safetensors", "--stats", "--json")
    assert (code, err) == (1, "")
    content = json.loads(out)
    rows = {row["name"]: row["stats"] for row in content["tensors"]}
    finite = values[values.isfinite()].double()
    assert (rows["x"]["nan"], rows["x"]["inf"]) == (1, 2)
    assert rows["x"]["max"] == finite.max().item()
    assert math.isclose(rows["x"]["std"], finite.std().item(), rel_tol=1e-12)
    assert (rows["y"]["nan"], rows["y"]["mean"]) == (3, None)
    problems = sorted((p["tensor"], p["kind"]) for p in content["problems"])
    assert problems == [("x", "inf"), ("x", "nan"), ("y", "nan")]
    code, out, _ = run("inspect", tmp_path / "x.safetensors")
    assert code == 0
    assert "--stats" in out


def test_tensors_that_do_not_fit_the_config_are_told_and_still_shown(llama, tmp_path, run):
    place = shutil.copytree(llama, tmp_path / "llama")
    index = place / "model.safetensors.index.json"
    for file in place.glob("*.safetensors"):
        kept = {name: tensor for name, tensor in load_file(file).items() if name != Q}
        save_file(kept, file)
    content = json.loads(index.read_text())
    del content["weight_map"][Q]
    index.write_text(json.dumps(content))
    code, out, _ = run("inspect", place, "--json")
    content = json.loads(out)
    assert (code, content["healthy"]) == (1, False)
    assert content["problems"][0]["kind"] == "incomplete"
    assert Q in content["problems"][0]["message"]
    assert len(content["tensors"]) == 38
    code, out, err = run("inspect", place)
    assert (code, err) == (1, "")
    assert "1 problem" in out


@pytest.mark.parametrize("form", ["torch", "legacy"])
def test_each_rank_is_read_once_to_be_recognised_and_loaded(form, checkpoints, monkeypatch):
    read, real = [], torch_zip.read

    def counted(path, *rest):
        read.append(Path(path))
        return real(path, *rest)

    monkeypatch.setattr(torch_zip, "read", counted)
    with open_checkpoint(checkpoints[form]) as checkpoint:
        assert checkpoint.format == ("legacy" if form == "legacy" else "core")
    assert sorted(read) == sorted(checkpoints[form].rglob("model_optim_rng.pt"))
    read.clear()
    registry.detect(checkpoints[form])
    assert len(read) == 1


def retold(common, **changes):
    """Change the args of a file of Megatron; None takes one out, ``args`` all of them."""
    state = torch.load(common, weights_only=False)
    for name, value in changes.items():
        if name == "args":
            del state["args"]
        elif value is None:
            delattr(state["args"], name)
        else:
            setattr(state["args"], name, value)
    torch.save(state, common)


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("torch_dist", {"pipeline_model_parallel_size": 3}, "3"),
        ("torch_dist", {"num_layers": 5}, "layer"),
        ("torch_dist", {"num_layers": None}, "num_layers"),
        ("torch_dist", {"args": None}, "holds no args that describe the model"),
        ("torch", {"num_layers": None}, "num_layers"),
        ("torch", {"num_layers": 3}, "3"),
        ("torch", {"args": None}, "holds no args that describe the model"),
        ("legacy", {"num_attention_heads": None}, "num_attention_heads"),
    ],
)
def test_args_that_do_not_fit_are_told_and_the_rest_is_shown(
    form, changes, message, checkpoints, weights, tmp_path, run
):
    place = shutil.copytree(checkpoints[form], tmp_path / form)
    shutil.rmtree(next(place.rglob("huggingface")))  # its config would say what args do not
    for file in (*place.rglob("common.pt"), *place.rglob("model_optim_rng.pt")):
        retold(file, **changes)
    code, out, err = run("inspect", place, "--json")
    content = json.loads(out)
    assert (code, err, content["healthy"]) == (1, "", False)
    (problem,) = content["problems"]
    assert (problem["kind"], message in problem["message"]) == ("incomplete", True)
    assert content["format"] == ("legacy" if form == "legacy" else "core")
    assert content["files"]
    assert all(file["bytes"] for file in content["files"])
    stored = sum(tensor.nbytes for tensor in weights.values())
    assert sum(sizes["bytes"] for sizes in content["dtypes"].values()) >= stored
    assert len(content["tensors"]) >= 9  # torch_dist stacks the layers
    code, out, err = run("inspect", place, "--tree")
    assert (code, err) == (1, "")
    assert "1 problem, see above" in out


@pytest.mark.parametrize("spoilt", ["config", "weights"])
def test_a_config_that_lacks_an_entry_and_weights_too_many(spoilt, llama, tmp_path, run):
    place = shutil.copytree(llama, tmp_path / "llama")
    if spoilt == "config":
        config = json.loads((place / "config.json").read_text())
        del config["hidden_size"]
        (place / "config.json").write_text(json.dumps(config))
    else:
        (place / "model.safetensors.index.json").unlink()
        held = {n: t for file in place.glob("*.safetensors") for n, t in load_file(file).items()}
        for file in place.glob("*.safetensors"):
            file.unlink()
        save_file(held | {"model.extra": torch.ones(3)}, place / "model.safetensors")
    code, out, err = run("inspect", place, "--json")
    content = json.loads(out)
    assert (code, err, len(content["problems"])) == (1, "", 1)
    assert ("hidden_size" if spoilt == "config" else "model.extra") in out
    assert len(content["tensors"]) == 39 + (spoilt == "weights")


def test_unfinished_saves_and_trackers_are_told(checkpoints, tmp_path, run):
    place = shutil.copytree(checkpoints["torch"], tmp_path / "run")
    (place / "release").rename(place / "iter_0000010")
    (place / "latest_checkpointed_iteration.txt").write_text("10")
    (place / "iter_0000020").mkdir()
    (note,) = (n for n in inspect(place).to_json()["notes"] if "iter_0000020" in n)
    assert "later than iteration 10" in note
    (place / "latest_checkpointed_iteration.txt").write_text("30")
    code, _, err = run("inspect", place)
    assert code == 1
    assert "points to iter_0000030, which is not there" in err
    partial = shutil.copytree(checkpoints["hf"], tmp_path / "x.ckptx-partial")
    assert not inspect(partial).healthy


def test_distributed_save_without_metadata_was_not_finished(checkpoints, tmp_path, run):
    place = shutil.copytree(checkpoints["dcp"], tmp_path / "dcp")
    (place / ".metadata").unlink()
    code, _, err = run("inspect", place)
    assert code == 1
    assert "no .metadata, which is written last: the save was not finished" in err


def test_tree_folds_alike_layers_and_fits(checkpoints, run, monkeypatch):
    for columns in (60, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        code, out, _ = run("inspect", checkpoints["torch_dist"], "--tree")
        assert code == 0
        assert max(map(len, out.splitlines()[1:])) <= columns  # but the path
        assert re.search(r"^ *0-3 +4 alike, 30\.5 KiB$", out, re.MULTILINE)
        assert out.count("q_proj.weight") == 1
        assert "cut in 2 along axis 0" in out
    code, out, _ = run("inspect", checkpoints["torch_dist"], "--layers", "1,3")
    assert out.count("q_proj.weight") == 2
    assert "__0_0.distcp" in out
    code, out, _ = run("inspect", checkpoints["torch_dist"], "--filter", "*norm*", "--json")
    assert len(json.loads(out)["tensors"]) == 9
    code, _, err = run("inspect", checkpoints["torch_dist"], "--filter", "nothing*")
    assert code == 1
    assert "no tensor is of those asked for" in err


def test_tree_does_not_fold_what_differs():
    def row(layer, shape):
        return Row(f"h.{layer}.w", f"float32 {shape}", "", f"{layer}.bin", 8)

    lines = "\n".join(tree([row(0, 1), row(1, 2), row(10, 2), row(2, 2)], 80))
    assert re.findall(r"^  (\S+)", lines, re.MULTILINE) == ["0.w", "1-2.w", "10.w"]


def test_stored_names_are_those_of_the_files(checkpoints):
    found = inspect(checkpoints["torch"], wanted=Wanted(names="stored"))
    name = "mp_rank_01_001:0:decoder.layers.0.mlp.linear_fc2.weight"
    assert found.tensors[name].shape == (16, 12)
    assert found.names == "stored"


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,", "-1"])
def test_layers_that_mean_nothing_are_refused(text):
    with pytest.raises(PlanError, match="no list of layers"):
        parse_layers(text)


@pytest.mark.parametrize(
    "text",
    [
        *("0", "-1", ":", "...", "1:3", "::2", "-3:", ":, 2", "..., -2", "3, ...", "2:9:3, ::5"),
        *("[0:4, 1]", "5:2", "0, 0, 0", "1:, ..., ::70", ":, :, 100:2000:65"),
    ],
)
@pytest.mark.parametrize("name", ["hf", "bf16"])
def test_slices_are_those_of_numpy(text, name, tmp_path, run):
    torch.manual_seed(1)
    x = torch.randn(7, 6, 2000).to(torch.bfloat16 if name == "bf16" else torch.float32)
    save_file({"x": x}, tmp_path / "x.safetensors")
    expected = eval(f"x.float().numpy()[{text.strip('[]')}]", {"x": x})  # the oracle
    code, out, err = run(
        "print-tensor", tmp_path / "x.safetensors", "x", "--slice", text, "--full", "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["slice_shape"] == list(expected.shape)
    assert np.array_equal(np.array(found["values"], np.float32).reshape(expected.shape), expected)


@pytest.mark.parametrize("text", ["7", "-8", "a", "1:2:-1", "0,0,0,0", "..., ...", "1.5", "::0"])
def test_slices_that_do_not_fit_are_refused(text):
    with pytest.raises(PlanError, match="--slice"):
        parse_slice(text, (7, 6, 5))


def test_outer_values_are_shown_as_numpy_shows_them(tmp_path, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "75")
    x = torch.arange(2 * 40 * 50, dtype=torch.float32).reshape(2, 40, 50)
    save_file({"x": x}, tmp_path / "x.safetensors")
    _, out, _ = run("print-tensor", tmp_path / "x.safetensors", "x")
    with np.printoptions(edgeitems=3, threshold=0, linewidth=75):
        expected = np.array2string(x.numpy(), separator=", ")
    assert expected in out
    _, out, _ = run("print-tensor", tmp_path / "x.safetensors", "x", "--json")
    assert json.loads(out)["values"] is None


def test_names_are_found_as_either_side_spells_them(checkpoints, weights, run):
    place = checkpoints["torch"]
    stored_name = "mp_rank_01_001:0:decoder.layers.0.mlp.linear_fc2.weight"
    down = weights["model.layers.2.mlp.down_proj.weight"]
    _, out, _ = run("print-tensor", place, stored_name, "--full", "--json")
    assert torch.equal(torch.tensor(json.loads(out)["values"]), down[:, 12:])
    _, out, _ = run("print-tensor", place, "*.2.mlp.down_proj.weight", "--full", "--json")
    assert torch.equal(torch.tensor(json.loads(out)["values"]), down)
    code, _, err = run("print-tensor", place, "*.down_proj.weight")
    assert code == 1
    assert "means 4 tensors: 'model.layers.0.mlp.down_proj.weight'" in err
    code, _, err = run("print-tensor", place, "model.layers.2.mlp.down_prj.weight")
    assert code == 1
    assert "'model.layers.2.mlp.down_proj.weight'" in err


def test_what_json_cannot_hold_is_spelt_out(tmp_path, run):
    save_file({"x": torch.tensor([math.nan, math.inf, -math.inf, 1.5])}, tmp_path / "x.safetensors")
    _, out, _ = run("print-tensor", tmp_path / "x.safetensors", "x", "--json")
    assert json.loads(out)["values"] == ["NaN", "Infinity", "-Infinity", 1.5]


def test_options_of_the_loader_are_taken(tmp_path, run, weights):
    state = {"actor": {"w": weights[Q]}, "critic": {"w": weights[Q] * 2}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no process group is no accident here
        dcp.save(state, checkpoint_id=tmp_path / "two", no_dist=True)
    code, _, err = run("inspect", tmp_path / "two")
    assert (code, "--container" in err) == (1, True)
    code, out, _ = run(
        *(
            "print-tensor",
            tmp_path / "two",
            "w",
            "--container",
            "critic",
            "--slice",
            "0,0",
            "--json",
        )
    )
    assert json.loads(out)["values"] == 2 * weights[Q][0, 0].item()
    code, out, _ = run("inspect", tmp_path / "two", "--help")
    assert (code, "--container" in out) == (0, True)


def test_rank_file_with_optimizer_tells_its_bytes(checkpoints, tmp_path):
    place = shutil.copytree(checkpoints["torch"], tmp_path / "run")
    for file in place.glob("release/*/model_optim_rng.pt"):
        with torch.serialization.safe_globals([Namespace]):
            state = torch.load(file, weights_only=True)
        torch.save(state | {"optimizer": {"exp_avg": torch.zeros(10)}}, file)
    content = inspect(place).to_json()
    assert content["training_state"] == [
        {"name": "optimizer", "reason": "only weights are converted", "bytes": 4 * 40}
    ]


def test_zeros_are_odd_and_not_wrong(tmp_path):
    state = {"a": torch.zeros(2, 3), "bias": torch.zeros(3), "b": torch.eye(3)}
    save_file(state, tmp_path / "x.safetensors")
    content = inspect(tmp_path / "x.safetensors", wanted=Wanted(stats=True)).to_json()
    assert content["healthy"]
    assert content["notes"][-1].startswith("all zeros")
    assert content["notes"][-1].endswith(": 'a'")


def test_family_without_names_of_hugging_face_has_canonical_ones(tmp_path):
    model = tiny("gpt")
    saver = registry.saver("core")
    source = save(saver, messages(model, tmp_path / "source"), tmp_path / "core", {})
    found = inspect(source, wanted=Wanted(stats=True))
    assert found.names == "canonical"
    expected = {
        f"{message}: {key}": array
        for message, arrays in model.canonical().items()
        for key, array in arrays.items()
    }
    assert set(found.tensors) == set(expected)
    for name, array in expected.items():
        dtype = getattr(torch, array.dtype.name)
        wide = torch.frombuffer(
            bytearray(array.tobytes()), dtype=dtype
        ).double()  # tags are any bits, NaN among them
        assert found.statistics[name].nan == int(wide.isnan().sum()), name
        assert found.statistics[name].inf == int(wide.isinf().sum()), name
        assert found.statistics[name].maximum == wide[wide.isfinite()].max().item(), name
    assert "problems, see above" in render(found, 80)


def test_every_key_of_the_json_is_documented(checkpoints, tmp_path, run):
    page = (Path(summary.__file__).resolve().parents[2] / "docs" / "inspect.md").read_text()
    cells = re.findall(r"^\| (`.+?`) \|", page, re.MULTILINE)
    documented = [key for cell in cells for key in re.findall(r"`(\w+)`", cell)]
    content = inspect(checkpoints["hf"], wanted=Wanted(stats=True)).to_json()
    assert documented == list(content)
    for key in (*content["tensors"][0], *content["tensors"][0]["stats"]):
        assert f"`{key}`" in page
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    _, out, _ = run("inspect", tmp_path / "x.safetensors", "--json")
    assert list(json.loads(out)) == documented[:5]
    _, out, _ = run("inspect", tmp_path, "--json")  # no loader knows it
    assert json.loads(out)["format"] is None


def test_names_of_strangers_do_nothing_to_a_terminal(tmp_path, run):
    save_file({"a\x1b[2J.b\n": torch.ones(2)}, tmp_path / "x.safetensors")
    for words in (("--tree",), ("--stats",)):
        _, out, _ = run("inspect", tmp_path / "x.safetensors", *words)
        assert "\x1b" not in out
        assert "a\\x1b[2J.b" in out


def test_shards_of_flat_pieces_are_whole_rows_around_them():
    flat = stored(0, 0, "float32", (30,)).narrow(0, 4, 17).split(0, 13)
    (shard,) = placement_of(flat)
    assert (shard.box, shard.elements) == (((0, 1), (0, 13)), 13)
