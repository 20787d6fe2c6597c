"""Bad input, as a user meets it: one line says what and what to do, and nothing else happens."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ckptx.cli import main as cli
from ckptx.registry import registry

from .conftest import ROOT

SECOND = "model-00002-of-00003.safetensors"


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_header(path: Path, change) -> None:
    """Change the header of a safetensors file; the data stay where they are in the data section."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


class TestHuggingFaceFiles:
    @pytest.fixture(autouse=True)
    def source(self, user, write_llama):
        self.directory = write_llama(user.source, shards=3)
        self.index = self.directory / "model.safetensors.index.json"

    def test_missing_shard(self, user):
        (self.directory / SECOND).unlink()
        reason = user.cannot_convert()
        assert f"1 of 3 shards are missing: '{SECOND}'; copy them" in reason
        assert str(self.directory) in reason

    def test_index_names_absent_files(self, user):
        edit_json(
            self.index, lambda index: index["weight_map"].update({"model.norm.weight": "gone.bin"})
        )
        assert "1 of 4 shards are missing: 'gone.bin'" in user.cannot_convert()

    def test_index_reaches_out_of_the_directory(self, user):
        edit_json(self.index, lambda index: index["weight_map"].update({"x": "../secret"}))
        assert "'../secret' is not the name of a file beside it" in user.cannot_convert()

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": 3}'])
    def test_index_is_none(self, content, user):
        self.index.write_text(content)
        assert f"{self.index}: not a weight index" in user.cannot_convert()

    def test_index_without_a_tensor(self, user):
        edit_json(self.index, lambda index: index["weight_map"].pop("model.norm.weight"))
        assert "does not list 'model.norm.weight', which the shards hold" in user.cannot_convert()

    def test_index_with_a_tensor_too_many(self, user):
        edit_json(self.index, lambda index: index["weight_map"].update({"ghost": SECOND}))
        reason = user.cannot_convert()
        assert f"says 'ghost' is in {SECOND}, found in no file" in reason

    def test_shards_without_index(self, user):
        self.index.unlink()
        next(user.source.glob("model-00002-of-*")).unlink()
        reason = user.is_refused(
            "convert", user.source, user.target, "--from", "hf", "--to", "core"
        )
        assert "without an index (model-00001-of-00003.safetensors), and of 3 number 2" in reason

    def test_tensor_twice(self, user):
        edit_tensors(
            self.directory / SECOND,
            lambda tensors: tensors.update({"model.embed_tokens.weight": np.ones(3)}),
        )
        reason = user.cannot_convert()
        assert f"{SECOND}: 'model.embed_tokens.weight' is also in model-00001-of-00003" in reason

    def test_shard_twice_under_two_names(self, user):
        third = self.directory / "model-00003-of-00003.safetensors"
        shutil.copyfile(self.directory / SECOND, third)
        assert f"is also in {SECOND}; remove" in user.cannot_convert()

    @pytest.mark.parametrize("left", [0, 5, 8, 100, -1, -4000])
    def test_truncated_shard(self, left, user):
        path = self.directory / SECOND
        os.truncate(path, left if left >= 0 else path.stat().st_size + left)
        reason = user.cannot_convert()
        assert str(path) in reason
        assert str(path.stat().st_size) in reason or "header" in reason or "truncated" in reason

    def test_longer_shard(self, user):
        path = self.directory / SECOND
        path.write_bytes(path.read_bytes() + b"x")
        assert SECOND in user.cannot_convert()

    def test_overlapping_extents(self, user):
        def change(header):
            entries = [name for name in header if name != "__metadata__"]
            one, other = (header[name] for name in entries[:2])
            other.update(one)

        edit_header(self.directory / SECOND, change)
        assert SECOND in user.cannot_convert()

    def test_extent_beyond_the_file(self, user):
        def change(header):
            name = next(name for name in header if name != "__metadata__")
            start, stop = header[name]["data_offsets"]
            header[name]["data_offsets"] = [start + (1 << 40), stop + (1 << 40)]

        edit_header(self.directory / SECOND, change)
        assert SECOND in user.cannot_convert()

    def test_extent_that_its_shape_does_not_fill(self, user):
        def change(header):
            name = next(name for name in header if name.endswith("up_proj.weight"))
            header[name]["shape"][0] += 1

        edit_header(self.directory / SECOND, change)
        reason = user.cannot_convert()
        assert SECOND in reason
        assert "up_proj.weight" in reason

    def test_unknown_dtype(self, user):
        def change(header):
            header[next(name for name in header if name != "__metadata__")]["dtype"] = "F3"

        edit_header(self.directory / SECOND, change)
        assert "'F3'" in user.cannot_convert()

    @pytest.mark.parametrize("content", ["{", "[]", "\0"])
    def test_config_is_none(self, content, user):
        (self.directory / "config.json").write_text(content)
        assert f"{self.directory}/config.json: " in user.cannot_convert()


