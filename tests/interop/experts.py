"""Mixtures of experts: models, the layouts they are cut to, Megatron's ways to hold them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.oracles import hf, mcore
from tests.oracles.mcore import Layout, Model

from .conversion import Source, convert, difference, sizes, strict_logits

FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixtral": (hf.mixtral, {}),
    "mixtral-3of4": (hf.mixtral, {"num_experts_per_tok": 3, "num_key_value_heads": 2}),
    "qwen2_moe": (hf.qwen2_moe, {}),
    "qwen2_moe-normalised": (hf.qwen2_moe, {"norm_topk_prob": True, "tie_word_embeddings": True}),
    "qwen2_moe-mixed": (hf.qwen2_moe, {"mlp_only_layers": [1, 3]}),
    "qwen3_moe": (hf.qwen3_moe, {}),
    "qwen3_moe-unnormalised": (hf.qwen3_moe, {"norm_topk_prob": False}),
    "qwen3_moe-mixed": (hf.qwen3_moe, {"mlp_only_layers": [0], "tie_word_embeddings": True}),
}
LATENT: dict[str, tuple[Any, dict[str, Any]]] = {
    "deepseek_v2-lite": (hf.deepseek_v2, {}),
    "deepseek_v2": (
        hf.deepseek_v2,
        {
            "q_lora_rank": 40,
            "n_routed_experts": 16,
            "num_experts_per_tok": 3,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
        },
    ),
    "deepseek_v3": (hf.deepseek_v3, {}),
    "moonlight": (
        hf.deepseek_v3,
        {
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "n_shared_experts": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        },
    ),
}
"""Models with latent attention; a group of V2 counts by its best expert in either framework."""
THOROUGH = ("mixtral", "qwen2_moe-mixed")

LAYOUTS = {
    "tp1": Layout(),
    "ep2": Layout(ep=2),
    "ep4": Layout(ep=4),
    "tp2": Layout(tp=2),
    "tp2-ep2": Layout(tp=2, ep=2),
    "tp2-ep2-etp1": Layout(tp=2, ep=2, etp=1),
    "tp2-pp2-ep2-etp1": Layout(tp=2, pp=2, ep=2, etp=1),
    "tp2-ep4-etp1": Layout(tp=2, ep=4, etp=1),
    "pp2-ep2": Layout(pp=2, ep=2),
    "pp2-vpp2-ep2": Layout(pp=2, vpp=2, ep=2),
    "tp4-ep2-etp2": Layout(tp=4, ep=2, etp=2),
    "pp2-first1-ep4": Layout(pp=2, first=1, ep=4),
}
DISTRIBUTED_ONLY = {"ep2-etp2": Layout(ep=2, etp=2)}
"""Several ranks would write files of one name."""


@dataclass(frozen=True)
class Kind:
    """A spec of Megatron's and how it holds its experts."""

    spec: str
    grouped: bool

    @property
    def options(self) -> dict[str, Any]:
        """The saver's options for it."""
        impl = {"te": "transformer_engine", "local": "local"}[self.spec]
        return {"saver_transformer_impl": impl, "moe_grouped_gemm": self.grouped}

    def model(self, source: Source, layout: Layout) -> Model:
        """The Megatron model with the numbers of a source."""
        model = source.megatron(self.spec, layout)
        return replace(model, config={**model.config, "moe_grouped_gemm": self.grouped})


KINDS = {
    "te": Kind("te", False),
    "te-grouped": Kind("te", True),
    "local": Kind("local", False),
    "local-grouped": Kind("local", True),
}


def expert_sizes(layout: Layout) -> dict[str, Any]:
    """The options of the core saver that ask for a layout."""
    return {
        **sizes(layout),
        "target_expert_parallel_size": layout.ep,
        # Megatron's default, said: ours is the source's own while TP stays.
        "target_expert_tensor_parallel_size": layout.etp or layout.tp,
    }


def to_megatron(source: Source, layout: Layout, format: str, kind: Kind, place: Path) -> float:
    """How far real Megatron's logits are from transformers', of what ckptx made of its files."""
    options = {"ckpt_format": format, **kind.options, **expert_sizes(layout)}
    convert(source.directory, place / "core", "core", **options)
    model = kind.model(source, layout)
    found = mcore.read(model, layout, place / "core", source.tokens, format=format)
    return difference(found[..., :131], source.logits)


def to_transformers(source: Source, layout: Layout, format: str, kind: Kind, place: Path) -> float:
    """How far transformers' logits are from Megatron's, of what ckptx made of its files.

    Without a config at hand: args alone say what the model is.
    """
    expected = mcore.write(
        kind.model(source, layout),
        layout,
        place / "core",
        source.tokens,
        format=format,
        args={"vocab_size": 131},
    )
    convert(place / "core", place / "hf", "hf")
    found = strict_logits(place / "hf", source.tokens)
    return difference(found, expected[..., :131])
