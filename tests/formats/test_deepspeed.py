"""DeepSpeed checkpoints: those that DeepSpeed wrote, and the kit with ones made by hand."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ckptx.errors import FormatError, PluginError, SchemaError
from ckptx.protocol.context import Context
from ckptx.registry import registry
from ckptx.registry.open import checkpoint_messages
from ckptx.testing import faults
from ckptx.testing.contracts import Checkpoint, LoaderTests, assert_one_line
from ckptx.testing.conversion import (
    checked,
    convert,
    end_of,
    loaded_by_name,
    plan_of_messages,
    save,
    values,
)
from ckptx.testing.models import MODELS, write_config

from . import zero_by_hand
from .by_hand import torch_of

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "deepspeed"
ALL = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))
PIPELINES = [case for case in ALL if "pipeline" in case]
CASES = [case for case in ALL if case not in PIPELINES]
WITH_MODULE = [case for case in CASES if not any(GOLDEN.glob(f"{case}/*/zero_pp_*model_states.pt"))]
TIED_CASES = ("zero2_bf16_groups", "zero3_bf16", "universal2", "tp2_zero1")
LOADER = registry.loader("deepspeed")
HF_SAVER = registry.saver("hf")
BY_NAME = {model.name: model for model in MODELS}
LLAMA, TIED = BY_NAME["llama"], BY_NAME["qwen2-tied"]
EXCLUDED = ("zero2_excluded", "zero3_excluded")
FILLED = ("model.embed_tokens.weight", "*.up_proj.weight", "model.norm.weight")


def gathered(case):
    """What the ranks gathered from the live engine."""
    return load_file(GOLDEN / f"{case}.safetensors")


def assert_state(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        own = torch_of(found[name])
        assert own.dtype == tensor.dtype, name
        assert own.shape == tensor.shape, name
        assert torch.equal(own, tensor), name


def assert_state_of_torch(found, expected):
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def wide(tensor):
    return tensor.float() if tensor.is_floating_point() else tensor


def with_alias(state, case):
    """Tied weights are in DeepSpeed's module under both names."""
    if case not in TIED_CASES:
        return state
    return state | {"lm_head.weight": state["model.embed_tokens.weight"]}


def computed_in(case):
    dtypes = {"fp16": torch.float16, "fp32": torch.float32, "zero2_excluded": torch.float32}
    return next((dtype for word, dtype in dtypes.items() if word in case), torch.bfloat16)


def model_of(directory, **changes):
    """Write the config of the golden models."""
    config = json.loads((GOLDEN / "model" / "config.json").read_text())
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config | changes))
    return directory


def copied(case, directory):
    return Path(shutil.copytree(GOLDEN / case, directory / case))


def refusal(source, **options):
    with pytest.raises(FormatError) as caught:
        list(checkpoint_messages(source, LOADER, options=options))
    assert_one_line(caught.value)
    return str(caught.value)


