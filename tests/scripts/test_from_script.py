"""``ckptx from-script``: the arguments of other projects' scripts, on what their frameworks saved.

Expected tensors come from the frameworks: the model that was sharded, DeepSpeed's own gathering,
accelerate's and torch's own converters.
"""

from __future__ import annotations

import json
import shlex
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate.utils import merge_fsdp_weights
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp
from transformers import PreTrainedTokenizerFast

from ckptx.cli.scripts import named, scripts
from ckptx.cli.scripts.script import SOURCE, TARGET
from tests.docs.test_docs import DOCS, blocks

from .checkpoints import GOLDEN


def are_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def rounded(tensors, dtype=torch.bfloat16):
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def of_dcp(place, like):
    """The tensors of a distributed checkpoint, as torch loads them."""
    found = {name: torch.empty_like(tensor) for name, tensor in like.items()}
    dcp.load(found, checkpoint_id=str(place), no_dist=True)
    return found


@pytest.fixture
def trained(saved):
    """The model that was sharded, as safetensors' own library reads it."""
    return load_file(saved / "llama" / "model.safetensors")


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# verl


def test_model_merger_merges_in_bfloat16(shell, documented, trained):
    target = documented / "merged"
    are_equal(load_file(target / "model.safetensors"), rounded(trained))
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "bfloat16"
    local = ("--backend", "fsdp", "--local_dir", "run/global_step_10/actor")
    line = ["convert", local[-1], str(target), "--from", "verl", "--to", "hf"]
    words = ("model_merger", "merge", *local, "--target_dir", target)
    assert shell.lines(*words) == [[*line, "--dtype", "bfloat16"]]
    # The document has tested it with success; a model that is another is found.
    assert shell.script("legacy_model_merger.py", "test", *local, "--test_hf_dir", "base") == 1
    assert shlex.split(shell.errors.splitlines()[0])[:2] == ["ckptx", "verify"]


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
    old = shell.lines("scripts/model_merger.py", *arguments[:4])  # before there were sub-commands
    assert old == shell.lines("model_merger", "merge", *arguments[:4])
    assert "model_merger test" in shell.refused("model_merger", *arguments, "--test")
    upload = shell.refused("model_merger", "merge", *arguments, "--hf_upload_path", "me/model")
    assert upload.startswith("--hf_upload_path: nothing is uploaded")
    assert "merge" in shell.refused("model_merger", "mergo", *arguments)


def test_converter_hf_to_mcore_writes_the_directory_that_verl_reads(shell, documented, trained):
    target = documented / "mcore"
    arguments = ("converter_hf_to_mcore", "--hf_model_path", "llama", "--output_path", target)
    lines = shell.lines(*arguments, "--pp_size", "2", "--ep_size", "1", "--test")
    assert [line[0] for line in lines] == ["convert", "verify"]
    assert lines[0][-4:] == ["--pp", "2", "--ep", "1"]
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
    assert shell.script(*arguments) == 1
    assert "exists" in shell.errors


def test_convert_checkpoint_simple(shell, documented, trained, saved):
    target = documented / "run" / "global_step_10_merged"
    are_equal(load_file(target / "model.safetensors"), rounded(trained))
    state = torch.load(target / "extra_state_merged.pt", weights_only=False)
    original = saved / "run" / "global_step_10" / "actor" / "extra_state_world_size_2_rank_0.pt"
    expected = torch.load(original, weights_only=False)
    assert torch.equal(state["rng"]["cpu"], expected["rng"]["cpu"])
    assert (target / "lr_scheduler_state.json").is_file()
    words = ("--actor-dir", "critic", "--dtype", "float32", "--output", "B")
    (line,) = shell.lines("convert_checkpoint_simple", "A", *words)
    assert line[:7] == ["convert", "A", "B", "--from", "verl", "--to", "hf"]
    assert line[7:] == ["--actor-dir", "critic", "--dtype", "float32"]  # no states, no option


# DeepSpeed, LightRFT


def of_deepspeed():
    """The weights that DeepSpeed gathered, in float32; the model is tied and has both names."""
    found = rounded(load_file(GOLDEN / "zero3_bf16.safetensors"), torch.float32)
    return found | {"lm_head.weight": found["model.embed_tokens.weight"]}


def test_zero_to_fp32(shell, documented):
    are_equal(torch.load(documented / "fp32" / "pytorch_model.bin"), of_deepspeed())
    are_equal(load_file(documented / "fp32-safe" / "model.safetensors"), of_deepspeed())
    (line,) = shell.lines("zero_to_fp32", "A", "B", "-t", "C", "-d", "--max_shard_size", "1GB")
    assert line[:5] == ["convert", "A", "B", "--from", "deepspeed"]
    assert line[5:8] == ["--tag", "C", "--verbose"]
    form = ["--to", "hf", "--no-config", "--weight-files", "bin"]
    assert line[8:] == [*form, "--max-shard-size", "1GB"]


