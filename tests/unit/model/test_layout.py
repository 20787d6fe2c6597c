"""Tables read in both directions, with numbers that torch arranges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ckptx.errors import PlanError, SchemaError
from ckptx.model.family import Family
from ckptx.model.layout import Layout, Section, in_module_order, rule
from ckptx.model.pipeline_parallel import stage_ranks
from ckptx.model.sharding import Gatherer, Rank, Shards, check_message, shard_chunks, shard_tensors
from ckptx.model.spec import ModelSpec
from ckptx.model.transforms import (
    EXPERT_GLU,
    FUSED_QKV,
    GLU,
    GROUPED_FC1,
    GROUPED_FC2,
    IDENTITY,
    QKV,
    ROTARY_PAIRS,
    Transposed,
    compose,
    per_expert,
)
from ckptx.storage.gather import read
from ckptx.tensors.lazy import LazyTensor, Replicated, stored

pytest.importorskip("torch")

import torch

HEADS, GROUPS, HEAD_DIM, HIDDEN, FFN = 8, 4, 2, 6, 10
SPEC = ModelSpec("t", "T", 2, HIDDEN, FFN, HEADS, GROUPS, HEAD_DIM, 32, 64, 1e-5)
TIED = ModelSpec("t", "T", 2, HIDDEN, FFN, HEADS, GROUPS, HEAD_DIM, 32, 64, 1e-5, tied=True)

FUSED = rule("qkv weight", "layers.{layer}.qkv", tp=0)
APART = rule("qkv weight", [f"layers.{{layer}}.{n}" for n in "qkv"], QKV, tp=0)
GATED = rule(["mlp l0 weight W", "mlp l0 weight V"], "layers.{layer}.fc1", GLU, tp=0)
DOWN = rule("mlp l1 weight", "layers.{layer}.fc2", tp=1)
NORM = rule("norm", "layers.{layer}.norm", also=["layers.{layer}.ln"])
HEAD = rule("head", "head", tp=0, when=lambda spec: not spec.tied)
LAYOUT = Layout(
    "test", (Section("transformer layer {layer}", (GATED, NORM)), Section("output", (HEAD,)))
)


class Store:
    """Tensors in one file, lazy and eager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def put(self, eager: torch.Tensor) -> LazyTensor:
        offset = self.path.stat().st_size
        with self.path.open("ab") as file:
            file.write(eager.numpy().tobytes())
        return stored(0, offset, "float32", tuple(eager.shape))

    def get(self, lazy: LazyTensor) -> torch.Tensor:
        return torch.from_numpy(read(lazy, [str(self.path)]))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "tensors")


def qkv() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return a fused weight by query group, and its query, key and value."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(n * HEAD_DIM, HIDDEN) for n in (HEADS, GROUPS, GROUPS))
    groups = []
    for group in range(GROUPS):
        per = HEADS // GROUPS * HEAD_DIM
        rows = slice(group * HEAD_DIM, (group + 1) * HEAD_DIM)
        groups += [q[group * per : (group + 1) * per], k[rows], v[rows]]
    return torch.cat(groups), [q, k, v]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_query_key_and_value_of_a_rank_are_those_of_its_groups(store, tp):
    fused, parts = qkv()
    message = {"qkv weight": store.put(fused)}
    for rank in range(tp):
        named = shard_tensors([APART], message, SPEC, 3, Rank(tp, rank))
        for name, part in zip("qkv", parts, strict=True):
            assert torch.equal(store.get(named[f"layers.3.{name}"]), part.chunk(tp)[rank])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_shards_of_separate_query_key_and_value_fuse_by_group(store, tp):
    fused, parts = qkv()
    shards = [
        {f"layers.0.{n}": store.put(p.chunk(tp)[rank]) for n, p in zip("qkv", parts, strict=True)}
        for rank in range(tp)
    ]
    taken = Gatherer(LAYOUT, SPEC).take([APART], shards, 0)
    assert torch.equal(store.get(taken["qkv weight"]), fused)
    assert not any(shards)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_neighbouring_rows_of_a_head_rotate_together(store, tp):
    """As Meta's permutation for Hugging Face is written, and Llama's own rotation pairs rows."""
    spec = replace(SPEC, kv_channels=6)
    names = [f"layers.{{layer}}.{n}" for n in "qkv"]
    pairs = rule("qkv weight", names, compose(QKV, ROTARY_PAIRS), tp=0)
    parts = [torch.randn(n * 6, HIDDEN) for n in (HEADS, GROUPS, GROUPS)]
    shards = [
        {f"layers.0.{n}": store.put(p.chunk(tp)[rank]) for n, p in zip("qkv", parts, strict=True)}
        for rank in range(tp)
    ]
    given = {name: tensor for shard in shards for name, tensor in shard.items()}
    canonical = Gatherer(LAYOUT, spec).take([pairs], shards, 0)
    halves = shard_tensors([rule("qkv weight", names, QKV, tp=0)], canonical, spec, 0)
    for name, part, heads in zip("qk", parts, (HEADS, GROUPS), strict=False):
        expected = part.view(heads, 3, 2, HIDDEN).transpose(1, 2).reshape(heads * 6, HIDDEN)
        assert torch.equal(store.get(halves[f"layers.0.{name}"]), expected)
    assert torch.equal(store.get(halves["layers.0.v"]), parts[2])
    for rank in range(tp):
        back = shard_tensors([pairs], canonical, spec, 0, Rank(tp, rank))
        for name, part in zip("qkv", parts, strict=True):
            assert torch.equal(store.get(back[f"layers.0.{name}"]), part.chunk(tp)[rank])
        if tp == 1:
            assert back == given  # the very same extents