class TestMasters:
    """The fp32 weights are those that DeepSpeed itself gathers."""

    @pytest.mark.parametrize("case", [case for case in CASES if case not in EXCLUDED])
    def test_are_what_deepspeed_gathers(self, case):
        expected = {name: wide(tensor) for name, tensor in gathered(case).items()}
        assert_state(loaded_by_name(LOADER, GOLDEN / case), with_alias(expected, case))

    @pytest.mark.parametrize("case", CASES)
    def test_nothing_is_lost_in_silence(self, case):
        for choice in ("master", "module") if case in WITH_MODULE else ("master",):
            sent = list(LOADER.load(GOLDEN / case, {"weights": choice}))
            assert checked(plan_of_messages(sent), sent).sources

    @pytest.mark.parametrize("case", WITH_MODULE)
    def test_the_module_is_what_is_computed_with(self, case):
        found = values(LOADER.load(GOLDEN / case, {"weights": "module"}))["passthrough"]
        expected = with_alias(gathered(case), case)
        if case in EXCLUDED:
            expected = {name: expected[name] for name in found}
            assert len(found) == len(gathered(case)) - len(FILLED)
        assert_state(found, {n: t.to(computed_in(case)) for n, t in expected.items()})

    def test_what_is_left_behind_is_named(self):
        sent = list(LOADER.load(GOLDEN / "zero2_bf16_groups", {}))
        left = {drop.name: drop.nbytes for drop in end_of(sent).dropped}
        size = sum(tensor.numel() for tensor in gathered("zero2_bf16_groups").values())
        assert left["module"] == 2 * size
        assert left["exp_avg"] == left["exp_avg_sq"] >= 4 * size
        assert {"loss_scaler", "global_steps", "skipped_steps"} <= set(left)

    def test_frozen_weights_are_widened_and_named(self):
        notes = end_of(LOADER.load(GOLDEN / "zero1_bf16_frozen", {})).notes
        note = "3 frozen weights have no fp32 master; they are widened to float32"
        assert note in notes
        source = GOLDEN / "zero1_bf16_frozen"
        sent = list(LOADER.load(source, {}, Context(dtype="bfloat16")))
        assert note not in end_of(sent).notes
        assert_state(values(sent)["passthrough"], gathered("zero1_bf16_frozen"))

    @pytest.mark.parametrize("case", ["zero2_bf16_groups", "zero3_bf16", "universal3"])
    def test_transformers_loads_the_result(self, case, tmp_path):
        base = model_of(tmp_path / "base", tie_word_embeddings=case in TIED_CASES)
        options = {"hf_base": base}
        convert(LOADER, GOLDEN / case, HF_SAVER, tmp_path / "hf", {}, options)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
        expected = with_alias(gathered(case), case)
        assert_state_of_torch(model.state_dict(), {n: t.float() for n, t in expected.items()})

    def test_masters_without_names_are_known_by_their_values(self, tmp_path):
        """Without ZeRO, in groups of an order of their own, some weights frozen."""
        root = copied("zero0_bf16", tmp_path)
        path = root / "global_step3" / "mp_rank_00_model_states.pt"
        value = torch.load(path, weights_only=True)
        ((first, *masters),) = value["optimizer"]["fp32_groups"]
        assert first.shape == (23, 8)
        value["optimizer"]["fp32_groups"] = [masters[::-2], masters[-2::-2]]
        torch.save(value, path)
        expected = gathered("zero0_bf16")
        frozen = "model.embed_tokens.weight"
        expected[frozen] = expected[frozen].bfloat16().float()
        assert_state(loaded_by_name(LOADER, root), expected)

    @pytest.mark.parametrize("case", EXCLUDED)
    def test_excluded_weights_come_from_the_base(self, case, tmp_path):
        base = model_of(tmp_path / "base")
        expected = {name: tensor.float() for name, tensor in gathered(case).items()}
        save_file({n: t.bfloat16() for n, t in expected.items()}, base / "model.safetensors")
        options = {"hf_base": base}
        with pytest.raises(SchemaError, match=r"model\.embed_tokens\.weight"):
            list(checkpoint_messages(GOLDEN / case, LOADER, options=options))
        options["fill_from_base"] = FILLED
        sent = list(checkpoint_messages(GOLDEN / case, LOADER, options=options))
        notes = end_of(sent).notes
        assert len([note for note in notes if "was filled from the base model" in note]) == 3
        assert "'model.norm.weight' was filled from the base model, model.safetensors" in notes
        save(HF_SAVER, sent, tmp_path / "hf", {})
        found = load_file(tmp_path / "hf" / "model.safetensors")
        filled = {"model.embed_tokens.weight", "model.norm.weight"}
        filled |= {name for name in expected if "up_proj" in name}
        for name, tensor in expected.items():
            want = tensor.bfloat16().float() if name in filled else tensor
            assert torch.equal(found[name], want), name