@pytest.mark.parametrize("written", ["out/", "pytorch_model.bin"])
def test_zero_to_fp32_as_deepspeed_says_to_type_it(shell, saved, monkeypatch, written):
    place = shutil.copytree(saved / "checkpoint-3", shell.out / "checkpoint-3")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    monkeypatch.chdir(place)
    assert shell.script("python", "zero_to_fp32.py", ".", written) == 0, shell.errors
    found = place / "pytorch_model.bin"
    are_equal(torch.load(found if found.exists() else place / "out" / found.name), of_deepspeed())
    assert all(path.read_bytes() == content for path, content in before.items())
    # What lies there now is neither replaced nor in the way of another run.
    assert shell.script("zero_to_fp32.py", ".", written, "--overwrite") == 1
    assert "inside the source" in shell.errors
    assert shell.script("zero_to_fp32.py", ".", "again") == 0, shell.errors
    are_equal(torch.load(place / "again" / "pytorch_model.bin"), of_deepspeed())


@pytest.mark.parametrize(
    "typed",
    [
        "python3 -m verl.model_merger merge --backend fsdp --local_dir=A --target_dir B",
        "/usr/bin/python3.11 scripts/model_merger.py merge --back fsdp --local A --target B",
        "model_merger merge --backend=fsdp --local-dir A --target-dir=B",
    ],
)
def test_command_lines_are_taken_as_argparse_takes_them(shell, typed):
    (line,) = shell.lines(*typed.split())
    assert line[:3] == ["convert", "A", "B"]


def test_beginnings_that_fit_two_flags_are_refused(shell):
    arguments = ("model_merger", "merge", "--backend", "fsdp", "--local_dir", "A")
    assert "--t" in shell.refused(*arguments, "--t", "B")
    (line,) = shell.lines("accelerate", "merge-weights", "A", "B", "--unsafe-serialization")
    assert line[-2:] == ["--weight-files", "bin"]


def required_flags():
    """Every script's flags that it cannot do without, as argparse of the script says."""
    for script in scripts():
        for part in script.parts or (script,):
            words = (script.name, part.name) if script.parts else (script.name,)
            flags = [flag for flag in part.flags if flag.required and not flag.positional]
            yield from (
                pytest.param(words, flag, flags, id=f"{words} {flag.key}") for flag in flags
            )


@pytest.mark.parametrize(("words", "missing", "flags"), [*required_flags()])
def test_a_missing_flag_is_refused(shell, words, missing, flags):
    given = [
        word
        for flag in flags
        if flag is not missing
        for word in (
            flag.spellings[0],
            next(iter(flag.becomes)) if isinstance(flag.becomes, dict) else "A",
        )
    ]
    assert f"Missing option '{missing.spellings[0]}'" in shell.refused(*words, *given)


def test_zero_to_fp32_as_old_releases_wrote_it(shell):
    assert shell.script("zero_to_fp32", "checkpoint-3", shell.out / "old.bin") == 0
    are_equal(torch.load(shell.out / "old.bin"), of_deepspeed())


def test_zero_to_fp32_in_shards(shell):
    target = shell.out / "fp32"
    assert shell.script("zero_to_fp32", "checkpoint-3", target, "--max_shard_size", "1KB") == 0
    files = sorted(target.glob("*.bin"))
    assert len(files) > 2
    assert files[0].name == f"pytorch_model-00001-of-{len(files):05d}.bin"
    parts = {path.name: torch.load(path) for path in files}
    found = {name: tensor for part in parts.values() for name, tensor in part.items()}
    are_equal(found, of_deepspeed())
    index = json.loads((target / "pytorch_model.bin.index.json").read_text())
    assert index["weight_map"] == {name: file for file, part in parts.items() for name in part}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())


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


def test_ds2hf_takes_frozen_weights_from_the_base_only_if_told_to(documented):
    expected = rounded(of_deepspeed())  # the config of the base says bfloat16
    del expected["lm_head.weight"]  # written once, as transformers does
    are_equal(load_file(documented / "from-ds" / "model.safetensors"), expected)
    part = load_file(documented / "part" / "model.safetensors")
    changed = [name for name in expected if not torch.equal(part[name], expected[name])]
    assert 0 < len(changed) < len(expected)
    assert all(not part[name].any() for name in changed)  # zeros are the base's


def test_ds2hf_knows_all_models(shell):
    words = ("--checkpoint_dir", "A", "--output_dir", "B", "--hf_base", "base", "--model_type")
    (line,) = shell.lines("ds2hf", *words, "grm", "-t", "global_step2")
    assert line[:3] == ["convert", "A", "B"]
    assert line[line.index("--strip-prefix") :][:2] == ["--strip-prefix", "model."]
    assert line[line.index("--tag") :][:2] == ["--tag", "global_step2"]
    (line,) = shell.lines("ds2hf", *words, "srm_vl", "--pooling_method", "last")
    assert line[:3] == ["convert", "A", "B/pytorch_model.bin"]
    assert "--hf-base" not in line
    assert "--pooling_method is not needed" in shell.errors
    assert "names of LightRFT's module" in shell.errors
    assert "'vlm' is not one of" in shell.refused("ds2hf", *words, "vlm")
    missing = (*words[:4], "--hf_base", "nowhere")
    assert shell.refused("ds2hf", *missing).startswith("nowhere/config.json: no such file")


