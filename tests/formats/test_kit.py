"""The kit itself: plugins with one mistake each must fail it, and faults must be noticed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptx.errors import CkptxError, ConversionError
from ckptx.protocol.messages import PASSTHROUGH, End, Message, Tensors
from ckptx.registry import registry
from ckptx.tensors.dtypes import ITEMSIZE
from ckptx.testing import faults, strategies
from ckptx.testing.contracts import Checkpoint, LoaderTests, SaverTests, assert_equal_arrays
from ckptx.testing.conversion import loaded_by_name, save
from ckptx.testing.models import SQUARE, messages, passthrough_messages, tiny, write_hf
from ckptx.testing.tagged import assert_same, bits, tagged

HF = registry.loader("hf")
TWELVE = tiny(num_layers=12)


class Mistaken:
    """The Hugging Face loader with a mistake in its messages."""

    name = "hf"

    def __init__(self, mistake: Callable[[list[Message]], Iterable[Message]]) -> None:
        self.mistake = mistake
        self.detect = HF.detect
        self.options = HF.options

    def load(self, source, options, context):
        yield from self.mistake(list(HF.load(source, options, context)))


def _each(change):
    def changed(sent):
        return [
            replace(m, tensors=change(m.name, dict(m.tensors))) if isinstance(m, Tensors) else m
            for m in sent
        ]

    return changed


def _gate_for_up(name, tensors):
    if "mlp l0 weight W" in tensors:
        gate, up = tensors["mlp l0 weight W"], tensors["mlp l0 weight V"]
        tensors |= {"mlp l0 weight W": up, "mlp l0 weight V": gate}
    return tensors


def _transposed(name, tensors):
    if "dense weight" in tensors:
        tensors["dense weight"] = tensors["dense weight"].permute((1, 0))
    return tensors


def _plain_qkv(name, tensors):
    if "qkv weight" in tensors:
        fused = tensors["qkv weight"].split(0, 4)
        tensors["qkv weight"] = fused.split(0, 3).permute((1, 0, 2, 3)).merge(0).merge(0)
    return tensors


def _string_order(sent):
    layers = [m for m in sent if isinstance(m, Tensors) and m.name.startswith("transformer")]
    ordered = sorted(layers, key=lambda m: m.name)
    renamed = {m.name: replace(o, name=m.name) for m, o in zip(layers, ordered, strict=True)}
    return [renamed.get(getattr(m, "name", ""), m) for m in sent]


def _lost(sent):
    return [m for m in sent if getattr(m, "name", "") != "final norm"]


def _undeclared(sent):
    return [replace(sent[0], sources=sent[0].sources[1:]), *sent[1:]]


def _twice(sent):
    return [*sent[:-1], sent[-2], sent[-1]]


def _unknown_key(name, tensors):
    return {f"my {key}": tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("mistake", "test"),
    [
        (_each(_gate_for_up), "test_finds_every_value"),
        (_each(_transposed), "test_finds_every_value"),
        (_each(_plain_qkv), "test_finds_every_value"),
        (_string_order, "test_finds_every_value"),
        (_lost, "test_finds_every_value"),
        (_lost, "test_declares_every_source"),
        (_undeclared, "test_declares_every_source"),
        (_twice, "test_sends_begin_tensors_end"),
        (lambda sent: sent[:-1], "test_sends_begin_tensors_end"),
        (lambda sent: [*sent[1:], sent[0]], "test_sends_begin_tensors_end"),
        (_each(_unknown_key), "test_speaks_the_vocabulary"),
    ],
)
def test_a_mistaken_loader_fails(mistake, test, tmp_path):
    model = TWELVE if mistake is _string_order else SQUARE

    class Tests(LoaderTests):
        loader = Mistaken(mistake)

        def write(self, directory: Path, model) -> Checkpoint:
            return Checkpoint(write_hf(directory, model), model.canonical())

    with pytest.raises((AssertionError, CkptxError)):
        getattr(Tests(), test)(model, tmp_path)


class Forgetful:
    """The Hugging Face saver, except that it leaves out what it does not know."""

    name = "hf"

    def plan(self, messages, options, context):
        known = _each(lambda name, keys: {k: t for k, t in keys.items() if "mystery" not in k})
        return registry.saver("hf").plan(iter(known(list(messages))), options, context)


def test_a_saver_that_drops_what_it_does_not_know_fails(tmp_path):
    class Tests(SaverTests):
        loader, saver = HF, Forgetful()

    def with_mystery(sent):
        layer = sent[2]
        norm = layer.tensors["input norm weight"]
        return [*sent[:2], Tensors(layer.name, {**layer.tensors, "mystery": norm}), *sent[3:]]

    with pytest.raises(pytest.fail.Exception):
        Tests().test_refuses(with_mystery, tmp_path)


@given(strategies.dtypes(), st.integers(1, 300))
def test_tags_are_distinct_as_far_as_their_bits_reach(dtype, size):
    tags = bits(tagged("a", dtype, (size,)))
    assert tags.itemsize == ITEMSIZE[dtype]
    if dtype != "bool":
        assert len(np.unique(tags[:256])) == min(size, 256)


def test_the_message_says_where_a_wrong_element_belongs():
    one, other = (tagged(name, "float32", (3, 3)) for name in ("one", "other"))
    found = one.copy()
    found[1, 2] = other[2, 0]
    with pytest.raises(AssertionError, match=r"first at \[1, 2\].*belongs to other\[2, 0\]"):
        assert_same(found, one, "one", {"other": other})


def test_a_disk_that_fails_while_tensors_are_read_is_an_error(tmp_path):
    sent = messages(SQUARE, tmp_path / "s")
    with faults.failing_reads(after=1000), pytest.raises(ConversionError, match="cannot be read"):
        save(registry.saver("hf"), sent, tmp_path / "t", {})


def test_a_flipped_bit_arrives_flipped(tmp_path):
    path = write_hf(tmp_path, SQUARE) / "model.safetensors"
    before = path.read_bytes()
    faults.flip(path, -1, mask=1)
    assert path.read_bytes() == before[:-1] + bytes([before[-1] ^ 1])


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(arrays=strategies.state_dicts(), name=st.sampled_from(["hf", "pytorch"]))
def test_any_tensors_pass_through(arrays, name, tmp_path_factory):
    directory = tmp_path_factory.mktemp("any")
    sent = passthrough_messages(arrays, directory / "s")
    assert isinstance(sent[-1], End)
    target = save(registry.saver(name), sent, directory / "t", {})
    assert_equal_arrays(loaded_by_name(registry.loader(name), target), arrays, PASSTHROUGH)
