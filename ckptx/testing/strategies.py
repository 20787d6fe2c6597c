"""Hypothesis strategies for the things that plugins meet; needs Hypothesis installed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from ckptx.errors import PlanError
from ckptx.model.pipeline_parallel import Pipeline
from ckptx.tensors.dtypes import ITEMSIZE
from ckptx.testing.models import Arrays, TinyModel, divides, tiny
from ckptx.testing.tagged import tagged

DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def dtypes() -> st.SearchStrategy[str]:
    """Any dtype that ckptx knows."""
    return st.sampled_from(sorted(ITEMSIZE))


def shapes(max_axes: int = 4, max_size: int = 6) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes, those without axes and without elements included."""
    return st.lists(st.integers(0, max_size), max_size=max_axes).map(tuple)


@st.composite
def state_dicts(draw: st.DrawFn, dtypes: st.SearchStrategy[str] | None = None) -> Arrays:
    """Tagged tensors of any shape under dotted names."""
    names = draw(st.lists(st.from_regex(r"[a-z]{1,4}(\.[a-z0-9]{1,3}){0,3}", fullmatch=True),
                          min_size=1, max_size=6, unique=True))  # fmt: skip
    kinds = dtypes or st.sampled_from(DTYPES)
    found = {name: tagged(name, draw(kinds), draw(shapes())) for name in names}
    found["always"] = tagged("always", draw(kinds), (2, 3))
    return found


@st.composite
def models(draw: st.DrawFn, max_layers: int = 6) -> TinyModel:
    """Models of the Llama-like families; heads come in whole groups, everything else is free."""
    groups = draw(st.sampled_from([1, 2, 3, 4]))
    family = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    changes: dict[str, Any] = {
        "num_layers": draw(st.integers(1, max_layers)),
        "hidden_size": draw(st.integers(1, 6)),
        "ffn_hidden_size": draw(st.sampled_from([4, 8, 12, 24])),
        "num_query_groups": groups,
        "num_attention_heads": groups * draw(st.sampled_from([1, 2, 4])),
        "kv_channels": draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(1, 20)),
        "tied": draw(st.booleans()),
        "dtype": draw(st.sampled_from(["bfloat16", "float32", "float16"])),
    }
    if family == "llama":
        changes["add_bias_linear"] = draw(st.booleans())
    return tiny(family, **changes)


def tensor_parallel_sizes(model: TinyModel, largest: int = 8) -> st.SearchStrategy[int]:
    """The tensor-parallel sizes that Megatron allows for a model."""
    return st.sampled_from([tp for tp in range(1, largest + 1) if divides(model.spec, tp)])


@st.composite
def pipelines(draw: st.DrawFn, num_layers: int, largest: int = 4) -> Pipeline:
    """Pipeline settings that place every layer: even, uneven, virtual, or spelt out."""
    pp = draw(st.integers(1, min(largest, num_layers)))
    ends = st.none() | st.integers(1, num_layers)
    vpp = st.sampled_from([None, 1, 2])
    kinds = st.one_of(
        st.builds(Pipeline, st.just(pp), vpp if pp > 1 else st.none()),
        st.builds(Pipeline, st.just(pp), st.none(), ends, ends),
        st.builds(
            Pipeline, st.just(pp), embedding_in_split=st.booleans(), loss_in_split=st.booleans()
        ),
        st.builds(Pipeline, st.just(pp), layout=_layouts(num_layers, pp)),
    )
    return draw(kinds.filter(lambda pipeline: _places(pipeline, num_layers)))


@st.composite
def _layouts(draw: st.DrawFn, num_layers: int, pp: int) -> str:
    cuts = draw(st.lists(st.integers(0, num_layers), min_size=pp - 1, max_size=pp - 1))
    edges = [0, *sorted(cuts), num_layers]
    stages = ["t" * (stop - start) for start, stop in pairwise(edges)]
    return "|".join(["E" * (n == 0) + s + "L" * (n == pp - 1) for n, s in enumerate(stages)])


def _places(pipeline: Pipeline, num_layers: int) -> bool:
    try:
        pipeline.chunks(num_layers)
    except PlanError:
        return False
    return True
