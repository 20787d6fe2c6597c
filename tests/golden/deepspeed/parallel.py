"""Models that DeepSpeed splits by layers or experts, and how their weights are gathered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import transformers
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch.nn import functional
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

if TYPE_CHECKING:
    from make import Case


class Layer(LlamaDecoderLayer):
    """A decoder layer that makes its own positions: stages hand on hidden states alone."""

    def __init__(self, config: Any, number: int) -> None:
        """Make the layer with its number in the whole."""
        super().__init__(config, number)
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the hidden states behind this layer."""
        positions = torch.arange(hidden.shape[1])[None]
        around = self.rotary(hidden, positions)
        return super().forward(hidden, position_embeddings=around)


def pipeline_of(case: Case, config: Any) -> tuple[PipelineModule, dict[int, str]]:
    """Return a pipeline, and the name that a Llama has before those of every layer."""
    torch.manual_seed(7)
    sizes = (config.vocab_size, config.hidden_size)

    def head(embedding: torch.nn.Embedding, hidden: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden, embedding.weight)

    layers = range(config.num_hidden_layers)
    middle = [LayerSpec(Layer, config, number) for number in layers]
    middle.append(LayerSpec(LlamaRMSNorm, config.hidden_size))
    if case.tied:
        first = TiedLayerSpec("embedding", torch.nn.Embedding, *sizes)
        last = TiedLayerSpec("embedding", torch.nn.Embedding, *sizes, forward_fn=head)
    else:
        first = LayerSpec(torch.nn.Embedding, *sizes)
        last = LayerSpec(torch.nn.Linear, *sizes[::-1], bias=False)
    names = {0: "model.embed_tokens."}
    names |= {number + 1: f"model.layers.{number}." for number in layers}
    names |= {len(names): "model.norm.", len(names) + 1: "lm_head."}
    module = PipelineModule(
        [first, *middle, last],
        num_stages=case.pipeline,
        loss_fn=lambda logits, labels: functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten()
        ),
        partition_method="uniform",
    )
    for parameter in module.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter)
    return module, names


class Mixture(torch.nn.Module):
    """Two layers, each a mixture of experts, between an embedding and an output."""

    def __init__(self, case: Case) -> None:
        """Make the layers with as many experts as the case says."""
        super().__init__()
        self.embedding = torch.nn.Embedding(23, 8)
        self.layers = torch.nn.ModuleList(
            MoE(
                8,
                torch.nn.Sequential(torch.nn.Linear(8, 5), torch.nn.GELU(), torch.nn.Linear(5, 8)),
                num_experts=case.experts,
                ep_size=case.expert_parallel,
                min_capacity=16,
            )
            for _ in range(2)
        )
        self.output = torch.nn.Linear(8, 23)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the loss of predicting each token from itself."""
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden)[0]
        return functional.cross_entropy(self.output(hidden).flatten(0, 1), tokens.flatten())


def mixture_of(case: Case) -> Mixture:
    """Return random weights, each expert's its own."""
    torch.manual_seed(7 + torch.distributed.get_rank() % case.expert_parallel)
    mixture = Mixture(case)
    for name, parameter in mixture.named_parameters():
        if "deepspeed_experts" not in name:
            torch.distributed.broadcast(parameter.data, 0)
    torch.manual_seed(100 + torch.distributed.get_rank() % case.expert_parallel)
    for name, parameter in mixture.named_parameters():
        if "deepspeed_experts" in name:
            torch.nn.init.normal_(parameter)
    return mixture


def mixture_groups(mixture: Mixture) -> list[dict[str, Any]]:
    """Return the parameter groups of a mixture: experts apart."""
    group = {"params": list(mixture.parameters()), "name": "all"}
    return split_params_into_different_moe_groups_for_optimizer(group)


def master_of(
    parameter: torch.nn.Parameter, masters: dict[torch.nn.Parameter, torch.Tensor]
) -> torch.Tensor:
    """Return the fp32 master of what this tensor- or pipeline-parallel rank has, or it itself."""
    if parameter in masters:
        return masters[parameter].detach().view_as(parameter).clone()
    master = deepspeed.utils.safe_get_full_fp32_param(parameter)
    return (parameter if master is None else master).detach().clone()


def gather_tensor_parallel(engine: Any, given: dict[Any, Any]) -> dict[str, torch.Tensor]:
    """Return the masters, joined by the layers that split them."""
    masters = {name: master_of(p, given) for name, p in engine.module.named_parameters()}
    found = {}
    for path, module in engine.module.named_modules():
        own = dict(module.named_parameters(recurse=False))
        for name, parameter in own.items():
            parameter.data = masters.get(f"{path}.{name}", parameter.data)
        if own:
            pair = [own.get("weight"), own.get("bias")]
            # Older releases, which the rest of this runs with, have no AutoTP.
            from deepspeed.module_inject.layers import GatherReplacedLayerParams

            with GatherReplacedLayerParams([p for p in pair if p is not None], module):
                found |= {f"{path}.{name}": p.detach().clone() for name, p in own.items()}
    return {name: found[name] for name in masters}


def gather_pipeline(engine: Any, names: dict[int, str]) -> dict[str, torch.Tensor]:
    """Return the masters of all stages under the names of a Llama."""
    module, found = engine.module, {}
    for number, layer in enumerate(module.forward_funcs, module._local_start):
        if isinstance(layer, torch.nn.Module):
            for name, parameter in layer.named_parameters():
                found[names[number] + name] = master_of(parameter, {})
    return _union(found)


def gather_experts(case: Case, engine: Any, masters: dict[Any, Any]) -> dict[str, torch.Tensor]:
    """Return the masters of all experts under their numbers in the whole."""
    rank = torch.distributed.get_rank() % case.expert_parallel
    local = case.experts // case.expert_parallel
    found = {}
    for name, parameter in engine.module.named_parameters():
        before, inside, after = name.partition("deepspeed_experts.")
        if inside:
            number, _, rest = after.partition(".")
            name = f"{before}{inside}{int(number) + rank * local}.{rest}"
        found[name] = master_of(parameter, masters)
    return _union(found)


def _union(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what all ranks have; what several have must be equal."""
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, found)
    union: dict[str, torch.Tensor] = {}
    for own in every:
        for name, tensor in own.items():
            assert torch.equal(union.setdefault(name, tensor), tensor), name
    return union


def llama(case: Case, config: dict[str, Any]) -> Any:
    """Return the config of a Llama of as many layers as there are."""
    return transformers.LlamaConfig(**config, tie_word_embeddings=case.tied)
