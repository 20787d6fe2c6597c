"""What a Megatron-style module is told of a mixture of experts, and what its own words mean."""

from __future__ import annotations

import pytest

from ckptx.conversion.megatron_queue import metadata_of, spec_of
from ckptx.model.canonical_names import check_shapes
from ckptx.protocol.messages import Tensors
from ckptx.testing.models import messages, tiny

pytest.importorskip("torch")


def test_a_mixture_is_told_and_understood(tmp_path):
    begin, *rest = messages(tiny("mixtral"), tmp_path)
    metadata = metadata_of(begin, "GPT")
    assert metadata.num_experts == metadata.checkpoint_args.num_experts == 4
    assert metadata.checkpoint_args.moe_ffn_hidden_size == 40
    sent = [message for message in rest if isinstance(message, Tensors)]
    spec = spec_of(metadata, sent)
    assert (spec.family, spec.architecture) == ("mixtral", "MixtralForCausalLM")
    assert (spec.num_experts, spec.moe_ffn_hidden_size, spec.moe_router_topk) == (4, 40, 2)
    for message in sent:
        check_shapes(message.name, message.tensors, spec)


def test_a_mixture_with_norms_on_queries_is_of_no_known_family(tmp_path):
    begin, *rest = messages(tiny("qwen3_moe"), tmp_path)
    sent = [message for message in rest if isinstance(message, Tensors)]
    spec = spec_of(metadata_of(begin, "GPT"), sent)
    assert (spec.family, spec.num_experts, spec.moe_ffn_hidden_size) == ("", 4, 24)


def test_a_dense_model_has_no_experts(tmp_path):
    begin, *rest = messages(tiny("llama"), tmp_path)
    metadata = metadata_of(begin, "GPT")
    assert metadata.num_experts == 0
    assert spec_of(metadata, [m for m in rest if isinstance(m, Tensors)]).num_experts is None
