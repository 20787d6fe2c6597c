"""``modify``: tensors removed, cast and renamed, in every format that it writes."""

from __future__ import annotations

import json
import pickle
import re
import warnings

import pytest

from ckptx.conversion.edits import Edits, edited
from ckptx.conversion.proof import prove
from ckptx.errors import PlanError, SchemaError
from ckptx.protocol.context import Context
from ckptx.registry import registry
from ckptx.testing.conversion import begin_of, checked, convert, end_of, save

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import Metadata
from transformers import AutoModelForCausalLM

from tests.oracles import hf

EDITS = Edits(
    remove=("lm_head.weight", "*.layers.3.*"),
    cast=(("*.mlp.*", "float16"), ("*.up_proj.*", "bfloat16")),
    rename=(("model.layers.*.mlp.*", "model.layers.*.ffn.*"), ("model.norm.weight", "final")),
)


@pytest.fixture(scope="module")
def llama(write_llama, tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("source") / "llama", shards=2)


@pytest.fixture(scope="module")
def weights(llama):
    return {name: t for file in llama.glob("*.safetensors") for name, t in load_file(file).items()}


def by_torch(weights):
    """Make the same edits with eager torch."""
    found = {}
    for name, tensor in weights.items():
        if name == "lm_head.weight" or ".layers.3." in name:
            continue
        if ".mlp." in name:
            tensor = tensor.to(torch.bfloat16 if "up_proj" in name else torch.float16)
        found["final" if name == "model.norm.weight" else name.replace(".mlp.", ".ffn.")] = tensor
    return found


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def modify(format_, source, target, edits, options=None):
    """Modify in this process; return the target, the proof and the End message."""
    loader, saver = registry.loader(format_), registry.saver(format_)
    options = {"no_config": True, **(options or {})}  # as the request of an edit has it
    sent = list(edited(loader.load(source, {}), edits, format_))
    proof = checked(saver.plan(iter(sent), options, Context(target=target)), sent)
    return save(saver, sent, target, options), proof, end_of(sent)


def test_hf_directory_stays_one(llama, weights, tmp_path, run):
    words = []
    for glob in EDITS.remove:
        words += ["--remove", glob]
    for glob, dtype in EDITS.cast:
        words += ["--cast", glob, dtype]
    for old, new in EDITS.rename:
        words += ["--rename", old, new]
    dry = run("modify", llama, tmp_path / "out", *words, "--dry-run", "--json")
    assert dry[0] == 0, dry[2]
    assert not (tmp_path / "out").exists()
    code, out, err = run("modify", llama, tmp_path / "out", *words, "--json")
    assert code == 0, err
    expected = by_torch(weights)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), expected)
    report, forecast = json.loads(out), json.loads(dry[1])
    dropped = {entry["name"]: entry["reason"] for entry in report["dropped"]}
    gone = {n for n in weights if n == "lm_head.weight" or ".layers.3." in n}
    assert set(dropped) == gone
    assert dropped["lm_head.weight"] == "removed on request: --remove 'lm_head.weight'"
    assert set(report["inexact"]) == {"float32 -> float16", "float32 -> bfloat16"}
    (note,) = (one for one in report["notes"] if "no longer describes" in one)
    assert "20 tensors are missing" in note
    shared = ("dropped", "inexact", "notes", "tensors", "bytes_out")
    assert {key: forecast[key] for key in shared} == {key: report[key] for key in shared}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((llama / "config.json").read_text())
    assert (tmp_path / "out" / "ckptx-manifest.json").exists()


def test_file_of_torch_stays_one(llama, weights, tmp_path):
    source = tmp_path / "model.pt"
    torch.save({"state_dict": weights, "optimizer": {"lr": 1e-4}, "epoch": 3}, source)
    target, _, end = modify("pytorch", source, tmp_path / "out.pt", EDITS)
    assert target == tmp_path / "out.pt"
    assert_same(torch.load(target, weights_only=True), by_torch(weights))
    assert {"optimizer", "epoch"} <= {drop.name for drop in end.dropped}


def test_distributed_checkpoint_stays_one_with_its_container(llama, weights, tmp_path):
    loader, saver = registry.loader("hf"), registry.saver("dcp")
    options = {"target_container": "app.model", "shards": 2}
    source = convert(loader, llama, saver, tmp_path / "dcp", options)
    target, _, _ = modify("dcp", source, tmp_path / "out", EDITS)
    expected = by_torch(weights)
    state = {"app": {"model": {n: torch.zeros_like(t) for n, t in expected.items()}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no process group is no accident here
        dcp.load(state, checkpoint_id=target, no_dist=True)
    assert_same(state["app"]["model"], expected)
    with (target / ".metadata").open("rb") as file:
        metadata: Metadata = pickle.load(file)
    keys = [name for name in metadata.state_dict_metadata if name.startswith("app.model.")]
    assert len(keys) == len(expected)
    assert (target / "config.json").exists()


def test_model_that_fits_no_schema_is_mended(llama, weights, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((llama / "config.json").read_bytes())
    extra = {"stray": torch.ones(3), "head.weight": weights["lm_head.weight"]}
    rest = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    save_file(rest | extra, broken / "model.safetensors", {"format": "pt"})
    edits = Edits(remove=("stray",), rename=(("head.*", "lm_head.*"),))
    target, proof, end = modify("hf", broken, tmp_path / "out", edits)
    assert_same(load_file(target / "model.safetensors"), weights)
    assert end.notes == ()
    assert [drop.name for drop in proof.dropped] == ["stray"]


def test_dtype_of_the_config_follows_and_is_told(llama, tmp_path):
    target, _, end = modify("hf", llama, tmp_path / "out", Edits(cast=(("*", "bfloat16"),)))
    config = json.loads((target / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert end.notes == ("config.json: dtype was float32 and is now bfloat16, as most weights are",)


def test_config_of_no_known_family_is_to_be_checked(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text('{"architectures": ["RewardModel"]}')
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "in" / "model.safetensors")
    _, _, end = modify("hf", tmp_path / "in", tmp_path / "out", Edits(remove=("a",)))
    assert "says RewardModel, which no schema knows: check" in end.notes[0]


def test_codes_of_quantised_weights_keep_their_bytes_and_are_not_cast(tmp_path):
    place = tmp_path / "in"
    place.mkdir()
    config = {"architectures": ["Other"], "dtype": "bfloat16", "quantization_config": {}}
    (place / "config.json").write_text(json.dumps(config))
    codes = torch.arange(64, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(8, 8)
    state = {"w": codes, "w_scale_inv": torch.ones(1, 1), "x": torch.ones(2)}
    save_file(state, place / "model.safetensors")
    target, _, _ = modify("hf", place, tmp_path / "out", Edits(rename=(("x", "y"),)))
    found = load_file(target / "model.safetensors")
    assert torch.equal(found["w"].view(torch.uint8), codes.view(torch.uint8))
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(PlanError, match="codes that scales belong to"):
        modify("hf", place, tmp_path / "more", Edits(cast=(("w", "bfloat16"),)))


def test_a_pattern_leaves_integers_and_a_name_means_that_tensor(tmp_path):
    state = {"a": torch.ones(2), "ids": torch.arange(3)}
    save_file(state, tmp_path / "x.safetensors")
    edits = Edits(cast=(("*", "float16"),))
    target, _, _ = modify("hf", tmp_path / "x.safetensors", tmp_path / "out", edits)
    found = load_file(target / "model.safetensors")
    assert_same(found, {"a": torch.ones(2, dtype=torch.float16), "ids": state["ids"]})
    edits = Edits(cast=(("ids", "float16"),))
    with pytest.raises(PlanError, match="no cast from int64 to float16"):
        modify("hf", tmp_path / "x.safetensors", tmp_path / "more", edits)


def test_state_that_could_not_be_named_is_not_lost(llama, weights, tmp_path):
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    weights = {name: one for name, one in weights.items() if name != "model.norm.weight"}
    torch.save({"model": weights | {"stray": torch.ones(1)}, "step": 3}, tmp_path / "x.pt")
    edits = Edits(remove=("stray",))
    with pytest.raises(SchemaError, match=r"norm\.weight' *.*move config.json away"):
        modify("pytorch", tmp_path / "x.pt", tmp_path / "out.pt", edits)
    (tmp_path / "config.json").unlink()
    target, _, end = modify("pytorch", tmp_path / "x.pt", tmp_path / "out.pt", edits)
    assert_same(torch.load(target, weights_only=True), weights)
    assert [drop.name for drop in end.dropped] == ["stray", "step"]


@pytest.mark.parametrize(
    ("edits", "reason"),
    [
        (Edits(remove=("nothing*",)), "--remove 'nothing*': matches no tensor"),
        (Edits(cast=(("nothing", "float16"),)), "--cast 'nothing': matches no tensor"),
        (Edits(rename=(("nothing", "x"),)), "--rename 'nothing': matches no tensor"),
        (Edits(rename=(("*.mlp.*", "*.ffn"),)), "as many * are needed"),
        (Edits(rename=(("lm_head.*", "model.norm.*"),)), "would both be called"),
        (
            Edits(rename=(("model.norm.weight", "x"), ("lm_head.weight", "x"))),
            "'lm_head.weight' and 'model.norm.weight' would both be called 'x'",
        ),
        (Edits(rename=(("model.norm.*", "a.*"), ("*norm.weight", "b.*"))), "by another --rename"),
        (Edits(rename=(("lm_head.weight", ""),)), "would have no name"),
        (Edits(remove=("*",)), "nothing would be left"),
        (Edits(cast=(("*", "int8"),)), "no cast from float32 to int8"),
        (Edits(remove=("lm_head.*",), cast=(("lm_head.*", "float16"),)), "matches no tensor"),
    ],
)
def test_edits_without_one_meaning_are_refused(edits, reason, llama):
    loader = registry.loader("hf")
    with pytest.raises(PlanError, match=re.escape(reason)):
        list(edited(loader.load(llama, {}), edits, "hf"))


def test_two_names_may_be_exchanged(llama, weights, tmp_path):
    gate, up = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    target, _, _ = modify("hf", llama, tmp_path / "out", Edits(rename=((gate, up), (up, gate))))
    found = load_file(target / "model.safetensors")
    assert torch.equal(found[gate], weights[up])
    assert torch.equal(found[up], weights[gate])


def test_formats_that_are_not_modified_are_refused_by_name(llama, tmp_path, run):
    source = convert(registry.loader("hf"), llama, registry.saver("core"), tmp_path / "core")
    code, _, err = run("modify", source, tmp_path / "out", "--remove", "*norm*")
    assert code == 1
    assert "modify changes hf, pytorch, dcp, not 'core'" in err
    core = convert(
        registry.loader("hf"),
        llama,
        registry.saver("pytorch"),
        tmp_path / "x.pt",
        {"layout": "core"},
    )
    code, _, err = run("modify", core, tmp_path / "out", "--remove", "*norm*")
    assert code == 1
    assert "which modify would lose" in err
    code, _, err = run("modify", llama, tmp_path / "out")
    assert code == 2
    assert "say what to change" in err
    code, _, err = run("modify", tmp_path / "nowhere", tmp_path / "out", "--remove", "x")
    assert code == 1
    assert "no such file" in err
    assert not (tmp_path / "out").exists()


def test_an_edit_that_hides_a_tensor_would_not_be_proved(llama, tmp_path):
    loader, saver = registry.loader("hf"), registry.saver("hf")
    sent = list(edited(loader.load(llama, {}), Edits(remove=("lm_head.*",)), "hf"))
    plan = saver.plan(iter(sent), {}, Context(target=tmp_path / "out"))
    begin, end = begin_of(sent), end_of(sent)
    with pytest.raises(PlanError, match="would be lost"):
        prove(plan, begin, type(end)())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("place", ["files", "memory"])
def test_names_of_experts_stay_those_of_the_source(place, tmp_path, run):
    hf.mixtral(tmp_path / "mixtral", num_hidden_layers=2)
    state = load_file(tmp_path / "mixtral" / "model.safetensors")
    if place == "memory":
        state = AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral").state_dict()
    dcp.save(state, checkpoint_id=str(tmp_path / "dcp"))
    (tmp_path / "dcp" / "config.json").write_bytes(
        (tmp_path / "mixtral" / "config.json").read_bytes()
    )
    code, _, err = run("modify", tmp_path / "dcp", tmp_path / "out", "--cast", "*norm*", "float16")
    assert code == 0, err
    with (tmp_path / "out" / ".metadata").open("rb") as file:
        written: Metadata = pickle.load(file)
    assert set(written.state_dict_metadata) == set(state)
