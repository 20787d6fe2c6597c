"""States of parameters besides the weights: no saver writes one, so none is taken for a weight."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ckptx.conversion.megatron_queue import SendQueue
from ckptx.errors import PlanError
from ckptx.protocol.messages import PASSTHROUGH, Tensors
from ckptx.protocol.model import collect
from ckptx.registry import registry
from ckptx.testing.models import messages, tiny


@pytest.mark.parametrize("beside", [True, False], ids=["beside its weight", "alone"])
@pytest.mark.parametrize("name", ["embeddings", PASSTHROUGH])
def test_momentum_is_never_taken_for_weights(name, beside, tmp_path):
    begin, *sent = messages(tiny("llama"), tmp_path)
    momentum = Tensors(name, sent[0].tensors, state="exp_avg")
    stream = iter([begin, *(sent[:1] if beside else []), momentum, *sent[1:]])
    with pytest.raises(PlanError, match=f"the state 'exp_avg' of '{name}'; savers write 'weight'"):
        collect(stream)


@pytest.mark.parametrize("saver", ["core", "dcp", "hf", "legacy", "meta", "peft", "pytorch"])
def test_every_saver_refuses_another_state(saver, tmp_path):
    begin, first, *rest = messages(tiny("llama"), tmp_path)
    sent = [begin, replace(first, state="master"), *rest]
    with pytest.raises(PlanError, match="the state 'master' of 'embeddings'"):
        registry.saver(saver).plan(iter(sent), {})


def test_megatron_style_savers_get_no_other_state(tmp_path):
    pytest.importorskip("torch")
    begin, first, *rest = messages(tiny("llama"), tmp_path)
    queue = SendQueue("fake", iter([begin, replace(first, state="master"), *rest]), "GPT", print)
    queue.get()
    with pytest.raises(PlanError, match="the state 'master' of 'embeddings'"):
        queue.get()