class TestTensorParallel:
    """AutoTP: rows, columns and copies, each where the model states say."""

    def edited(self, tmp_path, change, case="tp2_zero1"):
        """A copy whose model states of every rank have been changed."""
        root = copied(case, tmp_path)
        for path in sorted(root.glob("*/mp_rank_*")):
            value = torch.load(path, weights_only=True)
            change(value)
            torch.save(value, path)
        return root

    def test_patterns_tell_where_there_is_no_map(self, tmp_path):
        def change(value):
            del value["universal_checkpoint_info"]["affine_map"]

        root = self.edited(tmp_path, change)
        expected = with_alias(gathered("tp2_zero1"), "tp2_zero1")
        assert_state(loaded_by_name(LOADER, root), expected)

    def test_shapes_tell_where_nothing_is_said(self, tmp_path):
        def change(value):
            del value["universal_checkpoint_info"]

        root = self.edited(tmp_path, change)
        assert "do not say how it was split; give --hf-base" in refusal(root)
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
        base = model_of(tmp_path / "base", **heads)
        convert(LOADER, root, HF_SAVER, tmp_path / "hf", {}, {"hf_base": base})
        found = load_file(tmp_path / "hf" / "model.safetensors")
        assert_state_of_torch(found, gathered("tp2_zero1"))

    def test_several_parts_in_one(self, tmp_path):
        """A fused weight whose first rows are split, and whose last rows both ranks have."""
        whole = torch.arange(30.0).reshape(10, 3)
        cut = [torch.cat([whole[0:4], whole[8:]]), torch.cat([whole[4:8], whole[8:]])]

        def piece(rows, source, dest, locations):
            ends = {"source": [source * 3, [3, 1]], "dest": [dest * 3, [3, 1]]}
            return {"shape": [rows, 3], "locations": locations, **ends}

        shards = [
            {"shard_shape": [6, 3], "pieces": [piece(4, 4 * r, 0, [r]), piece(2, 8, 4, [0, 1])]}
            for r in range(2)
        ]
        ranks = dict(enumerate(shards))
        affine = {"version": 1, "params": {r"^a$": {"logical_shape": [10, 3], "ranks": ranks}}}
        for rank, tensor in enumerate(cut):
            zero_by_hand.write(tmp_path / "zero", {"a": tensor}, 2, 2, rank=rank, affine=affine)
        assert_state(loaded_by_name(LOADER, tmp_path / "zero"), {"a": whole})
        shards[0]["pieces"].pop()
        for path in (tmp_path / "zero").rglob("*"):
            if path.is_file():
                path.unlink()
        for rank, tensor in enumerate(cut):
            zero_by_hand.write(tmp_path / "zero", {"a": tensor}, 2, 2, rank=rank, affine=affine)
        reason = refusal(tmp_path / "zero")
        assert "'a': shards of [6, 3], [6, 3] do not make one tensor: tiles hold 12" in reason

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda rank: rank.update(shard_shape=[1, 1]), "the map says [1, 1] for rank 0"),
            (lambda rank: rank["pieces"][0].update(scale=0.5), "rank 0 holds it times 0.5"),
            (lambda rank: rank["pieces"][0].update(dest=[0, [1, 12]]), "are not those of a box"),
            (lambda rank: rank["pieces"][0].update(source=[8, [8, 1]]), "overlap"),
        ],
    )
    def test_a_map_that_does_not_fit(self, change, reason, tmp_path):
        def edit(value):
            affine = value["universal_checkpoint_info"]["affine_map"]["params"]
            change(affine[r"^model\.embed_tokens\.weight$"]["ranks"][0])

        found = refusal(self.edited(tmp_path, edit))
        assert "'model.embed_tokens.weight': shards of [12, 8], [11, 8]" in found
        assert reason in found

    def test_a_missing_rank(self, tmp_path):
        root = copied("tp2_zero1", tmp_path)
        tag = root / "global_step3"
        faults.drop(tag / "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt")
        reason = refusal(root)
        assert "optimizer states of 1 of 4 ranks are missing: mp_rank_01 of rank 1" in reason
        for path in tag.glob("*mp_rank_01*"):
            path.unlink()
        assert "split over 2 tensor or pipeline parallel ranks, found files of 1" in refusal(root)

    def test_ranks_of_two_steps(self, tmp_path):
        root = copied("tp2_zero1", tmp_path)
        path = root / "global_step3" / "mp_rank_01_model_states.pt"
        torch.save(torch.load(path, weights_only=True) | {"global_steps": 4}, path)
        assert "'global_steps' of mp_rank_01 is not that of mp_rank_00" in refusal(root)