@pytest.mark.parametrize("changes", [{"kv_channels": 3}, {"rotary_percent": 0.5}])
def test_heads_that_rotate_in_part_have_no_pairs(store, changes):
    spec = replace(SPEC, **changes)
    names = [f"layers.{{layer}}.{n}" for n in "qkv"]
    pairs = rule("qkv weight", names, compose(QKV, ROTARY_PAIRS), tp=0)
    fused = store.put(torch.randn(spec.qkv_rows, HIDDEN))
    with pytest.raises(SchemaError, match="only whole heads of even size"):
        shard_tensors([pairs], {"qkv weight": fused}, spec, 0)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_gated_shard_holds_its_gate_then_its_up(store, tp):
    gate, up = torch.randn(FFN, HIDDEN), torch.randn(FFN, HIDDEN)
    message = {"mlp l0 weight W": store.put(gate), "mlp l0 weight V": store.put(up)}
    shards = []
    for rank in range(tp):
        named = shard_tensors([GATED], message, SPEC, 1, Rank(tp, rank))
        expected = torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]])
        assert torch.equal(store.get(named["layers.1.fc1"]), expected)
        shards.append({"layers.1.fc1": store.put(expected)})
    taken = Gatherer(LAYOUT, SPEC).take([GATED], shards, 1)
    assert torch.equal(store.get(taken["mlp l0 weight W"]), gate)
    assert torch.equal(store.get(taken["mlp l0 weight V"]), up)


@pytest.mark.parametrize("tp", [1, 2])
def test_chunks_placed_in_a_global_tensor_fill_it(store, tp):
    gate, up, down = torch.randn(FFN, HIDDEN), torch.randn(FFN, HIDDEN), torch.randn(HIDDEN, FFN)
    message = {
        "mlp l0 weight W": store.put(gate),
        "mlp l0 weight V": store.put(up),
        "mlp l1 weight": store.put(down),
    }
    found = {"layers.0.fc1": torch.zeros(2 * FFN, HIDDEN), "layers.0.fc2": torch.zeros(HIDDEN, FFN)}
    owners = []
    for owner, placed in shard_chunks([GATED, DOWN], message, SPEC, 0, stage_ranks(tp)):
        whole = found[placed.name]
        assert placed.global_shape == tuple(whole.shape)
        part = store.get(placed.tensor)
        where = tuple(slice(o, o + n) for o, n in zip(placed.origin, part.shape, strict=True))
        assert not whole[where].any()
        whole[where] = part
        owners.append(owner)
    assert owners == [*range(tp)] * 3
    assert torch.equal(found["layers.0.fc1"], torch.cat([gate, up]))
    assert torch.equal(found["layers.0.fc2"], down)


def test_replicated_tensors_are_copies_and_placed_whole(store):
    norm = torch.randn(HIDDEN)
    shards = [{"layers.0.norm": store.put(norm)} for _ in range(2)]
    taken = Gatherer(LAYOUT, SPEC).take([NORM], shards, 0)
    assert isinstance(taken["norm"], Replicated)
    ((owner, placed),) = shard_chunks([NORM], taken, SPEC, 0, stage_ranks(2))
    assert (owner, placed.origin, placed.global_shape) == (0, (0,), (HIDDEN,))


def test_other_spellings_are_read_and_the_first_is_written(store):
    norm = store.put(torch.randn(HIDDEN))
    assert Gatherer(LAYOUT, SPEC).take([NORM], [{"layers.0.ln": norm}], 0) == {"norm": norm}
    assert shard_tensors([NORM], {"norm": norm}, SPEC, 0) == {"layers.0.norm": norm}


