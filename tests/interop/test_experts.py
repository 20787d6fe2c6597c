"""Mixtures of experts: transformers and Megatron Core on either side compute the same logits."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from ckptx.errors import CkptxError, PlanError, SchemaError
from ckptx.schemas.conventions.mcore import MCORE
from ckptx.schemas.megatron_settings.args import spec_from_args
from tests.oracles import hf, mcore
from tests.oracles.mcore import Layout

from .conversion import CLOSE, contents, convert, difference, strict_logits
from .experts import (
    DISTRIBUTED_ONLY,
    FAMILIES,
    KINDS,
    LAYOUTS,
    THOROUGH,
    expert_sizes,
    to_megatron,
    to_transformers,
)

FORMATS = ("torch_dist", "torch")
PER_LAYER = {
    "singleton shards": {"singleton_local_shards": True},
    "layers apart": {"non_homogeneous_layers": True},
}


def combinations(shift):
    """Every family at every layout in both forms, every kind in turn; a diagonal is everyday's."""
    found, kinds, families = {}, list(KINDS), list(FAMILIES)
    for number, layout in enumerate(LAYOUTS):
        turn = number + shift
        everyday = families[5 * turn % len(families)], layout, FORMATS[turn // 2 % 2]
        marks = [pytest.mark.full] * ((number + shift) % 2)  # the other direction has it
        found[*everyday, kinds[(turn + turn // 4) % len(kinds)]] = marks
    rest = itertools.product(FAMILIES, LAYOUTS, FORMATS)
    for number, combination in enumerate(rest):
        every = kinds if combination[0] in THOROUGH else [kinds[number % len(kinds)]]
        for kind in every:
            found.setdefault((*combination, kind), [pytest.mark.full])
    return [pytest.param(*combination, marks=marks) for combination, marks in found.items()]


@pytest.mark.parametrize(("family", "layout", "format", "kind"), combinations(0))
def test_megatron_computes_what_transformers_computes(
    family, layout, format, kind, source_of, tmp_path
):
    case = source_of(family), LAYOUTS[layout], format, KINDS[kind]
    assert to_megatron(*case, tmp_path) <= CLOSE


@pytest.mark.parametrize(("family", "layout", "format", "kind"), combinations(5))
def test_transformers_computes_what_megatron_computes(
    family, layout, format, kind, source_of, tmp_path
):
    case = source_of(family), LAYOUTS[layout], format, KINDS[kind]
    assert to_transformers(*case, tmp_path) <= CLOSE


NAMES = list(LAYOUTS)
RING = list(zip(NAMES, NAMES[5:] + NAMES[:5], strict=True))[::3]
# The first stage of a model whose first layer is dense: its expert-parallel ranks hold the same.
DENSE_STAGE = ("pp2-first1-ep4", "tp2")
EVERY_DAY = {*RING, DENSE_STAGE}
MOVES = [
    pytest.param(here, there, n, marks=[] if (here, there) in EVERY_DAY else [pytest.mark.full])
    for n, (here, there) in enumerate(itertools.product(LAYOUTS, LAYOUTS))
]


@pytest.mark.parametrize(("here", "there", "turn"), MOVES)
def test_megatrons_own_checkpoint_cut_anew(here, there, turn, source_of, tmp_path):
    """Sizes, form and the way experts are held change, the logits do not."""
    source = source_of(list(FAMILIES)[turn % len(FAMILIES)])
    before, after = LAYOUTS[here], LAYOUTS[there]
    old, new = FORMATS[turn % 2], FORMATS[turn // 2 % 2]
    kinds = list(KINDS.values())
    kind, other = kinds[turn % 4], kinds[(turn + 1 + turn // 4) % 4]
    expected = mcore.write(
        kind.model(source, before),
        before,
        tmp_path / "old",
        source.tokens,
        format=old,
        args={"vocab_size": 131},
    )
    options = {"ckpt_format": new, **other.options, **expert_sizes(after)}
    convert(tmp_path / "old", tmp_path / "new", "core", **options)
    model = other.model(source, after)
    found = mcore.read(model, after, tmp_path / "new", source.tokens, format=new)
    assert difference(found[..., :131], expected[..., :131]) <= CLOSE


@pytest.mark.parametrize(
    ("family", "format"),
    [
        ("mixtral", "torch_dist"),
        ("qwen2_moe-mixed", "torch"),
        pytest.param("qwen2_moe-mixed", "torch_dist", marks=pytest.mark.full),
        pytest.param("qwen3_moe", "torch", marks=pytest.mark.full),
    ],
)
def test_checkpoint_alone_says_which_model_it_is(family, format, source_of, tmp_path):
    source, layout = source_of(family), LAYOUTS["tp2-ep2-etp1"]
    options = {"ckpt_format": format, "moe_grouped_gemm": True, **expert_sizes(layout)}
    convert(source.directory, tmp_path / "core", "core", **options)
    found = mcore.read(None, layout, tmp_path / "core", source.tokens, format=format)
    assert difference(found[..., :131], source.logits) <= CLOSE
    # And its own sizes stay if nothing is said.
    convert(tmp_path / "core", tmp_path / "again", "core", ckpt_format=format)
    found = mcore.read(None, layout, tmp_path / "again", source.tokens, format=format)
    assert difference(found[..., :131], source.logits) <= CLOSE


@pytest.mark.parametrize("layout", DISTRIBUTED_ONLY)
def test_sizes_whose_ranks_share_a_name_are_for_torch_dist(layout, source_of, tmp_path):
    source, layout = source_of("mixtral"), DISTRIBUTED_ONLY[layout]
    convert(source.directory, tmp_path / "core", "core", **expert_sizes(layout))
    model = KINDS["te-grouped"].model(source, layout)
    found = mcore.read(model, layout, tmp_path / "core", source.tokens)
    assert difference(found[..., :131], source.logits) <= CLOSE
    options = {"ckpt_format": "torch", **expert_sizes(layout)}
    with pytest.raises(PlanError, match="names the files of several ranks alike"):
        convert(source.directory, tmp_path / "ranks", "core", **options)


def test_torch_dist_loads_at_layouts_it_was_not_made_for(source_of, tmp_path):
    source = source_of("qwen2_moe")
    convert(source.directory, tmp_path / "core", "core", **expert_sizes(LAYOUTS["tp2-ep2"]))
    for name, kind in (("tp1", "te"), ("ep4", "te-grouped"), ("tp2-pp2-ep2-etp1", "te")):
        model = KINDS[kind].model(source, LAYOUTS[name])
        found = mcore.read(model, LAYOUTS[name], tmp_path / "core", source.tokens)
        assert difference(found[..., :131], source.logits) <= CLOSE


SPELT = (("singleton shards", "te-grouped"), ("singleton shards", "local"), ("layers apart", "te"))


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        pytest.param(*spelt, marks=[] if spelt in SPELT else [pytest.mark.full])
        for spelt in itertools.product(PER_LAYER, KINDS)
    ],
)
def test_keys_per_layer_and_per_expert(keys, kind, source_of, tmp_path):
    source, layout = source_of("qwen2_moe"), Layout(tp=2, ep=2)
    expected = mcore.write(
        KINDS[kind].model(source, layout),
        layout,
        tmp_path / "core",
        source.tokens,
        content_metadata=PER_LAYER[keys],
        args={"vocab_size": 131},
    )
    convert(tmp_path / "core", tmp_path / "hf", "hf")
    found = strict_logits(tmp_path / "hf", source.tokens)
    assert difference(found, expected[..., :131]) <= CLOSE


@pytest.mark.parametrize("kind", KINDS)
def test_our_ranks_hold_what_megatrons_hold(kind, source_of, tmp_path):
    """Megatron writes the same model at two layouts; cutting the first anew gives the second."""
    source, kind, layout = source_of("qwen2_moe-mixed"), KINDS[kind], LAYOUTS["tp2-pp2-ep2-etp1"]
    for name, where in (("whole", Layout()), ("theirs", layout)):
        model = kind.model(source, layout)
        mcore.write(model, where, tmp_path / name, source.tokens, format="torch")
    options = {"ckpt_format": "torch", **kind.options, **expert_sizes(layout)}
    convert(tmp_path / "whole", tmp_path / "ours", "core", **options)
    files = sorted((tmp_path / "theirs").rglob("*.pt"))
    # Four of the eight names that one could think of: a rank's expert number follows its own.
    names = [f"mp_rank_{rank:02}_{pp:03}_{rank:03}" for rank in range(2) for pp in range(2)]
    assert [file.parent.name for file in files] == names
    assert [file.parent.name for file in sorted((tmp_path / "ours").rglob("*.pt"))] == names
    for file in files:
        here = tmp_path / "ours" / file.relative_to(tmp_path / "theirs")
        theirs, ours = (torch.load(f, weights_only=False)["model"] for f in (file, here))
        assert sorted(ours) == sorted(theirs)
        for name, tensor in theirs.items():
            same = ours[name] is None if tensor is None else torch.equal(ours[name], tensor)
            assert same, name


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("mixtral", "local"),
        ("qwen2_moe-mixed", "te"),
        pytest.param("mixtral", "te", marks=pytest.mark.full),
        pytest.param("qwen2_moe-mixed", "local", marks=pytest.mark.full),
    ],
)
def test_torch_dist_has_megatrons_keys(family, kind, source_of, tmp_path):
    source, kind, layout = source_of(family), KINDS[kind], LAYOUTS["tp2-ep2"]
    mcore.write(kind.model(source, layout), layout, tmp_path / "theirs", source.tokens)
    convert(source.directory, tmp_path / "ours", "core", **kind.options, **expert_sizes(layout))
    entries = [
        FileSystemReader(tmp_path / path).read_metadata().state_dict_metadata
        for path in ("theirs/iter_0000010", "ours/release")
    ]
    theirs, ours = ({k: getattr(e, "size", None) for k, e in found.items()} for found in entries)
    states = {name for name in ours if "_extra_state" in name}
    assert {n: s for n, s in ours.items() if n not in states - set(theirs)} == theirs
    for name, entry in entries[0].items():
        if hasattr(entry, "size"):
            grid = [[(c.offsets, c.sizes) for c in found[name].chunks] for found in entries]
            assert sorted(grid[1]) == sorted(grid[0])


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param(*one, marks=[] if number % 2 else [pytest.mark.full])
        for number, one in enumerate(
            itertools.product(("mixtral", "qwen2_moe-mixed", "qwen3_moe"), KINDS)
        )
    ],
)
def test_rules_stand_in_the_order_of_megatrons_parameters(family, kind, source_of, tmp_path):
    source = source_of(family)
    model = KINDS[kind].model(source, Layout())
    if family == "mixtral":
        bias = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
        model = replace(model, config={**model.config, **bias})
    mcore.write(model, Layout(), tmp_path, source.tokens, format="torch")
    (file,) = tmp_path.rglob("*.pt")
    state = torch.load(file, weights_only=False)
    theirs = [name for name in state["model"] if not name.endswith("_extra_state")]
    assert MCORE[f"mcore-{kind}"].names(spec_from_args(vars(state["args"]))) == theirs


@pytest.mark.parametrize("format", FORMATS)
def test_balancing_biases_keep_their_dtype(format, source_of, tmp_path):
    source, layout = source_of("mixtral"), Layout(ep=2)
    model = KINDS["te"].model(source, layout)
    bias = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    model = replace(model, config={**model.config, **bias})
    expected = mcore.write(model, layout, tmp_path / "old", source.tokens, format=format)
    for dtype in ("float32", "bfloat16"):
        options = {"ckpt_format": "torch", **expert_sizes(LAYOUTS["tp2-ep2-etp1"])}
        convert(tmp_path / "old", tmp_path / dtype, "core", dtype=dtype, **options)
    after = LAYOUTS["tp2-ep2-etp1"]
    found = mcore.read(model, after, tmp_path / "float32", source.tokens, format="torch")
    assert difference(found, expected) <= CLOSE
    file = min((tmp_path / "bfloat16").rglob("*.pt"))
    state = torch.load(file, weights_only=False)["model"]
    kinds = {"router.expert_bias": torch.float32, "router.weight": torch.bfloat16}
    for name, kind in kinds.items():
        assert {t.dtype for n, t in state.items() if n.endswith(name)} == {kind}
    with pytest.raises(SchemaError, match="family gpt has no hf layout"):
        convert(tmp_path / "old", tmp_path / "hf", "hf")


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if number % 2 else [pytest.mark.full])
        for number, family in enumerate(FAMILIES)
    ],
)
def test_every_family_comes_back_as_it_was(family, source_of, tmp_path):
    before = source_of(family).directory
    one, two = (expert_sizes(LAYOUTS[name]) for name in ("tp2-ep2-etp1", "pp2-vpp2-ep2"))
    convert(before, tmp_path / "one", "core", ckpt_format="torch", **one, moe_grouped_gemm=True)
    convert(tmp_path / "one", tmp_path / "two", "core", ckpt_format="torch_dist", **two)
    convert(tmp_path / "two", tmp_path / "after", "hf")
    assert contents(tmp_path / "after") == contents(before)