class TestHuggingFaceModels:
    @pytest.fixture(autouse=True)
    def source(self, user, write_llama):
        self.config = write_llama(user.source) / "config.json"
        self.weights = user.source / "model.safetensors"

    def says(self, **changes):
        edit_json(self.config, lambda config: config.update(changes))

    @pytest.mark.parametrize("saver", ["core", "hf"])
    @pytest.mark.parametrize(
        ("changes", "tensor", "found", "expected"),
        [
            ({"intermediate_size": 32}, "mlp l0 weight W", "[24, 16]", "[32, 16]"),
            ({"num_key_value_heads": 4}, "k_proj", "the key has 8 rows", "16"),
            ({"hidden_size": 32}, "word embeddings", "[37, 16]", "[vocab, 32]"),
            ({"head_dim": 8}, "q_proj", "16 rows", "32"),
        ],
    )
    def test_config_contradicts_the_shapes(self, changes, tensor, found, expected, saver, user):
        self.says(**changes)
        reason = user.cannot_convert(saver)
        for part in (tensor, found, expected):
            assert part in reason

    def test_config_with_a_larger_vocabulary(self, user):
        self.says(vocab_size=64)
        reason = user.cannot_convert()
        assert "37 rows" in reason
        assert "64" in reason

    def test_config_with_more_layers(self, user):
        self.says(num_hidden_layers=6)
        reason = user.cannot_convert()
        assert "18 tensors are missing: 'model.layers.4.self_attn.q_proj.weight'" in reason
        assert reason.count("'model.layers.") == 10
        assert "and 8 more" in reason

    def test_config_with_fewer_layers(self, user):
        self.says(num_hidden_layers=2)
        reason = user.cannot_convert()
        assert "18 tensors are not part of it: 'model.layers.2." in reason
        assert "and 8 more" in reason

    def test_missing_and_unmapped_tensors_are_named_together(self, user):
        def change(tensors):
            tensors["model.layers.1.self_attn.qqq_proj.weight"] = tensors.pop(
                "model.layers.1.self_attn.q_proj.weight"
            )
            tensors["adapter"] = np.ones(3, np.float32)

        edit_tensors(self.weights, change)
        reason = user.cannot_convert("hf")
        assert "1 tensor is missing: 'model.layers.1.self_attn.q_proj.weight'" in reason
        # Not k_proj and v_proj, which are only waiting for it.
        unknown = "'adapter', 'model.layers.1.self_attn.qqq_proj.weight'"
        assert f"2 tensors are not part of it: {unknown}" in reason

    def test_unknown_architecture(self, user):
        self.says(architectures=["MambaForCausalLM"], model_type="mamba")
        reason = user.cannot_convert()
        assert "MambaForCausalLM" in reason
        assert "--hf-base" in reason
        assert "--to hf" in reason

    @pytest.mark.parametrize("saver", ["hf", "pytorch"])
    def test_unknown_architecture_passes_through_where_names_stay(self, saver, user):
        self.says(architectures=["MambaForCausalLM"], model_type="mamba")
        edit_tensors(self.weights, lambda tensors: tensors.update(adapter=np.ones((2, 3))))
        assert user.run("convert", user.source, user.target, "--to", saver) == 0
        assert user.run("verify", user.source, _weights(user.target)) == 0

    def test_other_activation(self, user):
        self.says(hidden_act="gelu")
        assert "hidden_act is 'gelu'" in user.cannot_convert()

    def test_biases_that_megatron_has_no_switch_for(self, user):
        self.says(mlp_bias=True)
        edit_tensors(
            self.weights,
            lambda tensors: tensors.update(
                {
                    f"model.layers.{layer}.mlp.{name}_proj.bias": np.ones(rows, np.float32)
                    for layer in range(4)
                    for name, rows in (("gate", 24), ("up", 24), ("down", 16))
                }
            ),
        )
        assert "mlp_bias=true only: Megatron has biases on all" in user.cannot_convert()

    def test_true_vocabulary_beyond_the_weights(self, user):
        reason = user.cannot_convert("core", "--true-vocab-size", 50)
        assert "37" in reason
        assert "50" in reason

    def test_pickle_that_calls_something(self, user):
        import torch

        self.weights.unlink()
        torch.save({"lm_head.weight": Bomb(user.place)}, user.source / "pytorch_model.bin")
        reason = user.cannot_convert("hf")
        assert "pytorch_model.bin" in reason
        assert "system" in reason


