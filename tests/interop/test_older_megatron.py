"""Releases of megatron-core before 0.15, which look for one more extra state in torch_dist."""

from __future__ import annotations

import pytest

from tests.oracles import mcore
from tests.oracles.mcore import Layout, OracleError
from tests.oracles.mcore_versions import place

from .conversion import CLOSE, convert, difference, sizes

OLD = ("0.14.0", "0.12.3")
CASES = {"llama": Layout(tp=2, pp=2), "mixtral": Layout(ep=2), "deepseek_v2-lite": Layout()}
RELEASES = [
    pytest.param(
        version, marks=pytest.mark.skipif(not place(version), reason=f"no megatron-core {version}")
    )
    for version in OLD
]


def written(source, layout, target, writer):
    convert(source.directory, target, "core", target_writer=writer, **sizes(layout))
    return target


def logits(source, layout, target, **how):
    model = source.megatron("te", layout)
    found = mcore.read(model, layout, target, source.tokens, **how)
    return found[..., : source.config.vocab_size]


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("version", RELEASES)
def test_they_load_what_is_written_for_them(version, family, source_of, tmp_path):
    if (version, family) == ("0.12.3", "deepseek_v2-lite"):
        pytest.skip("YaRN's original length is another field there, which the oracle does not know")
    source, layout = source_of(family), CASES[family]
    core = written(source, layout, tmp_path / "core", "megatron-lm-0.14")
    assert difference(logits(source, layout, core, version=version), source.logits) <= CLOSE
    assert difference(logits(source, layout, core), source.logits) <= CLOSE  # by today's, too


@pytest.mark.parametrize("version", RELEASES)
def test_they_do_not_load_what_is_written_for_later_ones(version, source_of, tmp_path):
    """So the writer has a purpose."""
    source, layout = source_of("llama"), Layout()
    core = written(source, layout, tmp_path / "core", "megatron-lm")
    with pytest.raises(OracleError, match=r"core_attention\._extra_state"):
        logits(source, layout, core, version=version)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_later_ones_find_exactly_what_they_look_for(family, source_of, tmp_path):
    source, layout = source_of(family), CASES[family]
    core = written(source, layout, tmp_path / "core", "megatron-lm")
    found = logits(source, layout, core, strictness="raise_all")
    assert difference(found, source.logits) <= CLOSE
    core = written(source, layout, tmp_path / "older", "megatron-lm-0.14")
    with pytest.raises(OracleError, match=r"core_attention\._extra_state"):
        logits(source, layout, core, strictness="raise_all")