def test_megatrons_own_loader_by_its_name(source_of, tmp_path):
    source, layout = source_of("mixtral"), LAYOUTS["ep2"]
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(b"a tokenizer")
    named = {"loader_options": {"tokenizer_model": tokenizer, "true_vocab_size": 131}}
    sizes = expert_sizes(layout)
    convert(source.directory, tmp_path / "core", "core", loader="mixtral_hf", **named, **sizes)
    found = mcore.read(KINDS["te"].model(source, layout), layout, tmp_path / "core", source.tokens)
    assert difference(found[..., :131], source.logits) <= CLOSE
    kept = tmp_path / "core" / "release" / "huggingface" / "tokenizer.model"
    assert kept.read_bytes() == b"a tokenizer"
    other = source_of("qwen3_moe").directory
    with pytest.raises(SchemaError, match="the model is Qwen3MoeForCausalLM, not a Mixtral"):
        convert(other, tmp_path / "other", "core", loader="mixtral_hf")


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe-mixed", "qwen3_moe"])
def test_names_of_transformers_memory_are_read(family, source_of, tmp_path):
    """A state dict saved as it is has fused experts; what is written has them apart."""
    source = source_of(family)
    state = AutoModelForCausalLM.from_pretrained(source.directory).state_dict()
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in state)
    fused = tmp_path / "fused"
    fused.mkdir()
    if source.config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file({n: t.contiguous() for n, t in state.items()}, fused / "model.safetensors")
    (fused / "config.json").write_bytes((source.directory / "config.json").read_bytes())
    convert(fused, tmp_path / "hf", "hf")
    expected, found = hf.weights(source.directory), hf.weights(tmp_path / "hf")
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_olmoe_keeps_its_names_and_is_refused_for_megatron(tmp_path):
    hf.olmoe(tmp_path / "before")
    convert(tmp_path / "before", tmp_path / "after", "hf", max_shard_size="200KB")
    tokens = torch.arange(24).reshape(2, 12)
    expected = hf.logits(tmp_path / "before", tokens)
    assert difference(strict_logits(tmp_path / "after", tokens), expected) == 0
    with pytest.raises(SchemaError, match=r"olmoe has no mcore.* layout, .*OLMoE each as a whole"):
        convert(tmp_path / "before", tmp_path / "core", "core")
    assert not (tmp_path / "core").exists()