class TestPipeline:
    """PipelineModule: layers without names of a model."""

    def base(self, case, directory):
        tied = case == "pipeline_tied"
        return model_of(directory, num_hidden_layers=2, tie_word_embeddings=tied)

    @pytest.mark.parametrize("case", PIPELINES)
    @pytest.mark.parametrize("choice", ["master", "module"])
    def test_is_what_deepspeed_gathers(self, case, choice, tmp_path):
        options = {"hf_base": self.base(case, tmp_path / "base"), "weights": choice}
        convert(LOADER, GOLDEN / case, HF_SAVER, tmp_path / "hf", {}, options)
        found = load_file(tmp_path / "hf" / "model.safetensors")
        dtype = torch.float32 if choice == "master" else torch.bfloat16
        expected = {name: tensor.to(dtype) for name, tensor in gathered(case).items()}
        assert_state_of_torch(found, expected)
        assert all(tensor.dtype == dtype for tensor in found.values())
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf")

    def layer_map(self, file, **changes):
        said = {"0": "embed.", "1-2": "h.{i}.", "3": {"weight": "norm"}, "4": "out."} | changes
        file.write_text(json.dumps(said))
        return file

    def test_a_layer_map_names_the_layers(self, tmp_path):
        file = self.layer_map(tmp_path / "map.json")
        sent = list(LOADER.load(GOLDEN / "pipeline_zero1", {"layer_map": file}))
        found = values(sent)["passthrough"]
        expected = {
            name.replace("model.layers.", "h.")
            .replace("model.embed_tokens", "embed")
            .replace("model.norm.weight", "norm")
            .replace("lm_head", "out"): tensor
            for name, tensor in gathered("pipeline_zero1").items()
        }
        assert_state(found, expected)
        assert any(
            "named by the layer map: 0.weight is embed.weight" in n for n in end_of(sent).notes
        )

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"4": {"bias": "b"}}, "layer 4 has 'weight', and no name for it"),
            ({"4": "embed."}, "'4.weight' and another tensor are both 'embed.weight'"),
            ({"4-4": "x."}, "layer 4 is there twice"),
            ({"x": "x."}, "no layer map: invalid literal"),
        ],
    )
    def test_a_bad_layer_map(self, changes, reason, tmp_path):
        file = self.layer_map(tmp_path / "map.json", **changes)
        assert reason in refusal(GOLDEN / "pipeline_zero1", layer_map=file)

    def test_a_layer_map_that_leaves_layers_out(self, tmp_path):
        (tmp_path / "map.json").write_text('{"0": "x."}')
        reason = refusal(GOLDEN / "pipeline_zero1", layer_map=tmp_path / "map.json")
        assert "no name for '1.self_attn.q_proj.weight'" in reason

    def test_what_to_give_is_said(self, tmp_path):
        reason = refusal(GOLDEN / "pipeline_zero1")
        assert "the model is not known; give --hf-base" in reason
        assert "--layer-map" in reason
        base = model_of(tmp_path / "base", num_hidden_layers=3)
        reason = refusal(GOLDEN / "pipeline_zero1", hf_base=base)
        assert "no name is known for" in reason
        file = self.layer_map(tmp_path / "map.json")
        reason = refusal(GOLDEN / "zero2_bf16_groups", layer_map=file)
        assert "--layer-map is for a PipelineModule, this is none" in reason

    def test_a_missing_layer(self, tmp_path):
        root = copied("pipeline_zero1", tmp_path)
        faults.drop(root / "global_step3" / "layer_01-model_states.pt")
        file = self.layer_map(tmp_path / "map.json")
        reason = refusal(root, layer_map=file)
        assert "there is no file of its layer, layer_01-model_states.pt; copy it" in reason

    def test_layers_of_tensor_parallel_ranks(self, tmp_path):
        root = copied("pipeline_zero1", tmp_path)
        for rank in range(2):
            shutil.copy(
                root / "global_step3" / "layer_01-model_states.pt",
                root / "global_step3" / f"layer_01-model_{rank:02d}-model_states.pt",
            )
        assert "of tensor-parallel rank 1 of a PipelineModule" in refusal(root)


class TestExperts:
    """DeepSpeed's own mixtures."""

    def test_a_missing_expert(self, tmp_path):
        root = copied("experts_zero2", tmp_path)
        faults.drop(root / "global_step3" / "layer_1_expert_2_mp_rank_00_model_states.pt")
        reason = refusal(root)
        assert "the files of 1 of 8 experts are missing: 'layer_1_expert_2'; copy them" in reason

    def test_experts_of_another_place(self, tmp_path):
        """Two experts are of one shape: that they are exchanged, the masters show."""
        root = copied("experts_zero2", tmp_path)
        state = {}
        for number in (1, 2):
            path = root / "global_step3" / f"layer_0_expert_{number}_mp_rank_00_model_states.pt"
            state[number] = torch.load(path, weights_only=True)
        path = root / "global_step3" / "layer_0_expert_1_mp_rank_00_model_states.pt"
        names = zip(state[1], state[2].values(), strict=True)
        torch.save(dict(names), path)
        assert "rounded to bfloat16, is not the weight in the module" in refusal(root)


