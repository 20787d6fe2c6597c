"""``ckptx from-script``: the arguments of other projects' scripts, on what their frameworks saved.

Expected tensors come from the frameworks: the model that was sharded, DeepSpeed's own gathering,
accelerate's and torch's own converters.
"""

from __future__ import annotations

import json
import shlex

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate.utils import merge_fsdp_weights
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp

from ckptx.scripts import named, scripts
from ckptx.scripts.script import SOURCE, TARGET

from .checkpoints import GOLDEN


def are_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def rounded(tensors, dtype=torch.bfloat16):
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@pytest.fixture
def trained(saved):
    """The model that was sharded, as safetensors' own library reads it."""
    return load_file(saved / "llama" / "model.safetensors")


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# verl


def test_model_merger_merges_in_bfloat16(shell, trained):
    local, target = "run/global_step_10/actor", shell.out / "model"
    arguments = ("--backend", "fsdp", "--local_dir", local)
    assert shell.script("model_merger", "merge", *arguments, "--target_dir", target) == 0
    first = shlex.split(shell.errors.splitlines()[0])
    expected = ["ckptx", "convert", local, str(target), "--from", "verl", "--to", "hf"]
    assert first == [*expected, "--dtype", "bfloat16"]
    are_equal(load_file(target / "model.safetensors"), rounded(trained))
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "bfloat16"
    # What was merged passes the test; a model that is another does not.
    test = ("legacy_model_merger.py", "test", *arguments, "--test_hf_dir")
    assert shell.script(*test, target) == 0
    assert shell.script(*test, "base") == 1
    # The command that was shown does the same.
    first[3] = str(shell.out / "again")
    assert shell.ckptx(*first[1:]) == 0
    again = (shell.out / "again" / "model.safetensors").read_bytes()
    assert again == (target / "model.safetensors").read_bytes()


def test_model_merger_has_all_flags(shell):
    arguments = ("--backend", "megatron", "--local_dir", "A", "--hf_model_path", "B")
    further = ("--tie-word-embedding", "--is-value-model", "--use_cpu_initialization")
    (line,) = shell.lines("verl.model_merger", "merge", *arguments, *further, "--trust-remote-code")
    assert line[:3] == ["convert", "A", "tmp"]
    assert line[-4:] == ["--hf-base", "B", "--tie-word-embedding", "--is-value-model"]
    assert "--use_cpu_initialization is not needed: no model is built" in shell.errors
    (line,) = shell.lines("model_merger", "test", *arguments, "--test_hf_dir", "C")
    assert line[:3] == ["verify", "A", "C"]
    assert line[-4:] == ["--rtol", "0.05", "--atol", "0.01"]
    upload = shell.refused("model_merger", "merge", *arguments, "--hf_upload_path", "me/model")
    assert upload.startswith("--hf_upload_path: nothing is uploaded")
    assert "merge" in shell.refused("model_merger", "mergo", *arguments)


def test_converter_hf_to_mcore_writes_the_directory_that_verl_reads(shell, trained):
    target = shell.out / "mcore"
    arguments = ("--hf_model_path", "llama", "--output_path", target)
    assert shell.script("converter_hf_to_mcore", *arguments, "--pp_size", "2", "--test") == 0
    assert "verify" in shell.errors
    assert "equal" in shell.output
    metadata = dcp.FileSystemReader(str(target)).read_metadata()
    shapes = {
        n: tuple(m.size) for n, m in metadata.state_dict_metadata.items() if hasattr(m, "size")
    }
    embedding = "embedding.word_embeddings.weight"
    assert shapes[embedding] == tuple(trained["model.embed_tokens.weight"].shape)  # not padded
    held = {embedding: torch.empty(shapes[embedding], dtype=torch.bfloat16)}
    dcp.load(held, checkpoint_id=str(target), no_dist=True)
    assert torch.equal(held[embedding], rounded(trained)["model.embed_tokens.weight"])
    # verl's skips what is there, and exits with 0.
    assert shell.script("converter_hf_to_mcore", *arguments) == 1
    assert "exists" in shell.errors


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(None, "bfloat16"), pytest.param("float32", "float32", marks=pytest.mark.full)],
)
def test_convert_checkpoint_simple(name, dtype, shell, trained, saved):
    words = ("--dtype", name, "--output", shell.out / "model") if name else ()
    target = shell.out / "model" if name else saved / "run" / "global_step_10_merged"
    assert shell.script("convert_checkpoint_simple", "run/global_step_10", *words) == 0
    found = load_file(target / "model.safetensors")
    are_equal(found, rounded(trained, getattr(torch, dtype)))
    state = torch.load(target / "extra_state_merged.pt", weights_only=False)
    original = saved / "run" / "global_step_10" / "actor" / "extra_state_world_size_2_rank_0.pt"
    expected = torch.load(original, weights_only=False)
    assert torch.equal(state["rng"]["cpu"], expected["rng"]["cpu"])
    assert (target / "lr_scheduler_state.json").is_file()