def test_a_byte_that_differs_between_copies_of_dense_tensors_is_an_error(source_of, tmp_path):
    source = source_of("mixtral")
    options = {"ckpt_format": "torch", **expert_sizes(LAYOUTS["ep2"])}
    convert(source.directory, tmp_path / "core", "core", **options)
    convert(tmp_path / "core", tmp_path / "good", "hf")
    file = tmp_path / "core" / "release" / "mp_rank_00_001" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    name = "decoder.layers.2.self_attention.linear_proj.weight"
    data = bytearray(file.read_bytes())
    place = bytes(data).index(state["model"][name].numpy().tobytes())
    data[place + 77] ^= 1
    file.write_bytes(data)
    with pytest.raises(CkptxError, match="cop"):
        convert(tmp_path / "core", tmp_path / "bad", "hf")
    assert not (tmp_path / "bad").exists()


def test_args_of_dense_layers_between_are_megatrons(source_of, tmp_path):
    source = source_of("qwen2_moe-mixed")
    convert(source.directory, tmp_path, "core", **expert_sizes(LAYOUTS["ep2"]))
    args = mcore.checkpoint_args(tmp_path)
    assert (args.num_experts, args.moe_layer_freq) == (4, [1, 0, 1, 0])
    assert (args.expert_model_parallel_size, args.expert_tensor_parallel_size) == (2, 1)
    assert json.loads((tmp_path / "release" / "huggingface" / "config.json").read_text())
