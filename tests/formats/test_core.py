"""Megatron Core checkpoints in both forms through the kit, and against ones made by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptx.errors import CkptxError, PlanError, SchemaError
from ckptx.registry import registry
from ckptx.testing import strategies
from ckptx.testing.contracts import (
    Checkpoint,
    LoaderTests,
    SaverTests,
    assert_equal,
    assert_one_line,
    assert_same_files,
    fits,
    unpadded,
)
from ckptx.testing.conversion import begin_of, convert, loaded, save
from ckptx.testing.models import MIXTURES, MODELS, PADDED, messages, tiny, write_hf

from .by_hand import (
    assert_state,
    even,
    padded,
    rank_states,
    write_distributed,
    write_ranks,
)

LOADER, SAVER = registry.loader("core"), registry.saver("core")
HF_LOADER, HF_SAVER = registry.loader("hf"), registry.saver("hf")
GPT = tiny("gpt")
GPT_TIED = tiny("gpt", "gpt-tied-rotary", tied=True, position_embedding_type="rope")
BY_NAME = {model.name: model for model in (*MODELS, *PADDED, GPT, GPT_TIED)}
LLAMA = BY_NAME["llama"]
TIED = BY_NAME["qwen2-tied"]


def options(
    tp=1, pp=1, vpp=None, first=None, last=None, layout=None, embedding=False, loss=False, **more
):
    said = {
        "target_tensor_parallel_size": tp,
        "target_pipeline_parallel_size": pp,
        "target_virtual_pipeline_parallel_size": vpp,
        "decoder_first_pipeline_num_layers": first,
        "decoder_last_pipeline_num_layers": last,
        "pipeline_model_parallel_layout": layout,
        "account_for_embedding_in_pipeline_split": embedding,
        "account_for_loss_in_pipeline_split": loss,
        **more,
    }
    return {name: value for name, value in said.items() if value not in (None, False)}


SAMPLE = (
    ("llama", options()),
    ("llama", options(tp=2, pp=3, first=1, last=1)),
    ("llama", options(tp=8)),  # more ranks than query groups
    ("llama", options(tp=4, pp=3, embedding=True, loss=True)),
    ("square", options(tp=4, pp=2)),
    ("llama-biases", options(tp=2, pp=4)),
    ("llama-odd-heads", options(tp=3, pp=2, last=1)),
    ("llama-twelve-layers", options(tp=2, pp=3, vpp=2)),
    ("llama-twelve-layers", options(pp=2, vpp=2, layout="Et*3|t|t*6|t*2L")),
    ("mistral-one-group", options(tp=4, pp=2, vpp=2)),
    ("qwen2", options(tp=2, pp=2, vpp=2, make_vocab_size_divisible_by=1)),
    ("qwen2-tied", options(tp=8, pp=4)),
    ("qwen2-tied", options(tp=2, pp=2, vpp=2, saver_transformer_impl="local")),
    ("qwen3", options(tp=2, pp=2, first=3)),
    ("qwen3", options(pp=3, layout="Et|tt|tL", iteration="7")),
    ("qwen3-tied", options(tp=2, saver_transformer_impl="local")),
    ("llama-padded", options(tp=2, pp=2, make_vocab_size_divisible_by=16)),
    ("llama-padded", options(make_vocab_size_divisible_by=37)),
    ("qwen2-tied-padded", options(tp=4, pp=2)),
    ("gpt", options(tp=2, pp=2)),
    ("gpt-tied-rotary", options(tp=4, pp=2, vpp=2)),
)

PIPELINES = (
    options(),
    options(pp=2),
    options(pp=4),
    options(pp=2, vpp=2),
    options(pp=3, first=1, last=1),
    options(pp=2, first=3),
    options(pp=2, last=3),
    options(pp=2, embedding=True, loss=True),
    options(pp=3, layout="Et|tt|tL"),
    options(pp=2, layout="E|t|tt|tL"),
)


def _grid():
    """Every model at every tensor-parallel size and pipeline that it allows."""
    for model, tp, pipeline in product(BY_NAME.values(), (1, 2, 3, 4, 8), PIPELINES):
        chosen = {**pipeline, "target_tensor_parallel_size": tp}
        even_split = model.spec.num_layers == 4
        if even_split and fits(model, {"target_tensor_parallel_size": tp}):
            yield model, chosen


class _Core(SaverTests):
    loader, saver = LOADER, SAVER
    ckpt_format = ""

    def cases(self):
        own = {"ckpt_format": self.ckpt_format}
        sample = [(BY_NAME[name], {**chosen, **own}) for name, chosen in SAMPLE]
        rest = [(model, {**chosen, **own}) for model, chosen in _grid()]
        return [
            *sample,
            *(pytest.param(case, marks=pytest.mark.full) for case in rest if case not in sample),
        ]


class TestRanks(LoaderTests, _Core):
    """``--ckpt-format torch``; the loader's sources are written by torch."""

    ckpt_format = "torch"
    models = (LLAMA, TIED, MODELS[2], MODELS[5], MODELS[8], GPT)

    def write(self, directory: Path, model) -> Checkpoint:
        root = write_ranks(directory, model, 2, even(4, 2), rows=40)
        return Checkpoint(root, _with_padding(model, 40))