# DeepSpeed, LightRFT


def of_deepspeed():
    """The weights that DeepSpeed gathered, in float32; the model is tied and has both names."""
    found = rounded(load_file(GOLDEN / "zero3_bf16.safetensors"), torch.float32)
    return found | {"lm_head.weight": found["model.embed_tokens.weight"]}


@pytest.mark.parametrize("form", ["shards", "safetensors", "file"])
def test_zero_to_fp32(form, shell):
    target = shell.out / ("old.bin" if form == "file" else "fp32")
    words = {"shards": ("--max_shard_size", "1KB"), "safetensors": ("--safe_serialization",)}
    command = ("zero_to_fp32", "checkpoint-3", target, *words.get(form, ()))
    assert shell.script(*command, "-t", "global_step3", "-d") == 0
    names = sorted(path.name for path in shell.out.rglob("*.bin"))
    if form == "safetensors":
        found = load_file(target / "model.safetensors")
    elif form == "shards":
        index = json.loads((target / "pytorch_model.bin.index.json").read_text())
        assert names[0] == f"pytorch_model-00001-of-{len(names):05d}.bin"
        assert set(index["weight_map"].values()) == set(names)
        parts = [torch.load(target / name) for name in names]
        found = {name: tensor for part in parts for name, tensor in part.items()}
        homes = {name: file for file, part in zip(names, parts, strict=True) for name in part}
        assert index["weight_map"] == homes
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    else:
        found = torch.load(target)
    are_equal(found, of_deepspeed())


def test_zero_to_fp32_without_frozen_weights(shell, saved):
    target = shell.out / "trained"
    words = ("--exclude_frozen_parameters", "--tag", "global_step3")
    assert shell.script("zero_to_fp32", *words, "checkpoint-3", target) == 0
    states = "checkpoint-3/global_step3/zero_pp_rank_0_mp_rank_00_model_states.pt"
    shapes = torch.load(saved / states, weights_only=False)["param_shapes"]
    names = {name for group in shapes for name in group}
    expected = {name: tensor for name, tensor in of_deepspeed().items() if name in names}
    assert 0 < len(expected) < len(of_deepspeed())
    are_equal(torch.load(target / "pytorch_model.bin"), expected)
    assert "frozen, and only what was trained was" in shell.output


def test_ds2hf_takes_frozen_weights_from_the_base_only_if_told_to(shell):
    words = ("--checkpoint_dir", "checkpoint-3/global_step3", "--hf_base", "base", "--output_dir")
    assert shell.script("ds2hf", *words, shell.out / "all") == 0
    expected = rounded(of_deepspeed())  # the config of the base says bfloat16
    del expected["lm_head.weight"]  # written once, as transformers does
    are_equal(load_file(shell.out / "all" / "model.safetensors"), expected)
    assert shell.script("ds2hf", *words, shell.out / "part", "--exclude_frozen_parameters") == 0
    part = load_file(shell.out / "part" / "model.safetensors")
    changed = [name for name in expected if not torch.equal(part[name], expected[name])]
    assert changed
    assert all(not part[name].any() for name in changed)  # zeros are the base's
    assert f"'{changed[0]}' was filled from the base" in " ".join(shell.output.split())


