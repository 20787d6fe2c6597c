"""The newest megatron-core beside the installed one: it reads what we write, and we what it writes.

A few cases stand for those that run with the installed release.
"""

from __future__ import annotations

import pytest

from tests.oracles import mcore
from tests.oracles.mcore import Layout
from tests.oracles.mcore_versions import NEWEST, place

from .conversion import CLOSE, convert, difference, sizes, strict_logits

pytestmark = pytest.mark.skipif(place(NEWEST) is None, reason=f"no megatron-core {NEWEST} here")
CASES = {"llama": Layout(tp=2, pp=2), "mixtral": Layout(ep=2)}


@pytest.mark.parametrize("family", CASES)
def test_it_loads_what_we_write(family, source_of, tmp_path):
    source, layout = source_of(family), CASES[family]
    convert(source.directory, tmp_path / "core", "core", **sizes(layout))
    model = source.megatron("te", layout)
    found = mcore.read(model, layout, tmp_path / "core", source.tokens, version=NEWEST)
    assert difference(found[..., : source.config.vocab_size], source.logits) <= CLOSE


@pytest.mark.parametrize("family", CASES)
def test_we_read_what_it_writes(family, source_of, tmp_path):
    source, layout = source_of(family), CASES[family]
    expected = mcore.write(
        *(source.megatron("te", layout), layout, tmp_path / "core", source.tokens),
        args={"vocab_size": source.config.vocab_size},
        version=NEWEST,
    )
    convert(tmp_path / "core", tmp_path / "hf", "hf")
    found = strict_logits(tmp_path / "hf", source.tokens)
    assert difference(found, expected[..., : source.config.vocab_size]) <= CLOSE
