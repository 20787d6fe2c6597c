"""What the checkpoints of this directory hold; PROVENANCE.md says who wrote them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

BRIDGE = "bridge-0.3.1"
VERSIONS = ("0.12.3", "0.14.0", "0.15.3", "0.19.2")

DENSE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 2,
    "ffn_hidden_size": 12,
    "vocab_size": 32,
}
MIXTURE: dict[str, Any] = {
    "num_moe_experts": 2,
    "moe_ffn_hidden_size": 6,
    "ffn_hidden_size": 6,
    "moe_router_topk": 2,
}


@dataclass(frozen=True)
class Case:
    """One checkpoint of every release."""

    format: Literal["torch_dist", "torch"] = "torch_dist"
    mixture: bool = False
    tp: int = 1
    pp: int = 1
    ep: int = 1
    spec: Literal["te", "local"] = "te"


CASES = {
    "dense_tp1": Case(),
    "dense_tp2": Case(tp=2, pp=2),
    "dense_ranks": Case("torch", tp=2, spec="local"),
    "mixture": Case(mixture=True, pp=2, ep=2),
    "mixture_ranks": Case("torch", mixture=True, tp=2),
}

_KEYS = (
    "embedding.word_embeddings.weight",
    "output_layer.weight",
    "decoder.final_layernorm.weight",
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
    "decoder.layers.self_attention.linear_qkv.weight",
    "decoder.layers.self_attention.linear_proj.weight",
    "decoder.layers.mlp.linear_fc1.layer_norm_weight",
    "decoder.layers.pre_mlp_layernorm.weight",
    "decoder.layers.mlp.linear_fc1.weight",
    "decoder.layers.mlp.linear_fc2.weight",
    "decoder.layers.mlp.router.weight",
    "decoder.layers.mlp.experts.experts.linear_fc1.weight",
    "decoder.layers.mlp.experts.experts.linear_fc2.weight",
)
BASES = {key: 4096 * number for number, key in enumerate(_KEYS)}
"""Added to the place of an element, by torch_dist key; every sum is exact in float32."""