def test_ds2hf_knows_all_models(shell):
    words = ("--checkpoint_dir", "A", "--output_dir", "B", "--hf_base", "base", "--model_type")
    (line,) = shell.lines("ds2hf", *words, "grm", "-t", "global_step2")
    assert line[:3] == ["convert", "A", "B"]
    assert line[line.index("--prefix") :][:2] == ["--prefix", "model."]
    assert line[line.index("--tag") :][:2] == ["--tag", "global_step2"]
    (line,) = shell.lines("ds2hf", *words, "srm_vl", "--pooling_method", "last")
    assert line[:3] == ["convert", "A", "B/pytorch_model.bin"]
    assert "--hf-base" not in line
    assert "--pooling_method is not needed" in shell.errors
    assert "names of LightRFT's module" in shell.errors
    assert "'vlm' is not one of" in shell.refused("ds2hf", *words, "vlm")
    missing = (*words[:4], "--hf_base", "nowhere")
    assert shell.refused("ds2hf", *missing).startswith("nowhere/config.json: no such file")


def test_fsdp2hf_and_back(shell, trained):
    target = shell.out / "model"
    words = ("--hf_base", "llama", "--checkpoint_dir", "fsdp", "--output_dir", target)
    assert shell.script("fsdp2hf", *words) == 0
    are_equal(load_file(target / "model.safetensors"), trained)
    assert shell.script("hf2fsdp", "--hf_checkpoint", target, "--output", shell.out / "fsdp") == 0
    found = {name: torch.empty_like(tensor) for name, tensor in trained.items()}
    dcp.load(found, checkpoint_id=str(shell.out / "fsdp"), no_dist=True)
    are_equal(found, trained)


def test_a_command_that_this_release_lacks_is_named(shell, monkeypatch):
    monkeypatch.setattr("ckptx.commands.equivalent.known", lambda name: name != "generate")
    reason = shell.refused("test_model", "--model_path", "llama", "--test_prompts", "Hello")
    assert reason == "test_model: this release of ckptx has no command 'generate'"


# RLinf


def test_convert_dcp_to_pt_and_pt_to_hf(shell, trained, saved):
    file = shell.out / "full_weights.pt"
    place = "global_step_20/actor/dcp_checkpoint"
    command = ("convert_dcp_to_pt.py", "--dcp_path", place, "--output_path")
    assert "its name does not say so" in shell.refused(*command, shell.out / "weights")
    assert shell.script(*command, file) == 0
    are_equal(torch.load(file), trained)
    target = shell.out / "model"
    settings = f"convertor: {{ckpt_path: {file}, save_path: nowhere}}\nmodel: {{model_path: llama}}"
    (shell.out / "c.yaml").write_text(settings)
    words = ("--config-path", shell.out, "--config-name", "c", f"convertor.save_path={target}")
    assert shell.script("convert_pt_to_hf", *words) == 0
    are_equal(load_file(target / "model.safetensors"), trained)


def test_mg2hf(shell, trained, monkeypatch):
    made = ("--to", "core", "--ckpt-format", "torch", "--tp", "2", "--pp", "2", "-q")
    assert shell.ckptx("convert", "llama", shell.out / "megatron", *made) == 0
    target = shell.out / "model"
    assert shell.script("mg2hf_7b.sh", shell.out / "megatron", target, "llama") == 0
    are_equal(load_file(target / "model.safetensors"), trained)
    monkeypatch.setenv("CKPT_PATH_MG", "A")
    monkeypatch.setenv("CKPT_PATH_HF", "B")
    monkeypatch.setenv("CKPT_PATH_ORIGINAL_HF", "C")
    assert shell.lines("mg2hf") == [["convert", "A", "B", "--to", "hf", "--hf-base", "C"]]


# accelerate, torch


@pytest.mark.parametrize("unsafe", [False, True])
def test_merge_weights_writes_what_accelerate_writes(unsafe, shell, saved):
    model = saved / "checkpoint-12" / "pytorch_model_fsdp_0"
    merge_fsdp_weights(str(model), str(shell.out / "theirs"), safe_serialization=not unsafe)
    words = ["--unsafe_serialization"] * unsafe
    assert shell.script("merge-weights", model, shell.out / "ours", *words) == 0
    (theirs,) = (shell.out / "theirs").iterdir()
    read = torch.load if unsafe else load_file
    are_equal(read(shell.out / "ours" / theirs.name), read(theirs))
    assert shell.script("merge-weights", model, shell.out / "x", "--remove_checkpoint_dir") == 1
    assert model.is_dir()


