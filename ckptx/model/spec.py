"""Model dimensions: what the config of every framework says, in one spelling.

Field names are those of Megatron's arguments where Megatron has one. Everything is a plain value,
so a spec pickles small and prints readably.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

_OF_CONFIG = {"unknown_keys", "assumed"}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The dimensions and switches of one model part.

    ``vocab_size`` is the true vocabulary, None where the source does not say; the embedding itself
    may hold more rows. ``family`` names a schema module's family (``"llama"``) and ``architecture``
    the class that Hugging Face configs name (``"LlamaForCausalLM"``).
    """

    family: str
    architecture: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int | None
    max_position_embeddings: int
    norm_epsilon: float
    normalization: str = "RMSNorm"
    activation: str = "swiglu"
    """``swiglu``, ``gelu``, ``gelu_tanh``, ``squared_relu``, or gated by one of Gelu's forms:
    ``geglu``, ``geglu_tanh``, ``quick_geglu``."""
    position_embedding_type: str = "rope"
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rotary_scaling: Mapping[str, Any] | None = None
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    tied: bool = False
    dtype: str = "bfloat16"
    num_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_layers: tuple[bool, ...] = ()
    """Which layers are mixtures of experts; empty if all are alike, mixtures or not."""
    moe_router_topk: int = 2
    moe_shared_expert_intermediate_size: int | None = None
    moe_shared_expert_gate: bool = False
    moe_router_score_function: str = "softmax"
    moe_router_pre_softmax: bool = False
    moe_router_enable_expert_bias: bool = False
    moe_router_num_groups: int | None = None
    moe_router_group_topk: int | None = None
    moe_router_topk_scaling_factor: float | None = None
    multi_latent_attention: bool = False
    """Query, key and value come from latent vectors; ``kv_channels`` are those of a value head."""
    q_lora_rank: int | None = None
    """Size of the query's latent vector, None where queries are projected directly."""
    kv_lora_rank: int = 0
    qk_head_dim: int = 0
    """Channels of a query or key head without position."""
    qk_pos_emb_head_dim: int = 0
    """Channels of a query or key head that rotate."""
    mtp_num_layers: int = 0
    """Layers after the last that predict further tokens, each like the last one."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Settings without a Megatron argument (``sliding_window``), by their Hugging Face name."""
    unknown_keys: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Keys of its config that no schema knows, and their values."""
    assumed: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Values that its config left to the defaults of its class."""

    def dimensions(self) -> dict[str, Any]:
        """Return what describes the model, by name, without what is said of its config."""
        return {name: value for name, value in asdict(self).items() if name not in _OF_CONFIG}

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate and an up projection."""
        return "glu" in self.activation

    def is_moe(self, layer: int | None) -> bool:
        """Whether a layer is a mixture of experts; those of multi-token prediction come last."""
        if not self.num_experts or layer is None:
            return False
        return self.moe_layers[min(layer, self.num_layers - 1)] if self.moe_layers else True

    @property
    def homogeneous(self) -> bool:
        """Whether Megatron takes all layers to be alike: no pattern of mixtures was given."""
        return not self.moe_layers

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused query, key and value weight."""
        return (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels
