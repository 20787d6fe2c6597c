"""LLaVA models of real megatron-core: built, run, and what of their layers its examples add.

Runs in a child forked by `mcore_server`, as `mcore_rank` does, which fills, loads and saves them.
Megatron's package holds the model; its layer specs, the layers with a scale and InternViT's
attention are in its examples, which no package has. They are rebuilt here from what those state.

Source: NVIDIA/Megatron-LM examples/multimodal/{model,layer_specs,layer_scaling}.py,
examples/multimodal/nvlm/internvit.py, examples/multimodal/radio/radio_g.py @ core_v0.16.1.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.extensions import transformer_engine as te
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from . import mcore_rank

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .mcore_model import Layout, LlavaModel


class ScaledLayer(TransformerLayer):
    """A layer whose attention and MLP are scaled, channel by channel, before they are added."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ls1 = torch.nn.Parameter(torch.ones(self.config.hidden_size))
        self.ls2 = torch.nn.Parameter(torch.ones(self.config.hidden_size))


class WholeNorm(MegatronModule):
    """A norm of all heads at once, of which a rank has those of its heads."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(config=config)
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        axes = {"weight": 0} if "q_layernorm" in prefix or "k_layernorm" in prefix else {}
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets)


class WholeNormAttention(SelfAttention):
    """InternViT's attention: no bias on query, key and value, and norms of all heads at once."""

    def __init__(self, config: Any, submodules: SelfAttentionSubmodules, *args: Any, **kw: Any):
        super().__init__(config, submodules, *args, **kw)
        self.linear_qkv = build_module(
            submodules.linear_qkv,
            config.hidden_size,
            self.query_projection_size + 2 * self.kv_projection_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
        )
        size = self.hidden_size_per_attention_head * self.num_attention_heads_per_partition
        for name in ("q_layernorm", "k_layernorm"):
            norm = build_module(getattr(submodules, name), hidden_size=size, config=config)
            setattr(self, name, norm)