def _weights(target: Path) -> Path:
    return target / "model.pt" if (target / "model.pt").exists() else target


class Bomb:
    """Creates a file when it is unpickled without care."""

    def __init__(self, place: Path) -> None:
        self.sentinel = place / "executed"

    def __reduce__(self):
        return os.system, (f"touch {self.sentinel}",)


class TestSizesThatDoNotFit:
    def refuse(self, user, write_llama, *options, **changes):
        write_llama(user.source, **changes)
        return user.cannot_convert("core", *options)

    @pytest.mark.parametrize("form", ["torch_dist", "torch"])
    @pytest.mark.parametrize(
        ("tp", "changes", "says"),
        [
            (3, {}, "3 does not divide num_attention_heads 4"),
            (4, {"intermediate_size": 26}, "4 does not divide ffn_hidden_size 26"),
            (
                2,
                {"num_attention_heads": 12, "num_key_value_heads": 3},
                "2 neither divides 3 query groups nor is a multiple of them",
            ),
        ],
    )
    def test_tensor_parallel_size(self, tp, changes, says, form, user, write_llama):
        options = ("--tp", tp, "--ckpt-format", form)
        assert says in self.refuse(user, write_llama, *options, **changes)

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (["--pp", "3"], "4 layers do not fit pipeline size 3"),
            (["--pp", "2", "--vpp", "3"], "4 layers do not fit pipeline size 2, virtual size 3"),
            (["--pp", "2", "--decoder-first-pipeline-num-layers", "4"], "first stage 4"),
            (
                [
                    *("--pp", "3", "--decoder-first-pipeline-num-layers", "1"),
                    *("--decoder-last-pipeline-num-layers", "4"),
                ],
                "4 layers do not fit pipeline size 3, first stage 1, last stage 4",
            ),
            (
                ["--pp", "2", "--pipeline-model-parallel-layout", "Ett|tL"],
                "pipeline layout 'Ett|tL' places 3 of 4 layers",
            ),
            (
                ["--pp", "2", "--pipeline-model-parallel-layout", "Ett|tt|L"],
                "has 3 stages",
            ),
            (["--ep", "2"], "has no experts"),
        ],
    )
    def test_pipeline(self, options, says, user, write_llama):
        assert says in self.refuse(user, write_llama, *options)

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (["--tp", "0"], "--tp"),
            (["--iteration", "soon"], "'soon' is no iteration"),
            (["--dtype", "int3"], "'int3'"),
            (["--max-memory", "much"], "'much'"),
        ],
    )
    def test_values(self, options, says, user, write_llama):
        assert says in self.refuse(user, write_llama, *options)

    def test_shard_size(self, user, write_llama):
        write_llama(user.source)
        assert "'huge' is not a size" in user.cannot_convert("hf", "--max-shard-size", "huge")