class _Zero(LoaderTests):
    loader = LOADER
    stage = 2

    def write(self, directory, model):
        shared = {"lm_head.weight": "model.embed_tokens.weight"} if model.spec.tied else {}
        state = {name: torch_of(array) for name, array in model.hf().items()}
        write_config(directory, model)
        zero_by_hand.write(directory, state, self.stage, 3, groups=2, shared=shared)
        return Checkpoint(directory, model.canonical(padded=False))


class TestKit2(_Zero):
    models = (LLAMA, TIED)


class TestKit3(_Zero):
    models = (LLAMA, TIED)
    stage = 3


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("world", [1, 2, 11, 64])
@pytest.mark.parametrize("alignment", [1, 32])
def test_any_number_of_ranks(stage, world, alignment, tmp_path):
    """Ranks go by number, not by name; gaps and padding are skipped."""
    shapes = {
        "a.weight": (7, 5),
        "b.bias": (3,),
        "c.weight": (13, 4, 3),
        "d.weight": (1, 1),
        "e": (),
    }
    start, state = 0, {}
    for name, shape in shapes.items():
        numel = int(np.prod(shape))
        state[name] = torch.arange(start, start + numel, dtype=torch.float32).reshape(shape) / 7
        start += numel
    options = {"groups": 2, "alignment": alignment}
    zero_by_hand.write(tmp_path / "zero", state, stage, world, **options)
    sent = list(LOADER.load(tmp_path / "zero", {}))
    assert_state(values(sent)["passthrough"], state)
    assert checked(plan_of_messages(sent), sent).sources


class TestDirectory:
    def test_tags(self, tmp_path):
        root = copied("zero2_bf16_groups", tmp_path)
        shutil.copytree(root / "global_step3", root / "best")
        for source, options in (
            (root, {}),
            (root, {"tag": "best"}),
            (root / "best", {}),
            (root / "best", {"tag": "best"}),
        ):
            assert LOADER.detect(source)
            begin = next(iter(LOADER.load(source, options)))
            named = "best" if "best" in (source.name, options.get("tag")) else "global_step3"
            assert Path(begin.root).name == named
        assert "itself, and --tag says 'global_step3'" in refusal(root / "best", tag="global_step3")
        assert "--tag says 'last', found 'best', 'global_step3'" in refusal(root, tag="last")
        (root / "latest").write_text("global_step9\n")
        assert "latest says 'global_step9', found 'best'" in refusal(root)
        (root / "latest").unlink()
        assert "holds 'best', 'global_step3' and no file 'latest'" in refusal(root)
        faults.drop(root / "best")
        assert list(LOADER.load(root, {}))

    @pytest.mark.parametrize("case", CASES)
    def test_it_is_no_other_format(self, case):
        root = GOLDEN / case
        (tag,) = (path for path in root.iterdir() if path.is_dir())
        assert registry.detect(root) == registry.detect(tag) == "deepspeed"

    def test_zero_is_another_name(self):
        known = registry.loader("deepspeed")
        assert registry.loader("zero") is registry.loader("universal") is known
        with pytest.raises(PluginError, match="saver 'deepspeed'"):
            registry.saver("deepspeed")

    def test_no_checkpoint(self, tmp_path):
        assert not LOADER.detect(tmp_path)
        assert r"no *_model_states.pt" in refusal(tmp_path)

    def test_the_config_may_lie_beside(self, tmp_path):
        root = copied("zero3_bf16", tmp_path)
        model_of(root / "huggingface", tie_word_embeddings=True)
        begin = next(iter(LOADER.load(root, {})))
        assert begin.parts["language"].family == "llama"


class TestNames:
    @pytest.mark.parametrize(
        ("before", "options"),
        [
            ("model.", {"prefix": ("model.",)}),
            ("module.", {}),
            ("_orig_mod.", {}),
        ],
    )
    def test_modules_around_the_model(self, before, options, tmp_path):
        state = gathered("zero0_fp32")
        wrapped = {before + name: tensor for name, tensor in state.items()}
        zero_by_hand.write(tmp_path / "zero", wrapped, 3, 2)
        base = model_of(tmp_path / "base")
        sent = list(LOADER.load(tmp_path / "zero", options, Context(hf_base=base)))
        save(HF_SAVER, sent, tmp_path / "hf", {})
        assert_state_of_torch(load_file(tmp_path / "hf" / "model.safetensors"), state)
        said = any("names of wrappers were taken out" in note for note in sent[-1].notes)
        assert said == (not options)

    def test_a_prefix_that_is_not_there(self):
        reason = refusal(GOLDEN / "zero2_bf16_groups", prefix=("actor.",))
        assert "no name starts with --strip-prefix 'actor.'; names are as 'model.embed" in reason

    def test_a_prefix_that_makes_two_of_one_name(self, tmp_path):
        state = {"a.b": torch.ones(3, 2), "b": torch.zeros(3, 2)}
        zero_by_hand.write(tmp_path / "zero", state, 2, 1)
        assert "is the name of another tensor" in refusal(tmp_path / "zero", prefix=("a.",))


