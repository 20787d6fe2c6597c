"""How configs spell a mixture of experts: in the words of Mixtral and Qwen, or in DeepSeek's.

Routing is the same where ``norm_topk_prob`` is true and Megatron takes the softmax after the top-k
(``moe_router_pre_softmax`` false): a softmax over the chosen logits is a softmax over all of them,
divided by the sum of the chosen.

Source: huggingface/transformers src/transformers/models/{mixtral,qwen2_moe,qwen3_moe,olmoe,
deepseek_v2,deepseek_v3}/configuration_*.py and modeling_*.py @ v5.23.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptx.errors import SchemaError
from ckptx.model.spec import ModelSpec

BALANCING = "moe_router_load_balancing_type"
"""The entry of a spec's ``extra`` for routing that no config can say."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """How the config of a family spells its experts, and what it fixes without saying so."""

    defaults: Mapping[str, Any]
    count: str = "num_experts"
    ffn: str = "moe_intermediate_size"
    """The key of the experts' ffn size; ``intermediate_size`` where no layer is dense."""
    spellings: tuple[str, ...] = ()
    """Other keys for ``count``, which are written too."""
    shared: bool = False
    """Whether there is a shared expert, with a gate."""
    normalized: bool = False
    """Whether the chosen probabilities always add up to one; else ``norm_topk_prob`` says."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Keys of which one value alone is known, with that value."""

    @property
    def sparse(self) -> bool:
        """Whether the config can say that some layers are dense."""
        return "decoder_sparse_step" in self.defaults

    def attributes(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the attributes of a spec that a complete config says of experts."""
        shared: dict[str, Any] = {}
        if self.shared:
            size = values["shared_expert_intermediate_size"]
            shared = {"moe_shared_expert_intermediate_size": size, "moe_shared_expert_gate": True}
        return {
            **_counted(values, self.count),
            "moe_ffn_hidden_size": values[self.ffn],
            "moe_router_pre_softmax": not (self.normalized or bool(values["norm_topk_prob"])),
            "moe_layers": _spread(values) if self.sparse else (),
            **shared,
        }

    def settings(self, spec: ModelSpec) -> dict[str, Any]:
        """Return the keys that the config has for the experts of a spec."""
        said: dict[str, Any] = dict.fromkeys((self.count, *self.spellings), spec.num_experts)
        said |= {"num_experts_per_tok": spec.moe_router_topk, self.ffn: spec.moe_ffn_hidden_size}
        if not self.normalized:
            said["norm_topk_prob"] = not spec.moe_router_pre_softmax
        if self.sparse:
            dense = [layer for layer in range(spec.num_layers) if not spec.is_moe(layer)]
            said |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
        if self.shared:
            said["shared_expert_intermediate_size"] = spec.moe_shared_expert_intermediate_size
        return {**self.only, **said}

    def unheld(self, spec: ModelSpec) -> list[str]:
        """Return what a spec says of its experts that the config cannot say."""
        whole = all(spec.is_moe(layer) for layer in range(spec.num_layers))
        shared = bool(spec.moe_shared_expert_intermediate_size)
        own_size = spec.moe_ffn_hidden_size != spec.ffn_hidden_size
        score = spec.moe_router_score_function
        unnormalized = self.normalized and spec.moe_router_pre_softmax
        held = (
            (self.sparse or whole, "dense layers between mixtures"),
            (self.ffn != "intermediate_size" or not own_size, "experts of a size of their own"),
            (shared == self.shared, "a shared expert" if shared else "no shared expert"),
            (shared == spec.moe_shared_expert_gate, "a shared expert without a gate"),
            (not unnormalized, "probabilities that do not add up to one"),
            (score == "softmax", f"{score} scores"),
            (not spec.moe_router_enable_expert_bias, "expert biases"),
            (not spec.moe_router_group_topk, "groups of experts"),
            (spec.moe_router_topk_scaling_factor in (None, 1.0), "scaled probabilities"),
            (not spec.extra.get(BALANCING), f"{spec.extra.get(BALANCING)} routing"),
        )
        return [reason for fits, reason in held if not fits]


@dataclass(frozen=True, slots=True)
class DeepSeekMixture(Mixture):
    """DeepSeek's words: the first layers are dense, shared experts have no gate.

    With ``biased`` routing is that of V3 (sigmoid scores, a bias for every expert); else that of V2
    (softmax over all experts). Either may choose within the best groups of experts only.
    """

    biased: bool = False

    def attributes(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the attributes of a spec that a complete config says of experts."""
        ffn, dense = values[self.ffn], values["first_k_dense_replace"] or 0
        layers = tuple(layer >= dense for layer in range(values["num_hidden_layers"]))
        factor = float(values["routed_scaling_factor"] or 1.0)
        groups: dict[str, Any] = {}
        if values["topk_method"] in _GROUPED and (values["n_group"] or 1) > 1:
            chosen = {"moe_router_num_groups": "n_group", "moe_router_group_topk": "topk_group"}
            groups = {attribute: values[key] for attribute, key in chosen.items()}
        return {
            **_counted(values, self.count),
            "moe_ffn_hidden_size": ffn,
            "moe_shared_expert_intermediate_size": (values["n_shared_experts"] or 0) * ffn or None,
            "moe_layers": () if all(layers) else layers,
            "moe_router_pre_softmax": not self.biased,
            "moe_router_score_function": "sigmoid" if self.biased else "softmax",
            "moe_router_enable_expert_bias": self.biased,
            "moe_router_topk_scaling_factor": None if factor == 1.0 else factor,
            **groups,
        }

    def settings(self, spec: ModelSpec) -> dict[str, Any]:
        """Return the keys that the config has for the experts of a spec."""
        ffn, shared = spec.moe_ffn_hidden_size or 1, spec.moe_shared_expert_intermediate_size or 0
        grouped = bool(spec.moe_router_group_topk)
        method = "noaux_tc" if self.biased else _GROUPED[0] if grouped else "greedy"
        return {
            **self.only,
            self.count: spec.num_experts,
            "num_experts_per_tok": spec.moe_router_topk,
            self.ffn: ffn,
            "n_shared_experts": shared // ffn,
            "first_k_dense_replace": sum(not moe for moe in spec.moe_layers),
            "routed_scaling_factor": spec.moe_router_topk_scaling_factor or 1.0,
            "topk_method": method,
            "n_group": spec.moe_router_num_groups or 1,
            "topk_group": spec.moe_router_group_topk or 1,
        }

    def unheld(self, spec: ModelSpec) -> list[str]:
        """Return what a spec says of its experts that the config cannot say."""
        shared = spec.moe_shared_expert_intermediate_size or 0
        score = spec.moe_router_score_function
        held = (
            (sorted(spec.moe_layers) == list(spec.moe_layers), "dense layers between mixtures"),
            (not shared % (spec.moe_ffn_hidden_size or 1), "part of a shared expert"),
            (not spec.moe_shared_expert_gate, "a gate of the shared expert"),
            (score == ("sigmoid" if self.biased else "softmax"), f"{score} scores"),
            (spec.moe_router_enable_expert_bias == self.biased, "expert biases, or their lack"),
            (self.biased or spec.moe_router_pre_softmax, "probabilities that add up to one"),
            (not spec.extra.get(BALANCING), f"{spec.extra.get(BALANCING)} routing"),
        )
        return [reason for fits, reason in held if not fits]


_GROUPED = ("group_limited_greedy", "noaux_tc")
"""The values of ``topk_method`` that choose within groups of experts."""


def _counted(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    count, per_token = values[key], values["num_experts_per_tok"]
    if not isinstance(count, int) or not isinstance(per_token, int) or not 0 < per_token <= count:
        raise SchemaError(f"num_experts_per_tok {per_token!r} of {key} {count!r}: not a mixture")
    return {"num_experts": count, "moe_router_topk": per_token}


def _spread(values: Mapping[str, Any]) -> tuple[bool, ...]:
    """Return which layers are mixtures, empty for all, by Qwen's keys."""
    step, dense = values["decoder_sparse_step"] or 1, values["mlp_only_layers"] or ()
    found = tuple(
        (layer + 1) % step == 0 and layer not in dense
        for layer in range(values["num_hidden_layers"])
    )
    return () if all(found) else found