class TestMegatronCheckpoints:
    def test_missing_rank(self, core, user):
        shutil.rmtree(core("torch") / "mp_rank_01_001")
        reason = user.cannot_convert("hf")
        assert "1 of 4 rank directories are missing: 'mp_rank_01_001'; copy them" in reason

    def test_missing_first_rank(self, core, user):
        shutil.rmtree(core("torch") / "mp_rank_00_000")
        assert "'mp_rank_00_000'" in user.cannot_convert("hf")

    def test_rank_without_file(self, core, user):
        (core("torch") / "mp_rank_01_000" / "model_optim_rng.pt").unlink()
        reason = user.cannot_convert("hf")
        assert "mp_rank_01_000: holds no model_optim_rng.pt" in reason

    def test_rank_too_many(self, core, user):
        iteration = core("torch")
        shutil.copytree(iteration / "mp_rank_01_001", iteration / "mp_rank_02_001")
        assert "'mp_rank_02_001' do not belong to the 4 ranks" in user.cannot_convert("hf")

    @pytest.mark.parametrize("change", ["iteration", "hidden_size"])
    def test_ranks_of_two_runs(self, change, core, user):
        import torch

        file = core("torch") / "mp_rank_01_001" / "model_optim_rng.pt"
        state = torch.load(file, weights_only=False)
        if change == "iteration":
            state["iteration"] = 8
        else:
            state["args"].hidden_size = 32
        torch.save(state, file)
        reason = user.cannot_convert("hf")
        assert str(file) in reason
        assert "the rank files are of different runs" in reason

    def test_rank_of_other_shapes(self, core, user):
        import torch

        file = core("torch") / "mp_rank_01_001" / "model_optim_rng.pt"
        state = torch.load(file, weights_only=False)
        name = "decoder.layers.0.mlp.linear_fc2.weight"
        state["model"][name] = torch.ones(16, 11)
        torch.save(state, file)
        reason = user.cannot_convert("hf")
        assert "mp_rank_00_001: decoder.layers.0.mlp.linear_fc2.weight" in reason
        assert "[16, 12]" in reason
        assert "[16, 11]" in reason

    def test_replicas_that_differ(self, core, user):
        import torch

        file = core("torch") / "mp_rank_01_001" / "model_optim_rng.pt"
        state = torch.load(file, weights_only=False)
        state["model"]["decoder.final_layernorm.weight"] += 1
        torch.save(state, file)
        assert "differ" in user.cannot_convert("hf", "--check-replicas", "all")

    def test_tracker_points_nowhere(self, core, user):
        core("torch_dist").rename(user.source / "iter_0000009")
        reason = user.cannot_convert("hf")
        assert "latest_checkpointed_iteration.txt: points to iter_0000007, which is not" in reason
        assert "correct the tracker" in reason

    def test_tracker_says_nothing(self, core, user):
        core("torch_dist")
        (user.source / "latest_checkpointed_iteration.txt").write_text("tomorrow\n")
        assert "'tomorrow' is no iteration" in user.cannot_convert("hf")

    @pytest.mark.parametrize("name", ["common.pt", ".metadata", "__2_0.distcp"])
    def test_missing_file(self, name, core, user):
        (core("torch_dist") / name).unlink()
        assert name in user.cannot_convert("hf")

    @pytest.mark.parametrize("name", ["common.pt", ".metadata", "__2_0.distcp", "metadata.json"])
    def test_truncated_file(self, name, core, user):
        path = core("torch_dist") / name
        os.truncate(path, path.stat().st_size // 2)
        assert name in user.cannot_convert("hf")

    def test_truncated_rank_file(self, core, user):
        path = core("torch") / "mp_rank_01_000" / "model_optim_rng.pt"
        os.truncate(path, path.stat().st_size - 100)
        assert str(path) in user.cannot_convert("hf")

    @pytest.mark.parametrize("change", ["hole", "overlap", "beyond"])
    def test_chunks_that_do_not_tile(self, change, core, user):
        path = core("torch_dist") / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        chunks = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks
        if change == "hole":
            chunks.pop()
        elif change == "overlap":
            chunks[1].offsets = chunks[0].offsets
        else:
            chunks[1].sizes = type(chunks[1].sizes)([1, 16, 999])
        path.write_bytes(pickle.dumps(metadata))
        reason = user.cannot_convert("hf")
        assert "decoder.layers.mlp.linear_fc2.weight" in reason

    def test_file_of_another_backend(self, core, user):
        edit_json(core("torch_dist") / "metadata.json", lambda m: m.update(sharded_backend="zarr"))
        assert "sharded_backend is 'zarr'" in user.cannot_convert("hf")

    def test_interrupted_saving(self, core, user):
        (core("torch_dist") / "metadata.json").unlink()
        assert "fsdp_dtensor" in user.cannot_convert("hf")

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"num_experts": 8}, "router.weight"),
            ({"multi_latent_attention": True}, "multi_latent_attention is set"),
            ({"num_layers": 5}, "4 layers"),
            ({"num_layers": None}, "num_layers"),
            ({"ffn_hidden_size": 48}, "mlp"),
            ({"untie_embeddings_and_output_weights": False}, "output_layer.weight"),
        ],
    )
    def test_args_that_contradict_the_weights_or_come_too_early(self, change, says, core, user):
        import torch

        iteration = core("torch_dist")
        shutil.rmtree(iteration / "huggingface")
        state = torch.load(iteration / "common.pt", weights_only=False)
        vars(state["args"]).update(change)
        torch.save(state, iteration / "common.pt")
        assert says in user.cannot_convert("hf")

    def test_args_are_absent(self, core, user):
        import torch

        iteration = core("torch_dist")
        shutil.rmtree(iteration / "huggingface")
        torch.save({}, iteration / "common.pt")
        assert "--hf-base" in user.cannot_convert("hf")

    def test_args_are_no_namespace(self, core, user):
        import torch

        path = core("torch_dist") / "common.pt"
        torch.save({"args": 3}, path)
        assert f"{path}: args are of type int, expected a namespace" in user.cannot_convert("hf")

    def test_base_model_of_another_family(self, core, user, write_llama):
        core("torch_dist")
        base = user.place / "base"
        write_llama(base, architectures=["Qwen3ForCausalLM"], model_type="qwen3")
        reason = user.cannot_convert("hf", "--hf-base", base)
        assert "qwen3" in reason.lower()

    def test_base_model_without_config(self, core, user):
        core("torch_dist")
        (user.place / "base").mkdir()
        assert "holds no config.json" in user.cannot_convert("hf", "--hf-base", user.place / "base")

    @pytest.mark.parametrize(
        ("form", "name"),
        [
            ("torch_dist", "common.pt"),
            ("torch_dist", ".metadata"),
            ("torch", "mp_rank_01_001/model_optim_rng.pt"),
        ],
    )
    @pytest.mark.parametrize("command", ["convert", "plan", "inspect", "verify"])
    def test_pickle_that_calls_something(self, command, form, name, core, user):
        import torch

        path = core(form) / name
        if name == ".metadata":
            path.write_bytes(pickle.dumps(Bomb(user.place)))
        else:
            torch.save({"args": Bomb(user.place)}, path)
        arguments = {
            "convert": [user.target, "--to", "hf"],
            "plan": [user.target, "--to", "hf"],
            "inspect": [],
            "verify": [user.source],
        }[command]
        reason = user.is_refused(command, user.source, *arguments)
        assert str(path) in reason
        assert "system" in reason
        assert not (user.place / "executed").exists()

    def test_legacy_model(self, core, user):
        import torch

        file = core("torch") / "mp_rank_00_000" / "model_optim_rng.pt"
        state = torch.load(file, weights_only=False)
        state["model"] = {"language_model": {"embedding": {}}}
        torch.save(state, file)
        reason = user.cannot_convert("hf", "--from", "core")
        assert f"{file}: 'model' is of a legacy Megatron model" in reason
        assert "use --loader legacy (--from legacy)" in reason
        reason = user.cannot_convert("hf")
        assert "mp_rank_01_000" in reason
        assert "is of a model of Megatron Core" in reason
        assert "of different runs" in reason


