"""Every known mistake, made in plain torch on weights of a real model, is called by its name."""

from __future__ import annotations

import re

import pytest

from ckptx.verification.compare import compare

torch = pytest.importorskip("torch")

FULL = pytest.mark.full


class Pair:
    """A model and what became of it."""

    def __init__(self, weights, directory):
        self.weights = weights
        self.directory = directory
        self.state = weights.copy()
        self.config = {}
        self.a_state = weights.copy()
        self.a_config = {}

    def __getitem__(self, name):
        return self.state[name]

    def names(self, pattern):
        return [name for name in self.state if re.search(pattern, name)]

    def change(self, pattern, function):
        for name in self.names(pattern):
            self.state[name] = function(self.state[name])

    def compared(self, **settings):
        a = self.weights.write(self.directory / "a", self.a_state, **self.a_config)
        b = self.weights.write(self.directory / "b", self.state, **self.config)
        return compare(a, b, **settings)

    def found(self):
        """Return the mistakes found, with the number of tensors that each explains."""
        comparison = self.compared()
        assert not comparison.equal
        assert all(finding.of == len(comparison.differences) for finding in comparison.diagnoses)
        return {one.mistakes: len(one.tensors) for one in comparison.diagnoses}

    def explains_all(self, *mistakes):
        comparison = self.compared()
        (finding,) = comparison.diagnoses
        assert finding.mistakes == tuple(sorted(mistakes))
        assert set(finding.tensors) == {one.name for one in comparison.differences}
        assert finding.advice
        return finding


@pytest.fixture
def pair(weights_of, tmp_path):
    return lambda name: Pair(weights_of(name), tmp_path)


def swap_gate_and_up(pair):
    for name in pair.names("gate_proj"):
        other = name.replace("gate_proj", "up_proj")
        pair.state[name], pair.state[other] = pair.state[other], pair.state[name]


def heads_of(pair):
    config = pair.weights.config
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    return heads, groups, config.get("head_dim") or config["hidden_size"] // heads


