"""Placement of layers on pipeline stages, against Megatron Core's own functions and by hand."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from ckptx.errors import PlanError
from ckptx.model.pipeline_parallel import Chunk, Pipeline, describe, stage_ranks
from ckptx.model.sharding import Rank


def layers(pipeline: Pipeline, num_layers: int) -> dict[tuple[int, int], list[int]]:
    return {(c.pp_rank, c.vpp_rank): list(c.layers) for c in pipeline.chunks(num_layers)}


@pytest.mark.parametrize(
    ("pipeline", "num_layers", "expected"),
    [
        (Pipeline(), 3, {(0, 0): [0, 1, 2]}),
        (Pipeline(2), 4, {(0, 0): [0, 1], (1, 0): [2, 3]}),
        (Pipeline(2, vpp=2), 4, {(0, 0): [0], (1, 0): [1], (0, 1): [2], (1, 1): [3]}),
        (Pipeline(2, first=2), 5, {(0, 0): [0, 1], (1, 0): [2, 3, 4]}),
        (Pipeline(3, last=1), 5, {(0, 0): [0, 1], (1, 0): [2, 3], (2, 0): [4]}),
        (Pipeline(3, first=1, last=2), 6, {(0, 0): [0], (1, 0): [1, 2, 3], (2, 0): [4, 5]}),
        (
            Pipeline(2, vpp=2, first=2),
            6,
            {(0, 0): [0], (1, 0): [1, 2], (0, 1): [3], (1, 1): [4, 5]},
        ),
        (
            Pipeline(2, embedding_in_split=True, loss_in_split=True),
            4,
            {(0, 0): [0, 1], (1, 0): [2, 3]},
        ),
        (Pipeline(2, embedding_in_split=True), 5, {(0, 0): [0, 1], (1, 0): [2, 3, 4]}),
        (
            Pipeline(2, vpp=2, layout="Et|tt|t|tL"),
            5,
            {(0, 0): [0], (1, 0): [1, 2], (0, 1): [3], (1, 1): [4]},
        ),
        (Pipeline(4, layout="E|t*2,t|(t|)L"), None, None),
        (
            Pipeline(4, layout="E|ttt||L"),
            3,
            {(0, 0): [], (1, 0): [0, 1, 2], (2, 0): [], (3, 0): []},
        ),
    ],
)
def test_layers_are_where_megatron_puts_them(pipeline, num_layers, expected):
    if expected is None:
        with pytest.raises(PlanError, match="unknown letters"):
            pipeline.chunks(3)
    else:
        assert layers(pipeline, num_layers) == expected


def test_the_first_chunk_embeds_and_the_last_has_the_output():
    chunks = Pipeline(2, vpp=2).chunks(4)
    assert [(c.pp_rank, c.vpp_rank) for c in chunks] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [c.embedding for c in chunks] == [True, False, False, False]
    assert [c.output for c in chunks] == [False, False, False, True]
    assert Pipeline().chunks(2) == (Chunk(0, 0, (0, 1), embedding=True, output=True),)
    spread = Pipeline(4, layout="E|t|t|L").chunks(2)
    assert [(c.embedding, c.layers, c.output) for c in spread] == [
        (True, (), False),
        (False, (0,), False),
        (False, (1,), False),
        (False, (), True),
    ]


def test_a_description_names_what_each_stage_holds():
    assert describe(Pipeline(2, layout="E|tL").chunks(1)) == [
        "pp 0: no layers, embeddings",
        "pp 1: layer 0, final norm, output layer",
    ]
    assert describe(Pipeline(2, vpp=2).chunks(8))[2] == "pp 0, vpp 1: layers 4-5"


@pytest.mark.parametrize(
    ("pipeline", "num_layers", "message"),
    [
        (Pipeline(3), 4, "4 layers do not fit pipeline size 3"),
        (Pipeline(2, vpp=2), 6, "do not fit pipeline size 2, virtual size 2"),
        (Pipeline(0), 4, "must be positive"),
        (Pipeline(2, vpp=0), 4, "must be positive"),
        (Pipeline(2, first=9), 4, "do not fit"),
        (Pipeline(2, first=0), 4, "needs a rank and a layer"),
        (Pipeline(1, first=2, last=4), 4, "needs a rank and a layer"),
        (Pipeline(2, first=1, last=1), 4, "do not fit"),
        (Pipeline(4, first=1), 3, "do not fit"),
        (Pipeline(2, vpp=2, first=1), 4, "do not fit"),
        (Pipeline(4, embedding_in_split=True, loss_in_split=True), 4, "do not fit"),
        (Pipeline(2, first=1, loss_in_split=True), 4, "exclude each other"),
        (Pipeline(2, first=1, layout="Et|tL"), 2, "exclude each other"),
        (Pipeline(2, embedding_in_split=True, layout="Et|tL"), 2, "exclude each other"),
        (Pipeline(2, layout="Et|t|tL"), 3, "has 3 stages"),
        (Pipeline(2, vpp=2, layout="Et|tL"), 2, "has 2 stages, 2 x 2"),
        (Pipeline(2, layout="Et|tL"), 3, "places 2 of 3 layers"),
        (Pipeline(2, layout="Et|txL"), 2, "unknown letters x"),
        (Pipeline(2, layout="tE|tL"), 2, "begin with one E"),
        (Pipeline(2, layout="Et|Lt"), 2, "end with one L"),
        (Pipeline(2, layout="EtE|tL"), 2, "one E"),
        (Pipeline(2, layout="t|t"), 2, "one E"),
        (Pipeline(2, layout="Etm|tL"), 2, "after an m"),
        (Pipeline(2, layout="E(t|tL"), 2, r"unknown letters \("),
    ],
)
def test_what_megatron_would_not_build_is_refused(pipeline, num_layers, message):
    with pytest.raises(PlanError, match=message):
        pipeline.chunks(num_layers)


def test_settings_survive_the_args_of_a_checkpoint():
    for pipeline in (
        Pipeline(4, vpp=2, first=2, last=4),
        Pipeline(2, layout="Et|tL"),
        Pipeline(2, embedding_in_split=True, loss_in_split=True),
    ):
        assert Pipeline.from_args(pipeline.to_args()) == pipeline
    assert Pipeline.from_args({}) == Pipeline()
    old = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}
    assert Pipeline.from_args({**old, "num_layers": 4}) == Pipeline(2, vpp=2)


@pytest.mark.parametrize(
    "layout",
    [
        [["embedding", "decoder"], ["decoder", "Loss"]],
        SimpleNamespace(input_data="Et|tL", layout="by rank, which is another order"),
        SimpleNamespace(input_data=[["embedding", "decoder"], ["decoder", "loss"]]),
        [[SimpleNamespace(name="embedding"), SimpleNamespace(name="decoder")], ["decoder", "loss"]],
    ],
)
def test_layouts_in_args_are_read_however_they_are_kept(layout):
    args = {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": layout}
    assert Pipeline.from_args(args) == Pipeline(2, layout="Et|tL")


def test_a_layout_of_another_kind_is_refused():
    with pytest.raises(PlanError, match="cannot read the pipeline layout 7"):
        Pipeline.from_args({"pipeline_model_parallel_layout": 7})


@contextlib.contextmanager
def on_ranks(state, pp: int, vpp: int | None) -> Iterator[None]:
    """Tell Megatron which pipeline it is in, without process groups."""
    state.set_pipeline_model_parallel_world_size(pp)
    state.set_virtual_pipeline_model_parallel_world_size(vpp)
    try:
        yield
    finally:
        state.set_pipeline_model_parallel_rank(None)
        state.set_pipeline_model_parallel_world_size(None)
        state.set_virtual_pipeline_model_parallel_world_size(None)


GRID = [
    *(Pipeline(pp, vpp) for pp in (1, 2, 3, 4) for vpp in ((None, 2, 3) if pp > 1 else (None,))),
    *(
        Pipeline(pp, vpp, first, last)
        for pp, vpp, first, last in itertools.product((2, 3, 4), (None, 2), (None, 2), (None, 4, 2))
        # With no stage in the middle and virtual stages, upstream divides by zero.
        if (first or last) and not (pp == 2 and vpp and first and last)
    ),
    *(
        Pipeline(pp, vpp, embedding_in_split=embedding, loss_in_split=loss)
        for pp, vpp in itertools.product((2, 4), (None, 2))
        for embedding, loss in ((True, False), (False, True), (True, True))
    ),
    *(
        Pipeline(pp, layout=layout)
        for pp, layout in (
            (2, "Et|tt|t|tL"),
            (2, "Et*3|(tt|)*2L"),
            (3, "Ettt,|tt|L"),
            (4, "E|(t|t)*2|L"),
            (4, "E,t|(t*2|)*2,L"),
            (4, "Et|(t|)*6L"),
            (4, "E|t*0t|tt|L"),
            (2, "Et*2*2|L"),
            (2, "E((t)*2)*2|L"),
            (2, "E t|tL"),
        )
    ),
]


@pytest.mark.filterwarnings("ignore")  # deprecations of upstream's own defaults
@pytest.mark.parametrize("pipeline", GRID, ids=str)
def test_chunks_are_those_of_megatron_core(pipeline):
    """Ask upstream for every number of layers; where it refuses, so must we."""
    core = pytest.importorskip("megatron.core")
    from megatron.core import parallel_state as state
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    assert core.__version__
    accepted = 0
    for num_layers in range(1, 25):
        try:
            config = TransformerConfig(
                num_layers=num_layers,
                hidden_size=4,
                num_attention_heads=1,
                pipeline_model_parallel_size=pipeline.pp,
                virtual_pipeline_model_parallel_size=pipeline.vpp,
                num_layers_in_first_pipeline_stage=pipeline.first,
                num_layers_in_last_pipeline_stage=pipeline.last,
                account_for_embedding_in_pipeline_split=pipeline.embedding_in_split,
                account_for_loss_in_pipeline_split=pipeline.loss_in_split,
                pipeline_model_parallel_layout=pipeline.layout,
                pipeline_dtype="bfloat16",
            )
            vpp = config.virtual_pipeline_model_parallel_size
            vpp = None if vpp == 1 else vpp
            expected = {}
            with on_ranks(state, pipeline.pp, vpp):
                for stage, rank in itertools.product(range(vpp or 1), range(pipeline.pp)):
                    state.set_pipeline_model_parallel_rank(rank)
                    number = stage if vpp else None
                    start = get_transformer_layer_offset(config, number)
                    count = get_num_layers_to_build(config, number)
                    if count < 0:
                        raise ValueError("upstream builds it, with a negative number of layers")
                    expected[rank, stage] = list(range(start, start + count))
        except (AssertionError, ValueError):
            with pytest.raises(PlanError):
                pipeline.chunks(num_layers)
        else:
            accepted += 1
            assert layers(pipeline, num_layers) == expected
    assert accepted or set(pipeline.layout or "") & set("( *")


def test_an_expert_rank_follows_from_the_rank_not_from_its_tensor_rank():
    """What Megatron wrote at TP2 EP2 ETP1: tensor rank 0 has expert rank 0, and 1 has 1."""
    assert stage_ranks(2, 2, 1) == [Rank(2, 0, 2, 0, 1, 0), Rank(2, 1, 2, 1, 1, 0)]
    assert stage_ranks(2) == [Rank(2, 0, 1, 0, 2, 0), Rank(2, 1, 1, 0, 2, 1)]


@pytest.mark.parametrize(
    ("tp", "ep", "etp"),
    [
        *[(1, 1, 1), (4, 1, 4), (1, 4, 1), (2, 2, 2), (2, 2, 1), (2, 4, 1), (4, 2, 2)],
        *[(1, 2, 2), (2, 1, 1), (4, 2, 1), (8, 4, 2), (3, 2, 1), (2, 3, 1)],
    ],
)
def test_ranks_are_those_of_megatron_core(tp, ep, etp):
    pytest.importorskip("megatron.core")
    from megatron.core.parallel_state import RankGenerator

    ranks = stage_ranks(tp, ep, etp)
    world, order = len(ranks), "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=tp, ep=1, dp=world // tp, pp=1, cp=1, order=order)
    experts = RankGenerator(tp=etp, ep=ep, dp=world // (etp * ep), pp=1, cp=1, order=order)

    def places(generator, kind):
        groups = generator.get_ranks(kind)
        return {rank: group.index(rank) for group in groups for rank in group}

    wanted = places(dense, "tp"), places(experts, "ep"), places(experts, "tp")
    for number, rank in enumerate(ranks):
        assert (rank.tp, rank.ep, rank.etp) == (tp, ep, etp)
        assert (rank.tp_rank, rank.ep_rank, rank.etp_rank) == tuple(w[number] for w in wanted)