class TestPlaces:
    @pytest.fixture(autouse=True)
    def source(self, user, write_llama):
        write_llama(user.source)

    def test_target_exists(self, user):
        user.target.mkdir()
        (user.target / "mine").write_text("keep")
        reason = user.cannot_convert("hf")
        assert f"{user.target}: exists" in reason
        assert "--overwrite" in reason

    def test_iteration_exists(self, user):
        (user.target / "release").mkdir(parents=True)
        (user.target / "release" / "mine").write_text("keep")
        assert f"{user.target}/release: exists" in user.cannot_convert("core")

    def test_target_is_a_file(self, user):
        user.target.write_text("keep")
        assert str(user.target) in user.cannot_convert("core", "--overwrite")

    @pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
    def test_target_is_the_source(self, overwrite, user):
        user.target = user.source
        reason = user.cannot_convert("hf", *overwrite)
        assert f"{user.source}: is the source itself" in reason

    @pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
    def test_part_of_the_source_is_not_replaced(self, overwrite, user):
        user.target = user.source / "mine"
        user.target.mkdir()
        (user.target / "file").write_text("keep")
        reason = user.cannot_convert("hf", *overwrite)
        assert f"lies inside the source {user.source}" in reason

    def test_part_of_the_source_is_not_replaced_by_a_link(self, user):
        (user.source / "mine").mkdir()
        (user.source / "mine" / "file").write_text("keep")
        (user.place / "link").symlink_to(user.source)
        user.target = user.place / "link" / "mine"
        assert "lies inside the source" in user.cannot_convert("hf", "--overwrite")

    @pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
    def test_source_in_the_target(self, overwrite, user):
        user.target = user.place
        assert "contains the source" in user.cannot_convert("hf", *overwrite)

    def test_target_below_a_file(self, user):
        (user.place / "file").write_text("keep")
        user.target = user.place / "file" / "target"
        assert str(user.place / "file") in user.cannot_convert("hf")

    def test_source_holds_checkpoints(self, user):
        for step in (2, 10):
            shutil.copytree(user.source, user.place / "run" / f"checkpoint-{step}")
        (user.place / "run" / "runs").mkdir()
        user.source = user.place / "run"
        reason = user.cannot_convert("hf")
        found = [user.source / name for name in ("checkpoint-2", "checkpoint-10")]
        assert f"give {found[0]}, {found[1]}" in reason

    def test_source_is_absent(self, user):
        user.source = user.place / "nothing"
        reason = user.cannot_convert("core")
        assert f"{user.source}" in reason
        assert "no such" in reason.lower() or "does not exist" in reason

    def test_source_is_empty(self, user):
        user.source = user.place / "empty"
        user.source.mkdir()
        reason = user.cannot_convert("core")
        expected = f"{user.source}: not a checkpoint that any loader recognises: the directory is"
        assert f"{expected} empty" in reason

    def test_source_is_of_no_format(self, user):
        user.source = user.place / "notes.txt"
        user.source.write_text("no weights here")
        reason = user.cannot_convert("core")
        assert (
            f"{user.source}: not a checkpoint that any loader recognises; known loaders" in reason
        )
        assert "core" in reason

    def test_source_is_above_a_checkpoint(self, user):
        """As the Hub's cache is, or a directory of runs."""
        snapshot = user.place / "models--a--b" / "snapshots" / "0123"
        snapshot.parent.mkdir(parents=True)
        user.source.rename(snapshot)
        user.source = user.place / "models--a--b"
        assert f"a checkpoint lies below it: give {snapshot}" in user.cannot_convert("core")

    def test_source_without_weights(self, user):
        for path in user.source.glob("*.safetensors"):
            path.unlink()
        assert "config.json is there, but no weights" in user.cannot_convert("core")

    def test_source_is_where_a_conversion_was_interrupted(self, user):
        user.source = user.place / "megatron"
        (user.source / "release.ckptx-partial").mkdir(parents=True)
        assert user.run("inspect", user.source) == 1
        assert "a conversion into it was interrupted; run the same command again" in user.errors

    @pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
    def test_weights_are_a_pointer_of_git_lfs(self, suffix, user):
        """As a clone of a model from the Hub has without git-lfs."""
        for path in user.source.glob("*.safetensors"):
            path.unlink()
        name = {".safetensors": "model.safetensors", ".bin": "pytorch_model.bin"}[suffix]
        (user.source / name).write_text(
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4976698672\n"
        )
        reason = user.cannot_convert("core")
        assert f"{name}: is a pointer of Git LFS" in reason
        assert "git lfs pull" in reason

    @pytest.mark.parametrize("which", ["source", "target"])
    def test_path_is_empty(self, which, user, monkeypatch):
        """An unset variable must not mean the working directory."""
        (user.place / "here").mkdir()
        monkeypatch.chdir(user.place / "here")
        places = {"source": user.source, "target": user.target, which: ""}
        code = user.run("convert", places["source"], places["target"], "--to", "core")
        assert code == 2
        assert "empty; is a variable of the shell not set?" in user.errors
        assert not any((user.place / "here").iterdir())

    def test_target_lies_below_a_file(self, user):
        (user.place / "file").write_text("keep")
        user.target = user.place / "file" / "sub"
        assert f"{user.place / 'file'}: is a file; the target would" in user.cannot_convert("hf")

    @pytest.mark.parametrize("loader", ["hf", "core", "pytorch"])
    def test_source_is_empty_and_its_format_named(self, loader, user):
        user.source = user.place / "empty"
        user.source.mkdir()
        assert str(user.source) in user.cannot_convert("hf", "--from", loader)

    @pytest.mark.parametrize("loader", [[], ["--from", "hf"], ["--from", "core"]])
    def test_source_is_a_file(self, loader, user):
        user.source = user.place / "notes.txt"
        user.source.write_text("no weights here")
        assert str(user.source) in user.cannot_convert("core", *loader)

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "."])
    def test_source_cannot_be_read(self, name, user):
        path = user.source / name
        mode = path.stat().st_mode
        path.chmod(0)
        arguments = ("convert", user.source, user.target, "--from", "hf", "--to", "hf")
        code = user.run_apart(*arguments, preexec_fn=respect_permissions)
        path.chmod(mode)
        assert code in (1, 2)  # 2 where the command line itself names what cannot be read
        (line,) = user.errors.splitlines()
        assert line.startswith("error: ")
        assert str(path.resolve()) in line
        assert "ermission denied" in line or "is not readable" in line
        assert list(user.place.iterdir()) == [user.source]

    def test_target_cannot_be_written(self, user):
        user.place.chmod(0o555)
        arguments = ("convert", user.source, user.target, "--to", "hf")
        code = user.run_apart(*arguments, preexec_fn=respect_permissions)
        user.place.chmod(0o755)
        assert code == 1
        (line,) = user.errors.splitlines()
        assert line.startswith(f"error: {user.place}: ")
        assert "writ" in line
        assert list(user.place.iterdir()) == [user.source]

    def test_files_may_not_grow(self, user):
        """As on a disk that fills up while it is written; the free space looked enough."""

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

        reason = user.is_refused(
            "convert",
            user.source,
            user.target,
            "--to",
            "hf",
            run=user.run_apart,
            preexec_fn=limit,
        )
        assert "model.safetensors" in reason
        assert "File too large" in reason

    @pytest.mark.parametrize("saver", ["hf", "core"])
    def test_disk_is_too_small(self, saver, user):
        disk = user.place / "disk"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=32k", "ckptx-test", str(disk)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root may mount a small disk")
        try:
            user.target = disk / "target"
            reason = user.cannot_convert(saver)
            assert "less than is needed" in reason
            assert "free space or choose another target" in reason
            assert list(disk.iterdir()) == []
        finally:
            subprocess.run(["umount", str(disk)], check=True)


