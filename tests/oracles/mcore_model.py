"""The values that name a megatron model and its parallel layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import lcm
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Layout:
    """Parallel sizes and the pipeline split, in the terms of TransformerConfig.

    ``layout`` is megatron's pipeline_model_parallel_layout string; it implies ``vpp``.
    """

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    first: int | None = None
    last: int | None = None
    layout: str | None = None
    embedding_in_split: bool = False
    loss_in_split: bool = False
    ep: int = 1
    etp: int | None = None

    @property
    def ranks_per_stage(self) -> int:
        """Return the fewest ranks that hold both the dense and the expert grid."""
        return lcm(self.tp, self.ep * (self.etp or self.tp))

    @property
    def world_size(self) -> int:
        """Return the number of processes."""
        return self.ranks_per_stage * self.pp

    def config(self) -> dict[str, Any]:
        """Return the TransformerConfig arguments of this layout, ``vpp`` of a string excepted."""
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "virtual_pipeline_model_parallel_size": self.vpp,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.etp or self.tp,
            "num_layers_in_first_pipeline_stage": self.first,
            "num_layers_in_last_pipeline_stage": self.last,
            "pipeline_model_parallel_layout": self.layout,
            "account_for_embedding_in_pipeline_split": self.embedding_in_split,
            "account_for_loss_in_pipeline_split": self.loss_in_split,
        }


@dataclass(frozen=True)
class Model:
    """A GPTModel without parallel sizes.

    ``config`` holds TransformerConfig arguments; ``activation_func`` is named by a string, one of
    ``silu``, ``gelu``, ``gelu_tanh``, ``squared_relu``, ``quick_gelu``. ``gpt`` holds GPTModel's.
    ``embedding_scale`` is multiplied in by a hook: no parameter of megatron's says it.
    """

    config: Mapping[str, Any]
    gpt: Mapping[str, Any]
    spec: Literal["local", "te"] = "te"
    dtype: torch.dtype = torch.float32
    embedding_scale: float | None = None


@dataclass(frozen=True)
class LlavaModel(Model):
    """A LLaVAModel without parallel sizes; ``config`` and ``gpt`` are those of its language model.

    Its towers need Transformer Engine for the norms around their layers, whatever the layers are:
    ``local_layers`` are those without. ``vision`` and ``projection`` hold TransformerConfig
    arguments of their own. With ``features_before_norm`` the norm after the tower is left out, as
    transformers leaves it out.
    """

    tower: str = "clip"
    vision: Mapping[str, Any] = field(default_factory=dict)
    projection: Mapping[str, Any] = field(default_factory=dict)
    projection_type: Literal["mlp", "affine"] = "mlp"
    projection_norm: bool = False
    drop_class_token: bool = True
    features_before_norm: bool = False
    local_layers: bool = False
    image_size: int = 28
    patch_size: int = 7
    image_token: int = 130


@dataclass(frozen=True)
class BertModel(Model):
    """A BertModel without parallel sizes; ``gpt`` holds its arguments."""