def test_fsdp2hf_and_back(documented, trained):
    are_equal(load_file(documented / "from-fsdp" / "model.safetensors"), trained)
    are_equal(of_dcp(documented / "to-fsdp", trained), trained)


@pytest.mark.full
def test_the_model_is_tried(shell, saved, monkeypatch):
    # importing transformers takes seconds: not for every day
    model = shutil.copytree(saved / "llama", shell.out / "llama")
    words = Tokenizer(WordLevel({"Hello": 1, "?": 0}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(model)
    monkeypatch.chdir(shell.out)
    (block,) = blocks(DOCS["docs/coming-from.md"], "sh")
    assert shell.ckptx(*shlex.split(block)[1:]) == 0
    (said,) = json.loads((shell.out / "test_results.json").read_text())["generations"]
    assert said["prompt"] == "Hello"
    assert len(said["tokens"]) == 32


def test_lists_of_values_follow_one_flag(shell):
    words = ("--test_prompts", "Hello", "you", "--max_new_tokens", "8", "--benchmark")
    (line,) = shell.lines("test_model", "--model_path", "A", *words, "--device", "cpu")
    assert line[:2] == ["generate", "A"]
    assert line[6:] == [
        *("--device", "cpu", "--prompt", "Hello", "--prompt", "you", "--max-new-tokens", "8"),
        *("--benchmark", "--output-file", "test_results.json"),
    ]


def test_a_command_that_this_release_lacks_is_named(shell, monkeypatch):
    monkeypatch.setattr("ckptx.cli.equivalent.known", lambda name: name != "generate")
    reason = shell.refused("test_model", "--model_path", "llama", "--test_prompts", "Hello")
    assert reason == "test_model: this release of ckptx has no command 'generate'"


# RLinf


def test_rlinfs_converters(shell, documented, trained):
    are_equal(torch.load(documented / "full.pt"), trained)
    are_equal(load_file(documented / "from-pt" / "model.safetensors"), trained)
    words = ("convert_dcp_to_pt.py", "--dcp_path", "A", "--output_path", "weights")
    assert "its name does not say so" in shell.refused(*words)
    words = ("--config-path", "conf", "--config-name", "c", "convertor.torch_dtype=bf16")
    expected = ["from-config", "conf/c.yaml", "convertor.torch_dtype=bf16"]
    assert shell.lines("convert_pt_to_hf", *words) == [expected]


def test_mg2hf(shell, documented, trained, monkeypatch):
    are_equal(load_file(documented / "from-megatron" / "model.safetensors"), trained)
    monkeypatch.setenv("CKPT_PATH_MG", "A")
    monkeypatch.setenv("CKPT_PATH_HF", "B")
    monkeypatch.setenv("CKPT_PATH_ORIGINAL_HF", "C")
    assert shell.lines("mg2hf_7b.sh") == [["convert", "A", "B", "--to", "hf", "--hf-base", "C"]]


# accelerate, torch


def test_merge_weights_writes_what_accelerate_writes(shell, documented, saved):
    model = saved / "checkpoint-12" / "pytorch_model_fsdp_0"
    merge_fsdp_weights(str(model), str(shell.out), safe_serialization=True)
    (theirs,) = shell.out.iterdir()
    are_equal(load_file(documented / "merged-12" / theirs.name), load_file(theirs))
    (line,) = shell.lines("merge-weights", "A", "B", "--unsafe_serialization")
    assert line[-2:] == ["--weight-files", "bin"]
    assert shell.script("merge-weights", model, "x", "--remove_checkpoint_dir") == 1
    assert model.is_dir()


def test_torchs_own_format_utils(shell, documented, trained):
    theirs = shell.out / "theirs.pt"
    dcp_to_torch_save("fsdp", theirs)
    are_equal(torch.load(documented / "whole.pt"), torch.load(theirs))
    torch_save_to_dcp(theirs, shell.out / "theirs")
    for place in (documented / "again", shell.out / "theirs"):
        are_equal(of_dcp(place, trained), trained)
    # torch's skips what is not there, and exits with 0.
    assert shell.script("dcp_to_torch_save", "nowhere", shell.out / "x.pt") == 1


# Megatron


def test_checkpoint_inspector(shell, documented):
    name, core = "checkpoint_inspector", documented / "megatron-core"
    assert shell.script(name, "inspect", core) == 0
    assert "linear_qkv" in shell.output
    key = "decoder.layers.self_attention.linear_qkv.weight"
    assert shell.script(name, "print-tensor", core, key) == 0
    assert shell.script(name, "compare-two-checkpoint", core, "base") == 1


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
