"""The record holds: a dozen entries every day, all of them in the whole grid."""

from __future__ import annotations

import pytest

from .record import check

DOZEN = (
    "files/kit/llama > dist-tp2-pp2",
    "files/kit/llama > torch-tp2-pp2-vpp2 > hf",
    "files/kit/qwen3_moe > ep4-etp2",
    "files/made/trained/verl-fsdp > hf",
    "files/golden/zero3_bf16 > hf",
    "texts/inspect kit/llama --tree",
    "texts/plan kit/llama core --tp 2 --pp 2",
    "texts/verify kit/llama wrong/gate-for-up",
    "help/convert --from hf --to core",
    "help/inspect",
)


def test_a_dozen_entries():
    assert check(DOZEN) == []


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_every_entry():
    assert check() == []