def test_torchs_own_format_utils(shell, trained):
    theirs, ours = shell.out / "theirs.pt", shell.out / "ours.pt"
    dcp_to_torch_save("fsdp", theirs)
    assert (
        shell.script("torch.distributed.checkpoint.format_utils", "dcp_to_torch", "fsdp", ours) == 0
    )
    are_equal(torch.load(ours), torch.load(theirs))
    assert shell.script("torch_save_to_dcp", theirs, shell.out / "ours") == 0
    torch_save_to_dcp(theirs, shell.out / "theirs")
    for place in ("ours", "theirs"):
        found = {name: torch.empty_like(tensor) for name, tensor in trained.items()}
        dcp.load(found, checkpoint_id=str(shell.out / place), no_dist=True)
        are_equal(found, trained)
    # torch's skips what is not there, and exits with 0.
    assert shell.script("dcp_to_torch_save", "nowhere", shell.out / "x.pt") == 1


# Megatron


def test_checkpoint_inspector(shell):
    name = "checkpoint_inspector"
    assert shell.ckptx("convert", "llama", shell.out / "core", "--to", "core", "-q") == 0
    assert shell.script(name, "inspect", shell.out / "core") == 0
    assert "linear_qkv" in shell.output
    key = "decoder.layers.self_attention.linear_qkv.weight"
    assert shell.script(name, "print-tensor", shell.out / "core", key) == 0
    assert shell.script(name, "compare-two-checkpoint", shell.out / "core", "llama") == 0
    assert shell.script(name, "compare-two-checkpoint", shell.out / "core", "base") == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            ("checkpoint_inspector", "convert-torch-dist-to-fsdp-dtensor", "A", "B", "--swiglu"),
            "fsdp_dtensor",
        ),
        (("checkpoint_inspector", "print-torch-dcp-in-json", "A"), "fsdp_dtensor"),
        (
            ("checkpoint_inspector", "modify-state-dict", "A", "B", "--op", "remove x"),
            "ckptx modify",
        ),
        (("tools/checkpoint/hybrid_conversion.py", "--load-dir", "A"), "Mamba"),
        (("convert_mg_to_middle_file", "--load-path", "A"), "mg2hf"),
    ],
)
def test_what_has_no_equivalent_says_why(words, reason, shell):
    assert reason in shell.refused(*words)


# All of them


def test_they_are_listed_and_explain_themselves(shell):
    assert shell.script("--list") == 0
    listed = shell.output
    for script in scripts():
        assert script.name in listed
        for part in script.parts or (script,):
            words = (script.name, part.name) if script.parts else (script.name,)
            assert shell.script(*words, "--help") == 0
            flags = [word for flag in part.flags for word in flag.spellings if word[0] == "-"]
            assert [word for word in flags if word not in shell.output] == []
    assert "--list' shows those that are" in shell.refused("nowhere.py")
    assert named("nowhere") is None


def test_the_tables_are_sound():
    names = [spelling for script in scripts() for spelling in script.spellings]
    assert len(set(names)) == len(names)
    for script in scripts():
        for part in script.parts or (script,):
            keys = [flag.key for flag in part.flags]
            assert len(set(keys)) == len(keys)
            places = [flag.becomes for flag in part.flags if flag.becomes in (SOURCE, TARGET)]
            assert part.refused or part.places or places[0] == SOURCE
            assert all(flag.help for flag in part.flags)


def test_options_of_ckptx_follow_after_two_dashes(shell, trained):
    words = ("fsdp2hf", "--hf_base", "llama", "--checkpoint_dir", "fsdp", "--output_dir")
    target = shell.out / "model"
    assert shell.script(*words, target, "--", "--dtype", "fp16", "--quiet") == 0
    assert shell.output == shell.errors == ""
    are_equal(load_file(target / "model.safetensors"), rounded(trained, torch.float16))
    assert shell.script(*words, target) == 1
    assert shell.script(*words, target, "--overwrite") == 0
    are_equal(load_file(target / "model.safetensors"), trained)
    assert shell.script(*words, target, "--no-such-flag") == 2