class TestVirtualRanks(LoaderTests):
    loader = LOADER
    models = (LLAMA, TIED, GPT_TIED)

    def write(self, directory: Path, model) -> Checkpoint:
        root = write_ranks(directory, model, 4, even(4, 2, 2), rows=128)
        return Checkpoint(root, _with_padding(model, 128))


class TestDistributed(LoaderTests, _Core):
    """``--ckpt-format torch_dist``; the loader's sources are written by torch's DCP."""

    ckpt_format = "torch_dist"
    models = (LLAMA, TIED, MODELS[2], MODELS[5], MODELS[8], GPT)

    def write(self, directory: Path, model) -> Checkpoint:
        root = write_distributed(directory, model, rows=48)
        return Checkpoint(root, _with_padding(model, 48))


def _with_padding(model, rows):
    found = model.canonical(padded=False)
    for message, key in (("embeddings", "word embeddings"), ("output layer", "weight")):
        if message in found:
            found[message] = {**found[message], key: padded(found[message][key], rows)}
    return found


@pytest.mark.parametrize(
    ("name", "tp", "stages"),
    [
        ("llama", 1, even(4, 1)),
        ("llama", 2, even(4, 2)),
        ("llama", 8, even(4, 1)),
        ("square", 4, even(2, 2)),
        ("llama-biases", 2, even(4, 2, 2)),
        ("llama-twelve-layers", 2, even(12, 3, 2)),
        ("mistral-one-group", 4, even(4, 4)),
        ("qwen2-tied", 2, even(4, 2)),
        ("qwen2-tied", 4, even(4, 1)),
        ("qwen3", 2, [[[0]], [[1, 2]], [[3]]]),
        ("gpt", 2, even(4, 2)),
        ("gpt-tied-rotary", 2, even(4, 2, 2)),
    ],
)
def test_ranks_hold_what_numpy_cuts(name, tp, stages, tmp_path):
    model = BY_NAME[name]
    pp, vpp = len(stages), len(stages[0])
    uneven = len({len(layers) for chunks in stages for layers in chunks}) > 1
    chosen = options(
        tp=tp,
        pp=pp,
        vpp=vpp if vpp > 1 else None,
        first=1 if uneven else None,
        last=1 if uneven else None,
        ckpt_format="torch",
        make_vocab_size_divisible_by=10,
    )
    root = save(SAVER, messages(model, tmp_path / "s"), tmp_path / "t", chosen)
    rows = -(-model.vocabulary // (10 * tp)) * 10 * tp
    expected = dict(rank_states(model, tp, stages, rows))
    assert sorted(p.name for p in (root / "release").glob("mp_rank_*")) == sorted(expected)
    for directory, models in expected.items():
        path = root / "release" / directory / "model_optim_rng.pt"
        state = torch.load(path, weights_only=False)
        assert sorted(key for key in state if key.startswith("model")) == sorted(models)
        for key, arrays in models.items():
            assert_state(state[key], arrays)


@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
@pytest.mark.parametrize("model", [model for model in MODELS if model.name != "llama-odd-heads"])
def test_hf_to_core_to_hf_is_the_same_file(model, ckpt_format, tmp_path):
    source = write_hf(tmp_path / "source", model)
    plain = convert(HF_LOADER, source, HF_SAVER, tmp_path / "plain" / "model")
    chosen = options(tp=2 if fits(model, {"target_tensor_parallel_size": 2}) else 1, pp=2)
    core = convert(
        HF_LOADER, source, SAVER, tmp_path / "core", {**chosen, "ckpt_format": ckpt_format}
    )
    back = convert(LOADER, core, HF_SAVER, tmp_path / "back" / "model")
    assert_same_files(plain, back)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_regrid_keeps_every_byte(data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("regrid")
    model = data.draw(strategies.models())
    root = None
    for number in range(3):
        pipeline = data.draw(strategies.pipelines(model.spec.num_layers))
        chosen = options(
            tp=data.draw(strategies.tensor_parallel_sizes(model)),
            pp=pipeline.pp,
            vpp=pipeline.vpp,
            first=pipeline.first,
            last=pipeline.last,
            layout=pipeline.layout,
            embedding=pipeline.embedding_in_split,
            loss=pipeline.loss_in_split,
            ckpt_format=data.draw(st.sampled_from(["torch", "torch_dist"])),
            make_vocab_size_divisible_by=data.draw(st.sampled_from([None, 1, 7])),
        )
        sent = messages(model, directory / "s") if root is None else LOADER.load(root, {})
        root = save(SAVER, sent, directory / str(number), chosen)
        assert_equal(unpadded(loaded(LOADER, root), model), model.canonical())


def test_a_regrid_back_is_the_same_checkpoint(tmp_path):
    first, other = options(tp=2, pp=2), options(tp=4, pp=2, vpp=2)
    source = write_hf(tmp_path / "s", TIED)
    one = convert(HF_LOADER, source, SAVER, tmp_path / "1" / "core", first)
    two = convert(LOADER, one, SAVER, tmp_path / "2" / "core", other)
    three = convert(LOADER, two, SAVER, tmp_path / "3" / "core", first)
    assert_same_files(one, three)
    four = convert(LOADER, one, SAVER, tmp_path / "4" / "core", {})
    assert_same_files(one, four)


def test_padding_repeats_the_last_row_and_is_cut_again(tmp_path):
    chosen = options(tp=2, make_vocab_size_divisible_by=32)
    root = save(SAVER, messages(LLAMA, tmp_path / "s"), tmp_path / "t", chosen)
    words = loaded(LOADER, root)["embeddings"]["word embeddings"]
    assert words.shape[0] == 64
    assert words[37:].tobytes() == np.repeat(words[36:37], 27, axis=0).tobytes()
    again = convert(LOADER, root, SAVER, tmp_path / "u", options(make_vocab_size_divisible_by=1))
    assert loaded(LOADER, again)["embeddings"]["word embeddings"].shape[0] == 37


def test_an_unknown_vocabulary_is_never_cut(tmp_path):
    model = tiny("llama", vocab_size=48)
    sent = _without_vocabulary(model, tmp_path)
    root = save(SAVER, sent, tmp_path / "t", options(tp=4))
    assert loaded(LOADER, root)["embeddings"]["word embeddings"].shape[0] == 48
    with pytest.raises(PlanError, match="--true-vocab-size"):
        SAVER.plan(iter(_without_vocabulary(LLAMA, tmp_path)), options(tp=4))


def _without_vocabulary(model, directory):
    begin, *rest = messages(model, directory, config=False)
    return [replace(begin, parts={"language": replace(model.spec, vocab_size=None)}), *rest]


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (options(tp=3), "does not divide num_attention_heads 8"),
        (options(pp=3), "4 layers do not fit"),
        (options(pp=2, vpp=3), "4 layers do not fit"),
        (options(pp=2, first=4, last=4), "do not fit"),
        (options(pp=2, layout="Ett|tL"), "places 3 of 4"),
        (options(pp=2, first=1, loss=True), "exclude each other"),
        (options(target_expert_parallel_size=2), "no experts"),
        (options(iteration="latest"), "no iteration"),
    ],
)
def test_what_does_not_divide_is_refused(chosen, said, tmp_path):
    with pytest.raises(PlanError, match=said) as error:
        SAVER.plan(iter(messages(LLAMA, tmp_path)), chosen)
    assert_one_line(error.value)


