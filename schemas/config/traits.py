"""What a family fixes without saying so, and how its config spells the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal, TypeAlias

from ckptx.model.spec import ModelSpec
from ckptx.schemas.config.experts import Mixture

Windows: TypeAlias = Literal["none", "all layers", "some layers", "layer types"]
"""Who has a sliding window: ``some layers`` by Qwen's keys, ``layer types`` by Gemma 2's."""


@dataclass(frozen=True, slots=True)
class Biases:
    """Which projections have a bias."""

    qkv: bool = False
    out: bool = False
    mlp: bool = False

    def __or__(self, other: Biases) -> Biases:
        """Return the biases that either has."""
        return Biases(self.qkv or other.qkv, self.out or other.out, self.mlp or other.mlp)

    @classmethod
    def of(cls, spec: ModelSpec) -> Biases:
        """Return which projections of a model have a bias."""
        out, mlp = (bool(spec.extra.get(name)) for name in ("attention_out_bias", "mlp_bias"))
        if spec.add_bias_linear:
            return cls(True, True, True)
        return cls(spec.add_qkv_bias, out, mlp)

    def to_spec(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return a spec's switches, and entries of its ``extra`` for what Megatron has none for."""
        if self == Biases(True, True, True):
            return {"add_bias_linear": True, "add_qkv_bias": False}, {}
        extra = {"attention_out_bias": self.out, "mlp_bias": self.mlp}
        return {"add_qkv_bias": self.qkv}, {name: True for name, value in extra.items() if value}

    def __str__(self) -> str:
        """Return the biases in words."""
        parts = (("qkv", self.qkv), ("attention output", self.out), ("mlp", self.mlp))
        return ", ".join(name for name, value in parts if value) or "nothing"


SWITCHES: Mapping[str, Biases] = {
    "attention_bias": Biases(qkv=True, out=True),
    "mlp_bias": Biases(mlp=True),
    "use_bias": Biases(True, True, True),
}
"""Keys of configs and the biases that they switch on."""


# The same formula under several names; transformers src/transformers/activations.py ACT2FN.
GELU = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
"""Ungated activations."""
NEW_GELU = {name: GELU[name] for name in ("gelu_new", *GELU)}
"""The same; ``gelu_new`` is written for the tanh form."""
NO_HEAD_KEYS: Mapping[str, str | None] = {"num_key_value_heads": None, "head_dim": None}
"""Names for a config in which heads are as many and as large as the hidden size says."""


def llama_defaults(
    *,
    vocab: int = 32000,
    hidden: int = 4096,
    ffn: int | None = 11008,
    layers: int = 32,
    heads: int = 32,
    groups: int | None = None,
    positions: int = 2048,
    **others: Any,
) -> dict[str, Any]:
    """Return the defaults of transformers' LlamaConfig, as a relative changes some of them.

    ``others`` are keys of the config.
    """
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **others,
    }


LLAMA_DEFAULTS = llama_defaults()


@dataclass(frozen=True, slots=True)
class ConfigTable:
    """What a family fixes, and the defaults of its config class."""

    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=lambda: LLAMA_DEFAULTS)
    """In the spelling of the family."""
    bias_keys: tuple[str, ...] = ()
    """The switches that the config has; `SWITCHES` says for which projections."""
    fixed_biases: Biases = field(default_factory=Biases)
    qk_layernorm: bool = False
    windows: Windows = "none"
    names: Mapping[str, str | None] = field(default_factory=dict)
    """Llama's key to the family's, None where the config has none."""
    switches: Mapping[str, Biases] = field(default_factory=lambda: SWITCHES)
    normalization: str = "RMSNorm"
    activations: Mapping[str, str] = field(default_factory=lambda: {"silu": "swiglu"})
    """What the config's activations are in a spec; the first that fits is written."""
    position_embedding_type: str = "rope"
    rotary_percent: float | None = None
    """The default of the rotated part of a head; None where all of it is, always."""
    rotary_keys: tuple[str, str] = ("rope_theta", "partial_rotary_factor")
    """Base and rotated part, as transformers 4 spells them."""
    scalings: Mapping[str, str] = field(default_factory=dict)
    """Other words for kinds of scaling."""
    dropouts: tuple[str, ...] = ("attention_dropout",)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Entries of a spec's ``extra`` that hold for every model of the family."""
    passthrough_keys: Mapping[str, Any] = field(default_factory=dict)
    """Keys that a spec's ``extra`` holds under their own names, with the value that is not held.

    It is the value that asks nothing of Megatron; a function of the spec where it depends on it.
    """
    megatron_lacks: Mapping[str, str] = field(default_factory=dict)
    """Why Megatron cannot compute another value of a key of `passthrough_keys`."""
    harmless: Mapping[str, Any] = field(default_factory=dict)
    """Keys that change nothing while they have this value, besides those of all families."""
    experts: Mixture | None = None
    """How the config spells a mixture of experts."""
    latent: bool = False
    """Whether attention goes through latent vectors."""
    fields: tuple[tuple[str, str], ...] = ()
    """Pairs of a key of its own and the spec's attribute."""

    def key(self, name: str) -> str | None:
        """Return the family's key for one of Llama's."""
        return self.names.get(name, name)

    def neutral(self, key: str, spec: ModelSpec) -> Any:
        """Return the value of one of `passthrough_keys` that asks nothing of Megatron."""
        value = self.passthrough_keys[key]
        return value(spec) if callable(value) else value

    def biases(self, config: Mapping[str, Any]) -> Biases:
        """Return which projections have a bias by a config, in its own keys."""
        on = (self.switches[key] for key in self.bias_keys if config.get(key))
        return reduce(Biases.__or__, on, self.fixed_biases)

    def bias_switches(self, said: Biases) -> dict[str, bool]:
        """Return the switches of a config for these biases."""
        return {key: self.switches[key] | said == said for key in self.bias_keys}
