"""One way to open a checkpoint."""

from __future__ import annotations

import ast
from pathlib import Path
from types import MappingProxyType

import pytest

from ckptx.conversion.engine import make_plan
from ckptx.conversion.request import ConversionRequest
from ckptx.errors import PluginError
from ckptx.protocol.context import ADAPTERS, ANYTHING
from ckptx.protocol.contracts import SavePlan
from ckptx.protocol.messages import Begin, End
from ckptx.protocol.model import collect
from ckptx.registry.open import checkpoint_messages, open_checkpoint

ROOT = Path(__file__).resolve().parents[3]
NOT_LOADERS = ("megatron_side.py", "generation.py", "transformers_side.py")
"""What calls the ``load`` of frameworks."""


def test_product_code_calls_a_loader_in_one_place():
    places = [
        f"{path.relative_to(ROOT)}"
        for path in sorted((ROOT / "ckptx").rglob("*.py"))
        if path.name not in NOT_LOADERS and "plugins" not in path.relative_to(ROOT).parts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "load"
        and len(node.args) == 3
    ]
    assert places == ["ckptx/registry/open.py"]


class Told:
    """A loader that keeps what it was told and sends what it was given."""

    name = "told"
    capabilities = MappingProxyType({})

    def __init__(self, *messages):
        self.messages = messages

    def options(self):
        return []

    def detect(self, source):
        return False

    def load(self, source, options, context):
        self.told = options, context
        yield from self.messages


BEGIN = Begin(format="told", layout="hf", parts={}, files=(), sources=(), root="/")


def test_a_loader_is_told_what_is_wanted_and_not_by_whom(tmp_path):
    loader = Told(BEGIN, End())
    with open_checkpoint(tmp_path, loader, options={"container": "model"}):
        pass
    options, context = loader.told
    assert options == {"container": "model"}
    assert (context.wants, context.hf_base) == (ANYTHING, None)
    base = {"hf_base": str(tmp_path), "container": "model"}
    list(checkpoint_messages(tmp_path, loader, options=base, wants=ADAPTERS))
    options, context = loader.told
    assert options == {"container": "model"}
    assert (context.wants, context.hf_base) == (ADAPTERS, tmp_path)


def test_options_of_a_plugin_change_nothing_that_the_engine_says(tmp_path):
    told = {}

    class Saver:
        name = "told"

        def plan(self, messages, options, context):
            told.update(options=dict(options), context=context)
            return SavePlan([], dropped=tuple(collect(messages).end.dropped))

    request = ConversionRequest(
        "fake", "told", tmp_path, tmp_path / "out", saver_options={"target": "mine", "dtype": "x"}
    )
    make_plan(Saver(), [BEGIN, End()], request.saver_options, request.context())
    assert told["options"] == {"target": "mine", "dtype": "x"}
    assert (told["context"].target, told["context"].dtype) == (tmp_path / "out", None)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ((), "ended without sending End"),
        ((End(),), "sent End, expected Begin"),
        ((BEGIN, BEGIN), "sent Begin, expected Tensors or End"),
        ((BEGIN, End(), End()), "sent End, expected nothing"),
    ],
)
def test_messages_out_of_order_are_refused(messages, error, tmp_path):
    with pytest.raises(PluginError, match=f"loader 'told' {error}"):
        list(checkpoint_messages(tmp_path, Told(*messages)))