def test_tp_that_neither_divides_nor_is_a_multiple_of_the_groups_is_refused(tmp_path):
    model = tiny(num_query_groups=4, num_attention_heads=12, ffn_hidden_size=12)
    with pytest.raises(PlanError, match="neither divides 4 query groups"):
        SAVER.plan(iter(messages(model, tmp_path)), options(tp=6))


def test_gpt_has_no_hugging_face_form(tmp_path):
    for model in (GPT, GPT_TIED):
        with pytest.raises(SchemaError, match=r"gpt has no hf layout.*relatives do not") as error:
            HF_SAVER.plan(iter(messages(model, tmp_path / model.name)), {})
        assert_one_line(error.value)


@pytest.mark.parametrize("rank", ["mp_rank_00_000", "mp_rank_01_001"])
def test_a_missing_rank_is_an_error(rank, tmp_path):
    root = write_ranks(tmp_path, LLAMA, 2, even(4, 2), rows=40)
    directory = root / "iter_0000010"
    (directory / rank).rename(directory / "mp_rank_09_009")
    with pytest.raises(CkptxError, match=rank):
        list(LOADER.load(root, {}))


def test_the_iteration_is_kept_and_can_be_chosen(tmp_path):
    root = write_ranks(tmp_path / "s", LLAMA, 2, even(4, 2), rows=40)
    kept = convert(LOADER, root, SAVER, tmp_path / "kept", {"ckpt_format": "torch"})
    assert (kept / "latest_checkpointed_iteration.txt").read_text() == "10"
    assert (kept / "iter_0000010" / "mp_rank_01_001").is_dir(), "sizes stay the source's"
    named = convert(LOADER, root / "iter_0000010", SAVER, tmp_path / "named", {"iteration": "3"})
    assert (named / "iter_0000003" / "metadata.json").is_file()
    assert begin_of(LOADER.load(named, {})).training["iteration"] == 3


class TestMixtures(SaverTests):
    """Experts at every kind of size, and held in every way."""

    loader, saver = LOADER, SAVER
    models = MIXTURES

    def option_sets(self):
        sizes = ((1, 1, None), (1, 2, 1), (1, 4, 1), (2, 2, 1), (2, 2, 2), (2, 4, 1), (4, 2, 2))
        for number, (tp, ep, etp) in enumerate(sizes):
            chosen = options(
                tp,
                pp=1 + number % 2,
                target_expert_parallel_size=ep,
                target_expert_tensor_parallel_size=etp,
                moe_grouped_gemm=number % 3 == 0,
                saver_transformer_impl="local" if number // 2 % 2 else "transformer_engine",
            )
            for ckpt_format in ("torch_dist", "torch"):
                yield {**chosen, "ckpt_format": ckpt_format}

    def cases(self):
        for number, chosen in enumerate(self.option_sets()):
            yield self.models[(number + number // 4) % len(self.models)], chosen