def respect_permissions() -> None:
    """Take from root, for the program started next, the right to read and write everything."""
    if os.geteuid() == 0:
        drop, override, read_search = 24, 1, 2  # linux include/uapi/linux/{prctl,capability}.h
        for capability in (override, read_search):
            ctypes.CDLL(None).prctl(drop, capability)


SILENT = """
from ckptx.protocol.hookspecs import hookimpl
"""


def distribution(site: Path, name: str, points: dict[str, str], code: str) -> None:
    """Install a distribution: entry points, and one module."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = "".join(f"{point} = {module}\n" for point, module in points.items())
    (info / "entry_points.txt").write_text(f"[ckptx]\n{lines}")
    (site / f"{next(iter(points.values()))}.py").write_text(code)


class TestPlugins:
    @pytest.fixture(autouse=True)
    def source(self, user, write_llama):
        write_llama(user.source)
        self.site = user.place / "site"
        self.environment = {"PYTHONPATH": f"{self.site}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}

    def refuse(self, user, *options):
        return user.is_refused(
            "convert",
            user.source,
            user.target,
            *options,
            run=user.run_apart,
            env=self.environment,
        )

    @pytest.mark.parametrize(("role", "flag"), [("loader", "--from"), ("saver", "--to")])
    def test_unknown_plugin(self, role, flag, user):
        options = [flag, "quux"] if role == "saver" else [flag, "quux", "--to", "hf"]
        reason = user.is_refused("convert", user.source, user.target, *options)
        known = ", ".join(registry.names(role))
        assert "core" in known
        assert f"unknown {role} 'quux'; known {role}s: {known}" in reason

    @pytest.mark.parametrize("name", ["gguf", "nemo"])
    def test_format_that_is_recognised_and_not_there_yet(self, name, user):
        reason = user.cannot_convert(name)
        assert f"saver '{name}': ckptx knows of this format" in reason
        assert "known savers: core" in reason

    def test_option_of_a_plugin_that_is_not_chosen(self, user):
        reason = user.cannot_convert("core", "--max-shard-size", "1GB")
        assert "--max-shard-size belongs to saver 'hf' and saver 'hf_llava', which is" in reason

    def test_option_of_none(self, user):
        assert "--quux" in user.cannot_convert("core", "--quux")

    def test_saver_is_not_named(self, user):
        assert "--to" in user.is_refused("convert", user.source, user.target)

    def test_two_plugins_of_one_name(self, user):
        for name in ("alpha", "beta"):
            distribution(self.site, name, {"saver_same": f"{name}_plugin"}, SILENT)
        reason = self.refuse(user, "--to", "same")
        assert "saver_same is declared by several distributions: alpha and beta" in reason
        assert "uninstall all but one" in reason

    def test_rival_of_a_built_in(self, user):
        distribution(self.site, "rival", {"saver_hf": "rival_plugin"}, SILENT)
        reason = self.refuse(user, "--to", "hf")
        assert "saver_hf is declared by several distributions: ckptx and rival" in reason

    def test_plugin_that_fails_to_import(self, user):
        points = {"loader_broken": "broken_plugin", "saver_broken": "broken_plugin"}
        distribution(self.site, "broken", points, "import a_module_that_is_not_there\n")
        reason = self.refuse(user, "--to", "broken")
        assert "saver_broken of broken 1.0 cannot be used: ModuleNotFoundError" in reason
        assert "a_module_that_is_not_there" in reason
        # Others work, detection included.
        done = user.run_apart(
            "convert", user.source, user.target, "--to", "hf", "--quiet", env=self.environment
        )
        assert done == 0, user.errors
        assert (user.target / "model.safetensors").is_file()
        assert user.run_apart("plugins", "--json", env=self.environment) == 0
        assert "ModuleNotFoundError" in user.output

    def test_plugin_that_registers_nothing(self, user):
        distribution(self.site, "empty", {"saver_empty": "empty_plugin"}, SILENT)
        assert "registers nothing, expected 'empty'" in self.refuse(user, "--to", "empty")

    def test_megatrons_own_spelling(self, user):
        reason = user.is_refused(
            *("--model-type", "GPT", "--loader", "hf", "--saver", "core"),
            *("--load-dir", user.source, "--save-dir", user.target),
            *("--target-tensor-parallel-size", "3"),
            entry=cli.convert,
        )
        assert "3 does not divide num_attention_heads 4" in reason

    def test_megatrons_own_script(self, user):
        def script(*arguments):
            done = subprocess.run(
                [sys.executable, ROOT / "convert.py", *map(str, arguments)],
                capture_output=True,
                text=True,
            )
            user.output, user.errors = done.stdout, done.stderr
            return done.returncode

        (user.source / "model.safetensors").write_bytes(b"")
        reason = user.is_refused(
            *("--model-type", "GPT", "--loader", "hf", "--saver", "core"),
            *("--load-dir", user.source, "--save-dir", user.target),
            run=script,
        )
        assert "model.safetensors" in reason


@pytest.mark.parametrize("command", ["inspect", "plan", "verify"])
def test_other_commands_say_the_same(command, user, write_llama):
    write_llama(user.source, shards=3)
    (user.source / SECOND).unlink()
    arguments = {
        "inspect": [],
        "plan": [user.target, "--to", "core"],
        "verify": [user.source],
    }[command]
    assert f"'{SECOND}'; copy them" in user.is_refused(command, user.source, *arguments)


def test_pickle_in_a_single_file(user):
    import torch

    user.source = user.place / "model.pt"
    torch.save({"weight": Bomb(user.place)}, user.source)
    for saver in ("hf", "pytorch"):
        reason = user.cannot_convert(saver)
        assert str(user.source) in reason
        assert "system" in reason
    assert not (user.place / "executed").exists()


def test_file_of_no_tensors(user):
    import torch

    user.source = user.place / "model.pt"
    torch.save({"epoch": 3}, user.source)
    assert "holds no state dict of tensors ('epoch' found)" in user.cannot_convert("pytorch")