def change_qkv(pair, function, kind="weight"):
    """Replace query, key and value of every layer by what a function makes of them."""
    for name in pair.names(rf"q_proj\.{kind}"):
        names = [name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
        for one, tensor in zip(names, function(*(pair.state[n] for n in names)), strict=True):
            pair.state[one] = tensor


def megatron(query, key, value, heads, groups, size):
    """Fuse group by group, as Megatron's SelfAttention splits its ``mixed_qkv``."""
    rest = query.shape[1:]
    parts = [
        query.reshape(groups, heads // groups * size, *rest),
        key.reshape(groups, size, *rest),
        value.reshape(groups, size, *rest),
    ]
    return torch.cat(parts, dim=1).reshape(-1, *rest)


def unfuse_megatron(fused, heads, groups, size):
    each = heads // groups * size
    grouped = fused.reshape(groups, each + 2 * size, *fused.shape[1:])
    parts = grouped.split([each, size, size], dim=1)
    return [part.reshape(-1, *fused.shape[1:]) for part in parts]


def meta_rotary(weight, size):
    """Half-split rows to interleaved ones: the inverse of ``permute`` in transformers' script."""
    heads = weight.shape[0] // size
    halves = weight.reshape(heads, 2, size // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("model", ["llama", "square"])
def test_gate_and_up(pair, model):
    pair = pair(model)
    swap_gate_and_up(pair)
    pair.explains_all("gate-up-exchanged")


@pytest.mark.parametrize("model", ["llama", "square", "qwen2"])
def test_plain_qkv_read_as_groups(pair, model):
    pair = pair(model)
    sizes = heads_of(pair)

    def wrong(query, key, value):
        return unfuse_megatron(torch.cat([query, key, value]), *sizes)

    change_qkv(pair, wrong)
    if model == "qwen2":
        change_qkv(pair, wrong, "bias")
    assert "were read as" in pair.explains_all("qkv-order").details[0]


def test_groups_read_as_plain_qkv(pair):
    pair = pair("llama")
    heads, groups, size = heads_of(pair)
    change_qkv(
        pair,
        lambda q, k, v: megatron(q, k, v, heads, groups, size).split(
            [heads * size, groups * size, groups * size]
        ),
    )
    (said,) = pair.explains_all("qkv-order").details
    assert said.startswith("rows that lie query group by query group (Megatron) were read as all")


def test_plain_qkv_of_each_rank_read_as_groups(pair):
    pair = pair("llama")
    heads, groups, size = heads_of(pair)

    def wrong(query, key, value):
        ranks = zip(*(part.chunk(2) for part in (query, key, value)), strict=True)
        return unfuse_megatron(torch.cat([torch.cat(rank) for rank in ranks]), heads, groups, size)

    change_qkv(pair, wrong)
    assert "2 tensor-parallel ranks" in pair.explains_all("qkv-order").details[0]


@pytest.mark.parametrize("version", [0, 1])
def test_order_of_another_checkpoint_version(pair, version):
    pair = pair("square")
    heads, groups, size = heads_of(pair)

    def wrong(query, key, value):
        each = [part.reshape(heads, size, -1) for part in (query, key, value)]
        stacked = torch.stack(each, 0 if version == 0 else 2)  # [3, h, s] or [h, s, 3]
        return unfuse_megatron(stacked.reshape(-1, query.shape[1]), heads, groups, size)

    change_qkv(pair, wrong)
    assert f"checkpoint_version {version}" in pair.explains_all("qkv-order").details[0]


def test_key_and_value_exchanged(pair):
    pair = pair("llama")
    change_qkv(pair, lambda q, k, v: (q, v, k))
    pair.explains_all("qkv-exchanged")


def test_query_heads_dealt_out_in_turn(pair):
    pair = pair("llama")
    heads, groups, size = heads_of(pair)
    pair.change(
        "q_proj",
        lambda q: q.reshape(heads // groups, groups, size, -1).transpose(0, 1).reshape(q.shape),
    )
    pair.explains_all("query-groups")


@pytest.mark.parametrize("model", ["llama", "square", "qwen3"])
@pytest.mark.parametrize("which", ["[qk]_proj", "k_proj"])
def test_rotary(pair, model, which):
    pair = pair(model)
    size = heads_of(pair)[2]
    pair.change(which, lambda weight: meta_rotary(weight, size))
    if model == "qwen3":
        pair.change("[qk]_norm", lambda weight: meta_rotary(weight, size))
    (said, *_) = pair.explains_all("rotary-order").details
    assert "halves of A are neighbouring rows of B" in said


def test_rotary_of_latent_attention(pair):
    """Only the rows behind those without position rotate, of queries and of the shared key."""
    pair = pair("deepseek_v3")
    size = 8

    def query(weight):
        heads = weight.reshape(8, 16 + size, -1).clone()
        turned = meta_rotary(heads[:, 16:].reshape(8 * size, -1), size)
        heads[:, 16:] = turned.reshape(8, size, -1)
        return heads.reshape(weight.shape)

    pair.change("q_b_proj", query)
    pair.change("kv_a_proj", lambda w: torch.cat([w[:24], meta_rotary(w[24:], size)]))
    assert len(pair.explains_all("rotary-order").tensors) == 2


@pytest.mark.parametrize("which", ["o_proj", "gate_proj", "(gate|up|down)_proj", "q_proj"])
@pytest.mark.parametrize("model", ["llama", "square"])
def test_transposed(pair, model, which):
    pair = pair(model)
    pair.change(which, lambda weight: weight.T)
    finding = pair.explains_all("transposed")
    parts = 3 if "|" in which else 1
    assert len(finding.tensors) == parts * pair.weights.config["num_hidden_layers"]


@pytest.mark.parametrize("which", ["w[123]", "(w[123]|gate)"])
def test_experts_in_string_order(pair, which):
    pair = pair("mixtral")
    before = pair.weights.copy()
    order = sorted(range(12), key=str)
    for layer in range(2):
        stem = f"model.layers.{layer}.block_sparse_moe."
        for number, other in enumerate(order):
            for part in ("w1", "w2", "w3"):
                name = f"{stem}experts.{{}}.{part}.weight"
                pair.state[name.format(number)] = before[name.format(other)]
        if "gate" in which:
            pair.state[f"{stem}gate.weight"] = before[f"{stem}gate.weight"][order]
    (said,) = pair.explains_all("expert-order").details
    assert said == "experts of B are in the order of strings (0, 1, 10, 11, ...)"


def renumber(pair, order):
    before = dict(pair.state)
    for name in pair.names(r"layers\.\d+\."):
        number = int(re.search(r"layers\.(\d+)\.", name)[1])
        pair.state[name] = before[name.replace(f"layers.{number}.", f"layers.{order[number]}.")]


@pytest.mark.parametrize(
    ("order", "said"),
    [
        (sorted(range(12), key=str), "layers of B are in the order of strings"),
        ([*range(3, 12), 0, 1, 2], "layer i of B is layer i + 3 of A, the last ones come first"),
        ([*range(6), *range(7, 12), 6], "layer 6 of B is layer 7 of A"),
        # Two stages of two chunks each, taken stage by stage.
        ([0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11], "blocks of 3 layers are grouped by 2"),
    ],
)
def test_layers_in_another_order(pair, order, said):
    pair = pair("deep")
    renumber(pair, order)
    assert said in pair.explains_all("layer-order").details[0]


@pytest.mark.parametrize("axis", [0, 1])
def test_shards_joined_along_the_wrong_axis(pair, axis):
    pair = pair("llama")
    which = "gate_proj|up_proj" if axis == 0 else "o_proj|down_proj"
    pair.change(which, lambda weight: torch.cat(weight.chunk(4, axis), 1 - axis))
    (said,) = pair.explains_all("shards-on-wrong-axis").details
    assert said.startswith("4 shards of " + ("rows" if axis == 0 else "columns"))


def test_shards_of_columns_one_after_another(pair):
    pair = pair("square")
    pair.change(
        "o_proj",
        lambda weight: torch.cat([one.flatten() for one in weight.chunk(2, 1)]).view(weight.shape),
    )
    (said,) = pair.explains_all("shards-on-wrong-axis").details
    assert "2 ranks" in said


def test_gate_and_up_of_ranks_joined_as_they_stand(pair):
    pair = pair("llama")
    for name in pair.names("gate_proj"):
        other = name.replace("gate_proj", "up_proj")
        ranks = zip(pair.state[name].chunk(4), pair.state[other].chunk(4), strict=True)
        fused = torch.cat([torch.cat(rank) for rank in ranks])
        pair.state[name], pair.state[other] = fused.chunk(2)
    (said,) = pair.explains_all("gate-up-ranks").details
    assert said == "4 ranks, joined as they stand, were read as one"


def test_ranks_in_string_order(pair):
    pair = pair("llama")
    order = sorted(range(16), key=str)
    pair.change("gate_proj|up_proj", lambda w: torch.cat([w.chunk(16)[n] for n in order]))
    pair.change("down_proj|o_proj", lambda w: torch.cat([w.chunk(16, 1)[n] for n in order], 1))
    finding = pair.explains_all("rank-order")
    assert all("ranks of B are in the order of strings" in said for said in finding.details)


@pytest.mark.parametrize("kept", ["A", "B"])
def test_rows_of_padding(pair, kept):
    pair = pair("llama")
    state = pair.state if kept == "B" else pair.a_state
    for name in pair.names("embed_tokens|lm_head"):
        state[name] = torch.cat([state[name], state[name][-1:].expand(28, -1)])
    (pair.config if kept == "B" else pair.a_config)["vocab_size"] = 128
    (said,) = pair.explains_all("vocabulary-padding").details
    assert said == f"{kept} has 28 rows more, behind the 100 that both have"


@pytest.mark.parametrize("side", ["A", "B"])
def test_head_overwritten_by_the_embedding(pair, side):
    pair = pair("llama")
    state = pair.state if side == "B" else pair.a_state
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    (said,) = pair.explains_all("head-overwritten").details
    other = "A" if side == "B" else "B"
    assert said == f"the output layer of {side} is the embedding of {other}"


def test_head_that_one_side_ties(pair):
    pair = pair("llama")
    del pair.state["lm_head.weight"]
    pair.config["tie_word_embeddings"] = True
    (said,) = pair.explains_all("head-tied").details
    assert "that of A is another, and is lost" in said


@pytest.mark.parametrize("step", [1, -1])
def test_norms_off_by_one(pair, step):
    pair = pair("llama")
    pair.change("norm", lambda weight: weight + step)
    (said,) = pair.explains_all("norm-off-by-one").details
    less, more = "BA" if step < 0 else "AB"
    assert said == f"the values of {less} are those of {more} less one"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("back", [False, True])
def test_rounding(pair, dtype, back):
    pair = pair("llama")
    pair.change("", lambda weight: weight.to(getattr(torch, dtype)))
    if back:
        pair.change("", lambda weight: weight.float())
    finding = pair.explains_all("rounding")
    assert finding.rounding == dtype


def test_rounded_twice(pair):
    pair = pair("llama")
    pair.change("", lambda weight: weight.bfloat16())
    pair.a_state = {name: weight.half() for name, weight in pair.a_state.items()}
    assert pair.explains_all("rounding").rounding == "float16 and bfloat16"


def test_another_dtype_of_equal_values(pair):
    pair = pair("llama")
    pair.a_state = {name: weight.bfloat16() for name, weight in pair.a_state.items()}
    pair.state = {name: weight.float() for name, weight in pair.a_state.items()}
    assert pair.explains_all("dtype").rounding == ""


def test_truncated(pair):
    pair = pair("llama")
    pair.change("", lambda w: (w.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16))
    assert "cut off" in pair.explains_all("rounding").details[0]


@pytest.mark.parametrize("value", [0.0, float("nan"), 1.0])
def test_never_filled(pair, value):
    pair = pair("llama")
    pair.change(r"layers\.2.*(norm|_proj)", lambda weight: torch.full_like(weight, value))
    name = {0.0: "zeros", 1.0: "constant"}.get(value, "not-a-number")
    pair.explains_all(name)


def test_zeros_of_one_rank(pair):
    pair = pair("llama")
    for name in pair.names("up_proj"):
        pair.state[name][48:] = 0
    pair.explains_all("zeros")


def test_one_tensor_written_over_another(pair):
    pair = pair("llama")
    for name in pair.names("gate_proj"):
        pair.state[name] = pair.state[name.replace("gate_proj", "up_proj")].clone()
    pair.explains_all("another-tensor")


class TestTwoAtOnce:
    def test_in_different_tensors(self, pair):
        pair = pair("llama")
        swap_gate_and_up(pair)
        pair.change("[qk]_proj", lambda weight: meta_rotary(weight, 8))
        assert pair.found() == {("gate-up-exchanged",): 6, ("rotary-order",): 3}

    @pytest.mark.parametrize("model", ["llama", "square"])
    def test_rotary_in_the_wrong_order_of_rows(self, pair, model):
        pair = pair(model)
        sizes = heads_of(pair)
        pair.change("[qk]_proj", lambda weight: meta_rotary(weight, sizes[2]))
        change_qkv(pair, lambda *parts: unfuse_megatron(torch.cat(parts), *sizes))
        pair.explains_all("qkv-order", "rotary-order")

    def test_layers_with_gate_and_up(self, pair):
        pair = pair("deep")
        swap_gate_and_up(pair)
        renumber(pair, [*range(3, 12), 0, 1, 2])
        found = pair.found()
        assert found.pop(("gate-up-exchanged", "layer-order")) == 24
        assert found == {("layer-order",): 5 * 12}

    def test_experts_with_gate_and_up(self, pair):
        pair = pair("mixtral")
        before = pair.weights.copy()
        exchanged = {"w1": "w3", "w3": "w1", "w2": "w2"}
        for name in pair.names("experts"):
            number, part = re.search(r"experts\.(\d+)\.(w\d)", name).groups()
            other = f"experts.{sorted(range(12), key=str)[int(number)]}.{exchanged[part]}"
            pair.state[name] = before[name.replace(f"experts.{number}.{part}", other)]
        assert pair.found() == {
            ("expert-order", "gate-up-exchanged"): 4,
            ("expert-order",): 2,
        }

    def test_rounding_and_rotary(self, pair):
        pair = pair("llama")
        pair.change("[qk]_proj", lambda weight: meta_rotary(weight, 8))
        pair.change("", lambda weight: weight.bfloat16())
        found = pair.found()
        assert found.pop(("rotary-order", "rounding")) == 3
        assert list(found) == [("rounding",)]

    def test_padding_and_rounding(self, pair):
        pair = pair("llama")
        for name in pair.names("embed_tokens|lm_head"):
            pair.state[name] = torch.cat([pair.state[name], torch.zeros(28, 64)])
        pair.config["vocab_size"] = 128
        pair.change("", lambda weight: weight.bfloat16())
        assert pair.found()["rounding", "vocabulary-padding"] == 2


class TestHonestDifferences:
    def nothing(self, pair):
        comparison = pair.compared()
        assert not comparison.equal
        assert comparison.diagnoses == ()

    @pytest.mark.parametrize("model", ["llama", "square", pytest.param("mixtral", marks=FULL)])
    @pytest.mark.parametrize("step", [pytest.param(1e-2, marks=FULL), 1e-5])
    def test_trained_further(self, pair, model, step):
        pair = pair(model)
        torch.manual_seed(1)
        pair.change("", lambda weight: weight + step * torch.randn_like(weight))
        self.nothing(pair)

    def test_trained_further_in_bfloat16(self, pair):
        pair = pair("llama")
        torch.manual_seed(1)
        pair.a_state = {name: weight.bfloat16() for name, weight in pair.a_state.items()}
        pair.change("", lambda weight: (weight + 0.01 * torch.randn_like(weight)).bfloat16())
        self.nothing(pair)

    def test_low_rank(self, pair):
        pair = pair("llama")
        torch.manual_seed(1)
        pair.change(
            "q_proj|v_proj",
            lambda w: w + torch.randn(w.shape[0], 2) @ torch.randn(2, w.shape[1]) / 100,
        )
        self.nothing(pair)

    def test_one_element(self, pair):
        pair = pair("llama")
        pair["model.layers.2.self_attn.q_proj.weight"][5, 5] += 1e-3
        self.nothing(pair)

    def test_scaled(self, pair):
        pair = pair("square")
        pair.change("down_proj", lambda weight: weight * 2)
        self.nothing(pair)

    @FULL
    def test_another_model(self, pair):
        pair = pair("llama")
        torch.manual_seed(2)
        pair.change("", lambda weight: torch.randn_like(weight))
        self.nothing(pair)

    def test_mistake_with_training_after_it(self, pair):
        pair = pair("llama")
        torch.manual_seed(1)
        swap_gate_and_up(pair)
        pair.change("_proj", lambda weight: weight + 1e-3 * torch.randn_like(weight))
        self.nothing(pair)

    def test_mistake_beside_training(self, pair):
        pair = pair("llama")
        torch.manual_seed(1)
        swap_gate_and_up(pair)
        pair.change("self_attn", lambda weight: weight + 1e-3 * torch.randn_like(weight))
        comparison = pair.compared()
        (finding,) = comparison.diagnoses
        assert (len(finding.tensors), finding.of) == (6, 12)
        assert finding.mistakes == ("gate-up-exchanged",)