def test_a_layout_names_every_message_in_model_order():
    messages = [(name, layer) for name, layer, _ in LAYOUT.expand(SPEC)]
    layers = [("transformer layer 0", 0), ("transformer layer 1", 1)]
    assert messages == [*layers, ("output", None)]
    assert [(name, layer) for name, layer, _ in LAYOUT.expand(TIED)] == layers


def test_one_error_names_what_is_missing_and_what_is_left(store):
    norm = store.put(torch.randn(HIDDEN))
    taker = Gatherer(LAYOUT, SPEC)
    shards = [{"layers.0.norm": norm}, {"layers.0.fc1": norm, "layers.0.norm": norm}]
    taker.take([GATED, NORM], shards, 0, "rank 1: ")
    with pytest.raises(
        SchemaError,
        match=r"layout test: 1 tensor is missing: 'rank 1: layers.0.fc1'; 1 .*of it: 'extra'",
    ):
        taker.finish(["extra"])
    Gatherer(LAYOUT, SPEC).finish([])


@pytest.mark.parametrize(
    ("entry", "shapes", "message"),
    [
        (GATED, {"layers.0.fc1": (5, 6)}, "5 rows has no two halves"),
        (
            APART,
            {"layers.0.q": (14, 6), "layers.0.k": (8, 6), "layers.0.v": (8, 6)},
            "query has 14",
        ),
        (APART, {"layers.0.q": (16, 6), "layers.0.k": (8, 6), "layers.0.v": (9, 6)}, "value has 9"),
    ],
)
def test_shapes_that_do_not_fit_name_the_tensor(entry, shapes, message):
    shard = {name: stored(0, 0, "float32", shape) for name, shape in shapes.items()}
    with pytest.raises(SchemaError, match=rf"layers\.0\.(fc1|q, .*): .*{message}"):
        Gatherer(LAYOUT, SPEC).take([entry], [shard], 0)


def test_ranks_that_do_not_fit_together_name_the_tensor():
    shards = [{"layers.0.fc2": stored(0, 0, "float32", (6 + rank, 5))} for rank in range(2)]
    with pytest.raises(SchemaError, match=r"layers\.0\.fc2: tensor-parallel ranks do not fit"):
        Gatherer(LAYOUT, SPEC).take([DOWN], shards, 0)


@pytest.mark.parametrize(("entry", "tp"), [(DOWN, 3), (FUSED, 5)])
def test_a_tensor_that_does_not_divide_is_refused(entry, tp):
    message = {"mlp l1 weight": stored(0, 0, "float32", (6, 10))}
    message["qkv weight"] = stored(0, 0, "float32", (32, 6))
    with pytest.raises(PlanError, match=f"does not divide over tensor-parallel size {tp}"):
        shard_tensors([entry], message, SPEC, 0, Rank(tp, 0))


def test_query_groups_that_do_not_divide_are_refused():
    message = {"qkv weight": stored(0, 0, "float32", (32, 6))}
    with pytest.raises(SchemaError, match="4 query groups do not divide over 8 ranks"):
        shard_tensors([APART], message, SPEC, 0, Rank(8, 0))


def test_separate_query_key_and_value_have_no_place_in_one_tensor():
    message = {"qkv weight": stored(0, 0, "float32", (32, 6))}
    with pytest.raises(SchemaError, match="side by side"):
        list(shard_chunks([APART], message, SPEC, 0, stage_ranks(1)))


def test_a_message_holds_exactly_the_keys_of_its_rules():
    tensor = stored(0, 0, "float32", (6,))
    check_message([NORM], {"norm": tensor}, "final norm", "mcore")
    with pytest.raises(
        SchemaError, match=r"'final norm' lacks 'norm' and has 'bias', which mcore cannot hold"
    ):
        check_message([NORM], {"bias": tensor}, "final norm", "mcore")


@pytest.mark.parametrize("transposed", [False, True])
def test_heads_one_after_another_are_those_of_torch(store, transposed):
    """Both ways against a fused tensor that torch arranges, and as [in, out] as GPT-2's Conv1D."""
    fused, parts = qkv()
    joined = torch.cat(parts)
    iso = Transposed(FUSED_QKV) if transposed else FUSED_QKV
    packed = store.put(joined.T.contiguous() if transposed else joined)
    (canonical,) = iso.unpack([packed], SPEC, 1)
    assert torch.equal(store.get(canonical), fused)
    (again,) = iso.pack([canonical], SPEC, 1)
    assert again == packed  # the very same extent, not pieces of it
    (made,) = iso.pack([store.put(fused)], SPEC, 1)
    assert torch.equal(store.get(made), joined.T if transposed else joined)