def layer_spec(*, use_te: bool, tower: str | None) -> ModuleSpec:
    """Return the spec of a layer of the language model, or of a vision tower."""
    apart = tower is not None and tower.startswith("internvit")  # norms as modules of their own
    scaled = apart or tower == "radio-g"
    whole = tower == "internvit"
    fused = use_te and not apart
    # The language model's is an RMSNorm, for which the examples take TE's where they can.
    norm = te.TENorm if tower is None else WholeNorm if whole else WrappedTorchNorm
    column = te.TEColumnParallelLinear if use_te else ColumnParallelLinear
    row = te.TERowParallelLinear if use_te else RowParallelLinear
    if fused:
        column = te.TELayerNormColumnParallelLinear
    mask = AttnMaskType.causal if tower is None else AttnMaskType.no_mask
    return ModuleSpec(
        module=ScaledLayer if scaled else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fused else norm,
            self_attention=ModuleSpec(
                module=WholeNormAttention if whole else SelfAttention,
                params={"attn_mask_type": mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column,
                    core_attention=te.TEDotProductAttention if use_te else DotProductAttention,
                    linear_proj=row,
                    q_layernorm=WholeNorm if whole else IdentityOp,
                    k_layernorm=WholeNorm if whole else IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if fused else norm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def projection_spec(*, use_te: bool, norm: bool) -> MLPSubmodules:
    """Return the spec of the projection; a norm before it is part of TE's linear layer."""
    if norm:
        column = te.TELayerNormColumnParallelLinear
        return MLPSubmodules(linear_fc1=column, linear_fc2=te.TERowParallelLinear)
    column = te.TEColumnParallelLinear if use_te else ColumnParallelLinear
    return MLPSubmodules(
        linear_fc1=column, linear_fc2=te.TERowParallelLinear if use_te else RowParallelLinear
    )


def build(model: LlavaModel, layout: Layout) -> list[LLaVAModel]:
    """Return this rank's stage, as model_provider of examples/multimodal does."""
    use_te = not model.local_layers
    whole = {
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "num_layers_in_first_pipeline_stage": None,
        "num_layers_in_last_pipeline_stage": None,
    }
    config = mcore_rank.transformer_config(model, layout, {})
    config.language_model_type = "any"
    vision = mcore_rank.transformer_config(model, layout, {**model.vision, **whole}, alone=True)
    vision.vision_model_type = model.tower
    projection = mcore_rank.transformer_config(
        model, layout, {**model.projection, **whole}, alone=True
    )
    first = parallel_state.is_pipeline_first_stage()
    gpt = model.gpt
    chunk = LLaVAModel(
        config,
        layer_spec(use_te=use_te, tower=None),
        gpt["vocab_size"],
        gpt["max_sequence_length"],
        vision,
        layer_spec(use_te=use_te, tower=model.tower),
        model.drop_class_token,
        projection,
        projection_spec(use_te=use_te, norm=model.projection_norm),
        model.projection_type,
        share_embeddings_and_output_weights=gpt.get("share_embeddings_and_output_weights", False),
        language_position_embedding_type=gpt["position_embedding_type"],
        language_rotary_base=gpt["rotary_base"],
        pre_process=first,
        post_process=parallel_state.is_pipeline_last_stage(),
        add_encoder=first,
        add_decoder=True,
        img_h=model.image_size,
        img_w=model.image_size,
        patch_dim=model.patch_size,
        image_token_index=model.image_token,
    )
    if model.features_before_norm and first:
        chunk.vision_model.ln_post = None
    return [chunk.eval()]


def forward(
    model: LlavaModel, chunk: LLaVAModel, tokens: torch.Tensor, images: torch.Tensor
) -> dict[str, npt.NDArray[np.float32]] | None:
    """Return logits [batch, sequence, vocabulary]; of a single stage the image's features, too."""
    batch, length = tokens.shape
    positions = torch.arange(length).expand(batch, length)
    seen_length = length - 1 + chunk.img_seq_len
    pipelined = parallel_state.get_pipeline_model_parallel_world_size() > 1
    combined = model.gpt["max_sequence_length"] if pipelined else seen_length  # stages are padded
    mask = torch.triu(torch.ones(1, 1, combined, combined, dtype=torch.bool), diagonal=1)
    group = parallel_state.get_pipeline_model_parallel_group()
    ranks = dist.get_process_group_ranks(group)
    mine = parallel_state.get_pipeline_model_parallel_rank()
    seen: dict[str, npt.NDArray[np.float32]] = {}
    if len(ranks) == 1:
        chunk.vision_model.register_forward_hook(partial(_note, seen, "features"))
        chunk.vision_projection.register_forward_hook(partial(_note, seen, "projected"))
    hidden = torch.empty(combined, batch, model.config["hidden_size"])
    for stage, source in enumerate(ranks):
        if stage == mine:
            if stage:
                chunk.set_input_tensor([hidden])
            out, _ = chunk(images, tokens, positions, mask)
            if stage == len(ranks) - 1:
                logits = mcore_rank.gather_vocabulary(out)
                return None if logits is None else {"logits": logits[:, :seen_length], **seen}
            hidden = out.contiguous()
        if stage < len(ranks) - 1:
            dist.broadcast(hidden, source, group=group)
    return None


def parameters(chunk: LLaVAModel) -> dict[str, npt.NDArray[np.float32]]:
    """Return every parameter of this rank; none may be what it was before loading."""
    found = {name: one.detach().float() for name, one in chunk.named_parameters()}
    unset = [name for name, one in found.items() if one.isnan().any()]
    assert not unset, f"not loaded: {unset}"
    return {name: one.numpy().copy() for name, one in found.items()}


def _note(seen: dict[str, Any], name: str, _module: Any, _inputs: Any, output: Any) -> None:
    seen[name] = output.detach().float().numpy().copy()
