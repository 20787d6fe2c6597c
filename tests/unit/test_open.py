"""One way to open a checkpoint."""

from __future__ import annotations

import ast
from pathlib import Path
from types import MappingProxyType

import pytest

from ckptx.errors import PluginError
from ckptx.protocol.contracts import ADAPTERS, ANYTHING
from ckptx.protocol.messages import Begin, End
from ckptx.registry.open import checkpoint_messages, open_checkpoint

ROOT = Path(__file__).resolve().parents[2]
NOT_LOADERS = ("megatron_side.py", "alternatives.py")
"""What calls Megatron's own ``load``, and a loader that hands on to one of several."""


def test_product_code_calls_a_loader_in_one_place():
    places = [
        f"{path.relative_to(ROOT)}"
        for path in sorted((ROOT / "ckptx").rglob("*.py"))
        if path.name not in NOT_LOADERS and "plugins" not in path.relative_to(ROOT).parts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "load"
        and len(node.args) == 2
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

    def load(self, source, options):
        self.told = options
        yield from self.messages


BEGIN = Begin(format="told", layout="hf", parts={}, files=(), sources=(), root="/")


def test_a_loader_is_told_what_is_wanted_and_not_by_whom(tmp_path):
    loader = Told(BEGIN, End())
    with open_checkpoint(tmp_path, loader, options={"container": "model"}):
        pass
    assert loader.told["wants"] == ANYTHING
    list(checkpoint_messages(tmp_path, loader, wants=ADAPTERS))
    assert loader.told.keys() == {"wants", "spool"}
    assert loader.told["wants"] == ADAPTERS


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