def test_biases_one_after_another_are_those_of_torch(store):
    bias = torch.arange((HEADS + 2 * GROUPS) * HEAD_DIM, dtype=torch.float32)
    (canonical,) = FUSED_QKV.unpack([store.put(bias)], SPEC, 1)
    found = store.get(canonical).reshape(GROUPS, -1)
    assert found[1].tolist() == [4.0, 5.0, 6.0, 7.0, 18.0, 19.0, 26.0, 27.0]


def test_isos_that_rearrange_one_tensor_say_what_is_wrong(store):
    tensor = store.put(torch.zeros(5, HIDDEN))
    with pytest.raises(SchemaError, match="have 5 rows, the config says 32"):
        FUSED_QKV.unpack([tensor], SPEC, 1)
    with pytest.raises(SchemaError, match=r"found \[3\] where a matrix is expected"):
        Transposed(IDENTITY).pack([store.put(torch.zeros(3))], SPEC, 1)
    for iso in (FUSED_QKV, Transposed(IDENTITY)):
        with pytest.raises(SchemaError):
            iso.origins([(5, HIDDEN)])


def test_a_layout_names_a_tensor_in_every_spelling():
    assert LAYOUT.names_of("transformer layer {layer}", "norm") == (
        "layers.{layer}.norm",
        "layers.{layer}.ln",
    )
    assert LAYOUT.names_of("output", "head") == ("head",)
    assert LAYOUT.names_of("output", "none") == ()


def test_a_family_says_why_it_lacks_a_layout():
    family = Family("t", (), (), {"hf": LAYOUT}, {}, refused={"mcore": "it is round"})  # type: ignore[arg-type] # not called
    with pytest.raises(SchemaError, match="family t has no mcore layout, only hf: it is round"):
        family.layout("mcore")
    with pytest.raises(SchemaError, match="cannot be named that way"):
        family.layout("legacy")


EXPERTS, EXPERT_FFN = 4, 8
MIXTURE = replace(SPEC, num_experts=EXPERTS, moe_ffn_hidden_size=EXPERT_FFN)
BOTH = ["mlp l0 weight W", "mlp l0 weight V"]
CUT = {"ep": 0, "tp": 1}
HALVES = rule(BOTH, ["e.{expert}.gate", "e.{expert}.up"], per_expert(width=2), **CUT)
FC1 = {
    "apart": rule(BOTH, "e.{expert}.fc1", per_expert(GLU), **CUT),
    "halves": HALVES,
    "one tensor": rule(BOTH, "fc1", EXPERT_GLU, **CUT),
    "grouped": rule(BOTH, "weight1", GROUPED_FC1, **CUT),
}
FC2 = {
    "apart": rule("mlp l1 weight", "e.{expert}.fc2", per_expert(), ep=0, tp=2),
    "one tensor": rule("mlp l1 weight", "fc2", ep=0, tp=2),
    "grouped": rule("mlp l1 weight", "weight2", GROUPED_FC2, ep=0, tp=2),
}
SIZES = [(1, 1, 1), (1, 2, 1), (1, 4, 1), (2, 2, 2), (2, 2, 1), (4, 2, 2), (2, 4, 1), (4, 1, 1)]


def experts() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {
        "mlp l0 weight W": torch.randn(EXPERTS, EXPERT_FFN, HIDDEN),
        "mlp l0 weight V": torch.randn(EXPERTS, EXPERT_FFN, HIDDEN),
        "mlp l1 weight": torch.randn(EXPERTS, HIDDEN, EXPERT_FFN),
    }


def held_by(eager: dict[str, torch.Tensor], rank: Rank) -> dict[str, torch.Tensor]:
    """What a rank holds under every name of `FC1` and `FC2`, by torch alone."""
    gate, up, down = (
        eager[key].chunk(rank.ep)[rank.ep_rank].chunk(rank.etp, axis)[rank.etp_rank]
        for key, axis in zip((*BOTH, "mlp l1 weight"), (1, 1, 2), strict=True)
    )
    found = {"fc1": torch.cat([gate, up], 1), "fc2": down}
    for e in range(len(gate)):
        found |= {f"e.{e}.fc1": torch.cat([gate[e], up[e]]), f"e.{e}.fc2": down[e]}
        found |= {f"e.{e}.gate": gate[e], f"e.{e}.up": up[e]}
    # Megatron's GroupedMLP multiplies rows by ``weight1.view(experts, hidden, -1)``, and by
    # ``weight2.view(experts, -1, hidden)``.
    blocks = torch.stack([torch.cat([g, u]).T for g, u in zip(gate, up, strict=True)])
    found["weight1"] = blocks.contiguous().view(HIDDEN, -1)
    found["weight2"] = torch.stack([one.T for one in down]).contiguous().view(-1, HIDDEN)
    return found


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("entry", [*FC1.values(), *FC2.values()], ids=lambda e: e.keys[0])
def test_every_rank_holds_its_part_of_its_experts(entry, sizes, store):
    eager, ranks = experts(), stage_ranks(*sizes)
    message = {key: store.put(tensor) for key, tensor in eager.items()}
    shards = []
    for rank in ranks:
        wanted = held_by(eager, rank)
        named = shard_tensors([entry], message, MIXTURE, 0, rank)
        assert named
        for name, tensor in named.items():
            assert torch.equal(store.get(tensor), wanted[name])
        shards.append({name: store.put(wanted[name].contiguous()) for name in named})
    taker = Gatherer(LAYOUT, MIXTURE)
    taken = taker.take([entry], Shards.of_grid(shards, ranks), 0)
    assert not any(shards)
    for key in entry.keys:
        assert torch.equal(store.get(taken[key]), eager[key])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_chunks_of_experts_fill_their_tensor_one_expert_each(sizes, store):
    eager = experts()
    message = {key: store.put(tensor) for key, tensor in eager.items()}
    found = {"fc1": torch.zeros(EXPERTS, 2 * EXPERT_FFN, HIDDEN)}
    found["fc2"] = torch.zeros(EXPERTS, HIDDEN, EXPERT_FFN)
    ranks = stage_ranks(*sizes)
    rules = [FC1["one tensor"], FC2["one tensor"]]
    for owner, placed in shard_chunks(rules, message, MIXTURE, 0, ranks):
        part = store.get(placed.tensor)
        assert len(part) == 1
        assert placed.global_shape == tuple(found[placed.name].shape)
        where = tuple(slice(o, o + n) for o, n in zip(placed.origin, part.shape, strict=True))
        assert not found[placed.name][where].any()
        found[placed.name][where] = part
        here = (ranks[owner].ep_rank, ranks[owner].etp_rank)
        assert all((rank.ep_rank, rank.etp_rank) != here for rank in ranks[:owner])
        assert placed.origin[0] // (EXPERTS // ranks[owner].ep) == ranks[owner].ep_rank
    whole = torch.cat([eager[key] for key in BOTH], 1)
    assert torch.equal(found["fc1"], whole)
    assert torch.equal(found["fc2"], eager["mlp l1 weight"])


def test_dense_tensors_of_expert_ranks_are_copies(store):
    norm, ranks = torch.randn(HIDDEN), stage_ranks(2, 4, 1)
    shards = [{"layers.0.norm": store.put(norm)} for _ in ranks]
    taken = Gatherer(LAYOUT, MIXTURE).take([NORM], Shards.of_grid(shards, ranks), 0)
    assert isinstance(taken["norm"], Replicated)
    assert not any(shards)


def test_missing_experts_are_named_by_the_number_in_their_shard(store):
    shards = [{"e.0.fc2": store.put(torch.zeros(HIDDEN, EXPERT_FFN))} for _ in range(2)]
    taker = Gatherer(LAYOUT, MIXTURE)
    taker.take([FC2["apart"]], Shards.of_grid(shards, stage_ranks(1, 2, 1)), 0, "rank: ")
    with pytest.raises(SchemaError, match=r"1 tensor is missing: 'rank: e.1.fc2'"):
        taker.finish([])


def test_experts_that_do_not_divide_are_refused():
    message = {"mlp l1 weight": stored(0, 0, "float32", (3, HIDDEN, 9))}
    for rank, kind in ((Rank(ep=2), "expert-parallel size 2"), (Rank(etp=2), "expert-tensor-")):
        with pytest.raises(PlanError, match=f"does not divide over {kind}"):
            shard_tensors([FC2["one tensor"]], message, MIXTURE, 0, rank)


def test_module_order_is_that_of_torch():
    class Expert(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)

    model = torch.nn.ModuleDict({"a": Expert(), "e": torch.nn.ModuleList([Expert(), Expert()])})
    order = list(model.state_dict())
    shuffled = sorted(order, key=lambda name: (name[0], name.rpartition("fc")[2]))
    by_kind = [name for kind in ("1.w", "1.b", "2.w", "2.b") for name in shuffled if kind in name]
    assert by_kind != order
    assert in_module_order(by_kind) == order
