"""Megatron Core's own checkpoints, cut anew: it computes there what it computed before."""

from __future__ import annotations

import pytest
import torch

from tests.oracles import mcore
from tests.oracles.mcore import Layout

from .conversion import CLOSE, LAYOUTS, convert, difference, sizes

FORMATS = ("torch_dist", "torch")
NAMES = list(LAYOUTS)
# A ring through the layouts, with all pairs of forms; the rest is for the full suite.
RING = {
    (here, there, FORMATS[number % 2], FORMATS[number // 2 % 2])
    for number, (here, there) in enumerate(zip(NAMES, NAMES[4:] + NAMES[:4], strict=True))
}
MOVES = [
    pytest.param(*move, marks=[] if move in RING else [pytest.mark.full])
    for here in NAMES
    for there in NAMES
    for move in ((here, there, old, new) for old in FORMATS for new in FORMATS)
]


@pytest.mark.parametrize(("here", "there", "old", "new"), MOVES)
def test_same_logits_at_the_new_layout(here, there, old, new, source_of, tmp_path):
    # Tied where the number of stages is even: a copy of the embeddings on the last of them.
    source = source_of("qwen2-tied" if LAYOUTS[here].pp % 2 == 0 else "llama-2groups")
    spec = "local" if here < there else "te"
    before, after = LAYOUTS[here], LAYOUTS[there]
    expected = mcore.write(
        source.megatron(spec, before),
        before,
        tmp_path / "old",
        source.tokens,
        format=old,
        args={"vocab_size": 131},
    )
    impl = "local" if spec == "local" else "transformer_engine"
    convert(
        tmp_path / "old",
        tmp_path / "new",
        "core",
        ckpt_format=new,
        saver_transformer_impl=impl,
        **sizes(after),
    )
    model = source.megatron(spec, after)
    found = mcore.read(model, after, tmp_path / "new", source.tokens, format=new)
    assert difference(found[..., :131], expected[..., :131]) <= CLOSE
    # An iteration stays the iteration it was.
    assert (tmp_path / "new" / "latest_checkpointed_iteration.txt").read_text().strip() == "10"


@pytest.mark.parametrize("format", FORMATS)
def test_parallel_sizes_stay_if_nothing_is_said(format, source_of, tmp_path):
    source, layout = source_of("llama"), LAYOUTS["pp2-vpp2"]
    model = source.megatron("te", layout)
    expected = mcore.write(model, layout, tmp_path / "old", source.tokens, format=format)
    convert(tmp_path / "old", tmp_path / "new", "core", ckpt_format=format)
    found = mcore.read(None, layout, tmp_path / "new", source.tokens, format=format)
    assert difference(found, expected) == 0


def test_our_ranks_hold_what_megatrons_hold(source_of, tmp_path):
    """Megatron writes the same model at two layouts; cutting the first anew gives the second."""
    source, layout = source_of("qwen3-tied"), LAYOUTS["tp2-pp2"]
    for name, where in (("whole", Layout()), ("theirs", layout)):
        model = source.megatron("te", layout)
        mcore.write(model, where, tmp_path / name, source.tokens, format="torch")
    convert(tmp_path / "whole", tmp_path / "ours", "core", ckpt_format="torch", **sizes(layout))
    files = sorted((tmp_path / "theirs").rglob("*.pt"))
    assert len(files) == 4
    for file in files:
        here = tmp_path / "ours" / file.relative_to(tmp_path / "theirs")
        theirs, ours = (torch.load(f, weights_only=False)["model"] for f in (file, here))
        assert sorted(ours) == sorted(theirs)
        for name, tensor in theirs.items():
            if tensor is None:
                assert ours[name] is None
            else:
                assert torch.equal(ours[name], tensor)
                assert ours[name].dtype == tensor.dtype