class TestBadInput:
    @pytest.mark.parametrize("case", ["zero2_bf16_groups", "zero3_bf16"])
    @pytest.mark.parametrize("rank", [0, 1, 2])
    def test_a_missing_rank(self, case, rank, tmp_path):
        root = copied(case, tmp_path)
        file = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        faults.drop(root / "global_step3" / file)
        reason = refusal(root)
        assert f"rank {rank}; copy" in reason or "split over 3 ranks, found files of 2" in reason

    def test_missing_model_states_of_a_rank(self, tmp_path):
        root = copied("zero3_bf16", tmp_path)
        faults.drop(root / "global_step3" / "zero_pp_rank_1_mp_rank_00_model_states.pt")
        assert "model states of 1 of 3 ranks are missing: rank 1; copy them" in refusal(root)

    @pytest.mark.parametrize(
        ("spoil", "options", "reason"),
        [
            (lambda tag: shutil.rmtree(tag), [], "no checkpoint of DeepSpeed"),
            (lambda tag: (tag.parent / "latest").write_text("best"), [], "latest says 'best'"),
            (lambda tag: None, ["-t", "step1"], "--tag says 'step1', found 'global_step3'"),
            (lambda tag: [p.unlink() for p in tag.glob("*optim*")], [], "no *_optim_states.pt"),
            (lambda tag: faults.truncate(next(tag.glob("*rank_1*"))), [], "rank_1"),
            (lambda tag: faults.drop(next(tag.glob("*rank_1*"))), [], "are missing: rank 1"),
        ],
    )
    def test_the_command_says_one_line_and_writes_nothing(self, spoil, options, reason, tmp_path):
        root = copied("zero2_bf16_groups", tmp_path)
        spoil(root / "global_step3")
        target = tmp_path / "out" / "hf"
        command = ["-m", "ckptx", "convert", root, target, "--to", "hf", "--loader", "deepspeed"]
        done = subprocess.run(
            [sys.executable, *map(str, command), *options], capture_output=True, text=True
        )
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        assert reason in line
        assert not list(tmp_path.glob("out/*"))

    def test_a_rank_too_many(self, tmp_path):
        root = copied("zero2_bf16_groups", tmp_path)
        file = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
        shutil.copy(root / "global_step3" / file.format(2), root / "global_step3" / file.format(3))
        assert "split over 3 ranks, found files of 4" in refusal(root)

    @pytest.mark.parametrize("case", ["zero2_bf16_groups", "zero3_bf16"])
    def test_no_optimizer_files(self, case, tmp_path):
        root = copied(case, tmp_path)
        for path in root.glob("*/*_optim_states.pt"):
            path.unlink()
        reason = refusal(root)
        assert "holds no *_optim_states.pt" in reason
        assert ("--weights module" in reason) == ("zero2" in case)

    def test_zero_3_has_no_module(self):
        assert "ZeRO 3 leaves no weights" in refusal(GOLDEN / "zero3_bf16", weights="module")

    @pytest.mark.parametrize("case", ["zero2_bf16_groups", "zero3_bf16", "zero0_bf16"])
    def test_cut_files(self, case, tmp_path):
        for number, path in enumerate(sorted((GOLDEN / case).rglob("*.pt"))):
            (tmp_path / str(number)).mkdir()
            root = copied(case, tmp_path / str(number))
            faults.truncate(root / path.relative_to(GOLDEN / case))
            assert path.name in refusal(root)

    def test_masters_of_another_save(self, tmp_path):
        """The flat piece of one rank lies in the place of another's."""
        root = copied("zero2_fp16_round_robin", tmp_path)
        first, second = sorted(root.glob("*/*_optim_states.pt"))
        shutil.copy(second, tmp_path / "kept")
        shutil.move(first, second)
        shutil.move(tmp_path / "kept", first)
        reason = refusal(root)
        assert "'model.embed_tokens.weight': the fp32 master in the optimizer's files" in reason
        assert "rounded to float16, is not the weight in the module" in reason
        assert "--weights module" in reason
        assert list(LOADER.load(root, {"weights": "module"}))

    @pytest.mark.parametrize("rank", range(5))
    def test_a_foreign_piece_inside_of_one_tensor(self, rank, tmp_path):
        """A rank may have no end of a tensor."""
        state = {"a.weight": torch.randn(300, 1000), "b.weight": torch.randn(10, 10)}
        for name, factor in (("one", 1.0), ("two", 2.0)):
            scaled = {key: tensor * factor for key, tensor in state.items()}
            zero_by_hand.write(tmp_path / name, scaled, 2, 5)
        file = Path("global_step7", f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        assert list(LOADER.load(tmp_path / "one", {}))
        shutil.copy(tmp_path / "two" / file, tmp_path / "one" / file)
        assert "'a.weight': the fp32 master" in refusal(tmp_path / "one")

    @pytest.mark.parametrize("stage", [2, 3])
    def test_optimizers_of_another_step(self, stage, tmp_path):
        state = {"a.weight": torch.ones(6, 4)}
        for name, step in (("one", 7.0), ("two", 8.0)):
            zero_by_hand.write(tmp_path / name, state, stage, 2, step=step)
        file = Path("global_step7", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt")
        shutil.copy(tmp_path / "two" / file, tmp_path / "one" / file)
        reason = refusal(tmp_path / "one")
        assert "optimizers of ranks 0 and 1 have not made as many steps" in reason

    @pytest.mark.parametrize("stage", [2, 3])
    def test_optimizers_of_another_model(self, stage, tmp_path):
        for name, rows in (("one", 40), ("two", 50)):
            state = {"a.weight": torch.ones(rows, 4), "b.weight": torch.ones(3, 3)}
            zero_by_hand.write(tmp_path / name, state, stage, 2)
        for path in tmp_path.glob("two/*/*optim_states.pt"):
            shutil.copy(path, tmp_path / "one" / "global_step7")
        assert "are not of one checkpoint" in refusal(tmp_path / "one")
        for path in tmp_path.glob("two/*/*model_states.pt"):
            shutil.copy(path, tmp_path / "one" / "global_step7")
        zero_by_hand.write(tmp_path / "three", {"a.weight": torch.ones(40, 4)}, stage, 2)
        for path in tmp_path.glob("three/*/*optim_states.pt"):
            shutil.copy(path, tmp_path / "one" / "global_step7")
        assert "are not of one checkpoint" in refusal(tmp_path / "one")

    def test_two_checkpoints_in_one_directory(self, tmp_path):
        root = copied("zero2_bf16_groups", tmp_path)
        tag = root / "global_step3"
        rank = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
        faults.duplicate(tag / f"bf16_{rank}", rank)
        assert "is of the same rank; they are of two checkpoints" in refusal(root)
        faults.drop(tag / rank)
        for path in GOLDEN.glob("zero3_bf16/*/*model_states.pt"):
            shutil.copy(path, tag)
        assert "found both; they are of two checkpoints" in refusal(root)

    def test_parameters_missing_from_a_universal_checkpoint(self, tmp_path):
        root = copied("universal3", tmp_path)
        folder = root / "global_step3_universal" / "zero"
        shutil.move(folder / "lm_head.weight", folder / "model.layers.0.self_attn.v_proj.weight.1")
        reason = refusal(root)
        assert "1 of 9 parameters have no file zero/NAME/fp32.pt: 'lm_head.weight'" in reason
        shutil.move(folder / "model.layers.0.self_attn.v_proj.weight.1", folder / "lm_head.weight")
        shutil.copytree(
            folder / "lm_head.weight",
            folder / "model.layers.0.mlp.gate_proj.weight",
            dirs_exist_ok=True,
        )
        assert "is [184] in its fp32.pt and [12, 8] in param_shapes" in refusal(root)

    def test_a_parameter_that_nothing_holds(self, tmp_path):
        """Trained by nobody and not frozen: ZeRO 3 does not save it."""
        root = copied("zero3_fp32_buffer", tmp_path)
        for path in root.glob("*/*_model_states.pt"):
            value = torch.load(path, weights_only=True)
            value["module"]["idle.weight"] = torch.empty(0)
            torch.save(value, path)
        notes = end_of(LOADER.load(root, {})).notes
        assert any(
            note.startswith("'idle.weight': in the module, and in no group") for note in notes
        )

    def test_objects_that_hold_themselves(self, tmp_path):
        root = copied("zero3_bf16", tmp_path)
        for path in root.glob("*/*_optim_states.pt"):
            own = []
            own.append(own)
            torch.save({"optimizer_state_dict": {"partition_count": 3, "x": own}}, path)
        assert "holds itself" in refusal(root)

    def test_masters_that_no_one_knows_without_zero(self, tmp_path):
        """Masters have no names: of two equal weights, none is guessed."""
        root = copied("zero0_bf16", tmp_path)
        path = root / "global_step3" / "mp_rank_00_model_states.pt"
        value = torch.load(path, weights_only=True)
        ones = torch.ones(4)
        value["module"] |= {"a": ones.bfloat16(), "b": ones.bfloat16()}
        value["optimizer"]["fp32_groups"].append([ones, ones.clone()])
        torch.save(value, path)
        assert "the fp32 masters have no names" in refusal(root)
        assert list(LOADER.load(root, {"weights": "module"}))

    @pytest.mark.parametrize(
        ("file", "reason"),
        [
            ("layer_00-model_states.pt", "a layer of a PipelineModule beside the model states"),
            ("layer_0_expert_1_mp_rank_00_model_states.pt", "the model states say of no such"),
            ("mp_rank_01_model_states.pt", "split over 1 tensor or pipeline parallel ranks"),
            ("mp_rank_02_model_states.pt", "model states of 1 of 3 ranks are missing: mp_rank_01"),
            ("bf16_zero_pp_rank_4_mp_rank_00_optim_states.pt", "1 of 5 ranks are missing: rank 3"),
            ("expert_1_mp_rank_00_model_states.pt", "not the name of a file that DeepSpeed writes"),
            ("mp_rank_1000000000_model_states.pt", "of 1000000001 ranks are missing: mp_rank_01"),
            ("my_optim_states.pt", "not the name of a file that DeepSpeed writes"),
        ],
    )
    def test_files_that_do_not_belong(self, file, reason, tmp_path):
        root = copied("zero2_bf16_groups", tmp_path)
        shutil.copy(
            root / "global_step3" / "mp_rank_00_model_states.pt", root / "global_step3" / file
        )
        assert reason in refusal(root)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"module": None}, "a checkpoint of a PipelineModule, and holds no layer_"),
            (
                {"num_experts": [1, 1]},
                "the files of 2 of 2 experts are missing: 'layer_0_expert_0'",
            ),
            (
                {"num_experts": [1 << 40]},
                "experts are missing: 'layer_0_expert_0', 'layer_0_expert",
            ),
            ({"num_experts": ["x"]}, "'num_experts' is not a list of numbers"),
            ({"buffer_names": [[]]}, "'buffer_names' of the model states is not what"),
            ({"ds_autoep_layers": [{}]}, "AutoEP has split the experts"),
            (
                {"checkpoint_parallel_dimensions": {"pp_degree": 2, "tp_degree": 1}},
                "found files of 1",
            ),
            ({"param_shapes": [{"a": "b"}, {}]}, "'param_shapes' of the model states is not what"),
            ({"param_shapes": [{}]}, "the model has 1 groups of parameters, a rank's optimizer 2"),
            ({"shared_params": {"x": "y"}}, "'x' shares its weight with 'y', which is nowhere"),
        ],
    )
    def test_model_states_that_say_so(self, changes, reason, tmp_path):
        root = copied("zero2_bf16_groups", tmp_path)
        path = root / "global_step3" / "mp_rank_00_model_states.pt"
        torch.save(torch.load(path, weights_only=True) | changes, path)
        assert reason in refusal(root)
