"""Mixtures of experts in ``config.json``, in the words of Mixtral and Qwen.

The rest of the config is in `ckptx.schemas.config.translate`, which calls this.

Routing is the same where ``norm_topk_prob`` is true and Megatron takes the softmax after the top-k
(``moe_router_pre_softmax`` false): a softmax over the chosen logits is a softmax over all of them,
divided by the sum of the chosen.

Source: huggingface/transformers src/transformers/models/{mixtral,qwen2_moe,qwen3_moe,olmoe,
deepseek_v2,deepseek_v3}/configuration_*.py and modeling_*.py @ v5.23.0; deepseek-ai/DeepSeek-V2,
DeepSeek-V3 config.json @ main.
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

    def prepared(self, values: Mapping[str, Any], family: str) -> dict[str, Any]:
        """Return a config of a family with the keys of its mixture completed.

        Raises:
            SchemaError: a key has a value that the family is not known with.
        """
        found = {**self.defaults, **values}
        said = [key for key in (self.count, *self.spellings) if key in values]
        if len({values[key] for key in said}) > 1:
            raise SchemaError(f"{' and '.join(said)} contradict each other in the config")
        if said:
            found[self.count] = values[said[0]]
        for key, known in self.only.items():
            if found.get(key, known) != known:
                raise SchemaError(
                    f"{key} is {found[key]!r}, family {family} is known with {known!r}"
                )
        return found

    def compared(self, spec: ModelSpec) -> dict[str, Any]:
        """Return what of the experts of two specs can be compared, by the keys of the config."""
        said = self.settings(spec)
        return {key: said[key] for key in said if key not in {*self.spellings, *self.only}}

    def respelled(self, keys: set[str], spec: ModelSpec) -> dict[str, Any]:
        """Return the entries of a config that must change where some `compared` keys do."""
        if self.count in keys:
            keys = {*keys, *self.spellings}
        if "mlp_only_layers" in keys:
            keys = {*keys, "decoder_sparse_step"}
        own = self.settings(spec)
        return {key: own[key] for key in own if key in keys}

    def unsupported(self, spec: ModelSpec) -> list[str]:
        """Return what a spec says of experts that the config cannot say."""
        return self.unheld(spec) if spec.num_experts else ["no experts"]

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
            **counted(values, self.count),
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


def counted(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return how many experts there are by a key, and how many of them each token goes to."""
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
