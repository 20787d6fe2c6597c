"""What one rank does: build the megatron model, fill or load it, save it, compute its logits.

Runs in a child forked by `mcore_server`, where megatron is imported with the CPU shim in place.
"""

from __future__ import annotations

import argparse
import copy
import enum
import hashlib
import math
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import megatron.core.transformer.moe.moe_utils as moe_utils
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import enums
from megatron.core.transformer import transformer_config as configs
from megatron.core.transformer.moe import experts
from megatron.core.transformer.transformer_config import TransformerConfig

from . import mcore_args
from .mcore_model import BertModel, LlavaModel
from .mcore_versions import accepted, prepare_to_save

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from .mcore import Request
    from .mcore_model import Layout, Model

try:
    from megatron.core import activations
except ImportError:  # before core 0.13
    activations = None  # type: ignore[assignment] # its functions are written out below

if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None  # without TE megatron leaves it undefined, then tests it

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "squared_relu": getattr(activations, "squared_relu", lambda x: F.relu(x) ** 2),
    "quick_gelu": getattr(activations, "quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
}
TRACKER = "latest_checkpointed_iteration.txt"
COLLECTIVE_TIMEOUT = timedelta(seconds=100)


def run(request: Request, rank: int, scratch: Path) -> Any:
    """Do the request as this rank; only one rank returns something."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if request.action == "args":
        return _plain(_common(request)["args"])
    assert request.model is not None and request.tokens is not None  # noqa: PT018 - mcore.py sets both
    layout, model = request.layout, request.model
    _initialise(layout, rank, scratch)
    chunks = _build(model, layout)
    if "verl" in request.options:
        from . import mcore_verl

        mcore_verl.add_head(chunks, request.options["verl"]["head"])
    if request.action == "write":
        _fill(chunks, request.options)
        _save(request, chunks)
    else:
        _load(request, chunks)
    computed = _forward(chunks, request)
    dist.barrier()
    return computed


def _build(model: Model, layout: Layout) -> list[Any]:
    if isinstance(model, BertModel):
        from . import mcore_bert

        return mcore_bert.build(model, layout)
    if not isinstance(model, LlavaModel):
        return build(model, layout)
    from . import mcore_llava

    return mcore_llava.build(model, layout)


def _forward(chunks: list[Any], request: Request) -> Any:
    model, tokens = request.model, torch.from_numpy(request.tokens)
    assert model is not None  # checked by the caller
    if isinstance(model, BertModel):
        from . import mcore_bert

        types = bool(model.gpt["num_tokentypes"])
        return mcore_bert.forward(chunks, tokens, model.config["hidden_size"], types)
    if not isinstance(model, LlavaModel):
        return forward(chunks, tokens, model.config["hidden_size"])
    from . import mcore_llava

    images = request.options.get("images")
    if images is None:
        held = mcore_llava.parameters(chunks[0])
        return held if dist.get_rank() == 0 else None
    return mcore_llava.forward(model, chunks[0], tokens, torch.from_numpy(images))


def _initialise(layout: Layout, rank: int, scratch: Path) -> None:
    store = dist.FileStore(str(scratch / "store"), layout.world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=layout.world_size, timeout=COLLECTIVE_TIMEOUT
    )
    sizes = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": _chunks_per_rank(layout),
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp or layout.tp,
        "create_gloo_process_groups": False,
    }
    make = parallel_state.initialize_model_parallel
    make(**accepted(make, sizes))
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    prepare_to_save(filesystem_async)


def _chunks_per_rank(layout: Layout) -> int | None:
    """Return the virtual pipeline size, None for one chunk per rank."""
    if layout.layout is None:
        return layout.vpp
    from megatron.core.transformer import pipeline_parallel_layer_layout

    stages = pipeline_parallel_layer_layout.PipelineParallelLayerLayout(layout.layout, layout.pp)
    return (
        stages.virtual_pipeline_model_parallel_size
        if stages.virtual_pipeline_model_parallel_size > 1
        else None
    )


def build(model: Model, layout: Layout) -> list[GPTModel]:
    """Return this rank's model chunks, as megatron.training's get_model and gpt_builders do."""
    config = transformer_config(model, layout, {})
    use_te = model.spec == "te"
    vpp = config.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(vpp or 1):
        vp_stage = None if vpp is None else stage
        layer_spec, mtp_spec = _specs(config, use_te=use_te, vp_stage=vp_stage)
        chunk = GPTModel(
            config,
            layer_spec,
            pre_process=_is_at(parallel_state.is_pipeline_first_stage, vp_stage),
            post_process=_is_at(parallel_state.is_pipeline_last_stage, vp_stage),
            **accepted(GPTModel, {"mtp_block_spec": mtp_spec, "vp_stage": vp_stage, **model.gpt}),
        )
        if model.embedding_scale is not None and hasattr(chunk, "embedding"):
            _scale_output(chunk.embedding, model.embedding_scale)
        for module in chunk.modules():
            if isinstance(module, getattr(experts, "GroupedMLP", ())):  # until core 0.16
                # Its forward insists on the flag, not on the dtype of weights.
                module.config = copy.copy(config)
                module.config.bf16 = True
        chunks.append(chunk.eval())
    return chunks


def _is_at(end: Callable[..., bool], vp_stage: int | None) -> bool:
    """Return whether this rank is at one end of the pipeline."""
    return end(**accepted(end, {"ignore_virtual": False, "vp_stage": vp_stage}))


def _scale_output(module: torch.nn.Module, scale: float) -> None:
    module.register_forward_hook(lambda _module, _inputs, output: output * scale)


def transformer_config(
    model: Model, layout: Layout, changes: Mapping[str, Any], *, alone: bool = False
) -> TransformerConfig:
    """Return the config of a model, changed; of a part of its own, if ``alone``."""
    values: dict[str, Any] = {
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "persist_layer_norm": False,
        "bias_activation_fusion": False,
        "params_dtype": model.dtype,
        "pipeline_dtype": model.dtype,
        "bf16": model.dtype == torch.bfloat16,
        "fp16": model.dtype == torch.float16,
        **layout.config(),
        "virtual_pipeline_model_parallel_size": _chunks_per_rank(layout),
        **({} if alone else model.config),
        **changes,
    }
    values["activation_func"] = ACTIVATIONS[values.get("activation_func", "gelu")]
    mla = values.get("multi_latent_attention")
    kind = configs.MLATransformerConfig if mla else TransformerConfig
    return kind(**accepted(kind, values))


def _specs(config: TransformerConfig, *, use_te: bool, vp_stage: int | None) -> tuple[Any, Any]:
    """Return the layer (or block) spec and the MTP block spec or None."""

    def one_layer() -> Any:
        make = get_gpt_layer_with_transformer_engine_spec if use_te else get_gpt_layer_local_spec
        extra = {} if use_te else {"normalization": config.normalization}
        return make(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
            **accepted(
                make, {"multi_latent_attention": getattr(config, "multi_latent_attention", False)}
            ),
            **extra,
        )

    block_spec = getattr(gpt_layer_specs, "get_gpt_decoder_block_spec", None)  # since core 0.10
    if not config.num_moe_experts or block_spec is None:
        layer_spec = one_layer()
    else:
        layer_spec = block_spec(
            config,
            **accepted(
                block_spec,
                {
                    "use_transformer_engine": use_te,
                    "normalization": config.normalization,
                    "vp_stage": vp_stage,
                },
            ),
        )
    if getattr(config, "mtp_num_layers", None) is None:
        return layer_spec, None
    if getattr(layer_spec, "layer_specs", None) == []:
        last_layer = one_layer()
    else:
        last_layer = gpt_layer_specs.get_gpt_decoder_layer_specs(
            config,
            use_transformer_engine=use_te,
            normalization=config.normalization,
            vp_stage=vp_stage,
        )[-1]
    mtp_spec = gpt_layer_specs.get_gpt_mtp_block_spec(
        config, last_layer, use_transformer_engine=use_te, vp_stage=vp_stage
    )
    return layer_spec, mtp_spec


def _sharding(content_metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata argument of sharded_state_dict."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {**content_metadata, "dp_cp_group": group}


def _sharded(chunks: list[GPTModel], content_metadata: dict[str, Any]) -> dict[str, Any]:
    metadata = _sharding(content_metadata)
    if len(chunks) == 1:
        return {"model": chunks[0].sharded_state_dict(metadata=metadata)}
    return {
        f"model{index}": chunk.sharded_state_dict(metadata=dict(metadata))
        for index, chunk in enumerate(chunks)
    }


def _shards(chunks: list[GPTModel], content_metadata: dict[str, Any]) -> Iterator[ShardedTensor]:
    """Yield every tensor of the chunks with its place in the whole model; data is the live one.

    What GroupedMLP's factories build are copies, for its weights are transposed: they are merged
    back when the caller asks for the next tensor.
    """
    for leaf in nested_values(_sharded(chunks, content_metadata)):
        if isinstance(leaf, ShardedTensorFactory):
            built = leaf.build()
            parts = [built] if isinstance(built, ShardedTensor) else nested_values(built)
            yield from (part for part in parts if isinstance(part, ShardedTensor))
            leaf.data.copy_(leaf.merge_fn(dict_list_map_outplace(_content, built)))
        elif isinstance(leaf, ShardedTensor):
            yield leaf


def _content(part: ShardedTensor | LocalNonpersistentObject) -> Any:
    """Return what megatron finds in a part's place once it is loaded."""
    return part.data if isinstance(part, ShardedTensor) else part.unwrap()


def _fill(chunks: list[GPTModel], options: Mapping[str, Any]) -> None:
    """Give every tensor its part of a global tensor that only its key and the options determine."""
    one_centred = not chunks[0].config.layernorm_zero_centered_gamma
    wholes: dict[str, torch.Tensor] = {}
    for shard in _shards(chunks, options["content_metadata"]):
        if shard.key not in wholes and options.get("tags"):
            whole = torch.arange(math.prod(shard.global_shape)) + options["tags"][shard.key]
            wholes[shard.key] = whole.reshape(shard.global_shape)
        elif shard.key not in wholes:
            digest = hashlib.sha256(f"{options['seed']} {shard.key}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            whole = torch.randn(shard.global_shape, generator=generator)
            norm = ("norm" in shard.key or ".ln_" in shard.key) and shard.key.endswith("weight")
            scale = 0.1 if norm or shard.key.endswith("bias") else 0.05
            wholes[shard.key] = whole * scale + (1.0 if norm and one_centred else 0.0)
        axes = shard.prepend_axis_num
        place = (
            *shard.global_offset[:axes],
            *(
                slice(start, start + size)
                for start, size in zip(shard.global_offset[axes:], shard.local_shape, strict=True)
            ),
        )
        shard.data.copy_(wholes[shard.key][place])


def _called(chunk: Any, *inputs: torch.Tensor) -> torch.Tensor:
    return chunk(*inputs)


def forward(
    chunks: list[Any],
    tokens: torch.Tensor,
    hidden_size: int,
    call: Callable[..., torch.Tensor] = _called,
) -> npt.NDArray[np.float32] | None:
    """Run all chunks in execution order; rank 0 of the last stage returns [batch, seq, vocab].

    Logits of multi-token prediction follow those of the model along the sequence.
    """
    batch, length = tokens.shape
    positions = torch.arange(length).expand(batch, length)
    mask = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), diagonal=1)
    group = parallel_state.get_pipeline_model_parallel_group()
    ranks = dist.get_process_group_ranks(group)
    mine = parallel_state.get_pipeline_model_parallel_rank()
    dtype = chunks[0].config.params_dtype
    hidden = torch.empty(length, batch, hidden_size, dtype=dtype)
    for chunk in range(len(chunks)):
        for stage, source in enumerate(ranks):
            if stage == mine:
                chunks[chunk].set_input_tensor(hidden)
                if chunks[chunk].post_process and getattr(
                    chunks[chunk].config, "mtp_num_layers", None
                ):
                    return gather_vocabulary(
                        _further_logits(chunks[chunk], tokens, positions, mask)
                    )
                out = call(chunks[chunk], tokens, positions, mask)
                if chunks[chunk].post_process:
                    return gather_vocabulary(out)
                hidden = out.contiguous()
            last = chunk == len(chunks) - 1 and stage >= len(ranks) - 1
            if len(ranks) > 1 and not last:
                dist.broadcast(hidden, source, group=group)
            if chunk == len(chunks) - 1 and stage == len(ranks) - 2 and mine != len(ranks) - 1:
                return None
    return None


def _further_logits(chunk: GPTModel, *inputs: torch.Tensor) -> torch.Tensor:
    """Return the logits of every prediction; megatron computes the further ones for a loss only."""
    found: list[torch.Tensor] = []
    hook = chunk.output_layer.register_forward_hook(
        lambda _module, _inputs, output: found.append(output[0].transpose(0, 1).clone())
    )
    chunk(*inputs, labels=inputs[0])
    hook.remove()
    *further, main = found
    return torch.cat([main, *further], 1)


def gather_vocabulary(logits: torch.Tensor) -> npt.NDArray[np.float32] | None:
    """Return the logits of all tensor-parallel ranks on the first of them, None elsewhere."""
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(logits) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, logits.contiguous(), group=group)
    if dist.get_rank() % (dist.get_world_size() // _pipeline_size()):
        return None
    return torch.cat(parts, -1).float().numpy()


def _pipeline_size() -> int:
    return parallel_state.get_pipeline_model_parallel_world_size()


def _save(request: Request, chunks: list[GPTModel]) -> None:
    options = request.options
    if "verl" in options:
        from . import mcore_verl

        saved = chunks if options["verl"].get("weights", True) else []
        mcore_verl.save(request.directory, request.format, saved)
        dist.barrier()
        return
    iteration = options["iteration"]
    name = "release" if iteration == "release" else f"iter_{iteration:07d}"
    directory = request.directory / name
    directory.mkdir(parents=True, exist_ok=True)
    common: dict[str, Any] = {
        "args": _args(request),
        "checkpoint_version": 3.0,
        "iteration": 0 if iteration == "release" else iteration,
    }
    if request.format == "torch_dist":
        metadata = {
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            **options["content_metadata"],
        }
        dist_checkpointing.save(
            {**common, **_sharded(chunks, metadata)},
            str(directory),
            **accepted(dist_checkpointing.save, {"content_metadata": metadata}),
        )
    elif _is_first_copy():
        file = _rank_file(directory)
        file.parent.mkdir(exist_ok=True)
        for index, chunk in enumerate(chunks):
            key = "model" if len(chunks) == 1 else f"model{index}"
            common[key] = chunk.state_dict_for_save_checkpoint()
        torch.save(common, file)
    dist.barrier()
    if dist.get_rank() == 0:
        (request.directory / TRACKER).write_text(
            "release" if iteration == "release" else str(iteration)
        )


def _is_first_copy() -> bool:
    """Return whether no rank before has the same weights; core 0.9 has one rule for all of them."""
    own = getattr(parallel_state, "get_expert_data_parallel_rank", None)
    return (own or parallel_state.get_data_modulo_expert_parallel_rank)() == 0


def _args(request: Request) -> argparse.Namespace:
    assert request.model is not None  # set by mcore.write
    layout = request.layout
    values = mcore_args.of_model(request.model, layout, request.options["args_names"])
    values |= {
        "virtual_pipeline_model_parallel_size": _chunks_per_rank(layout),
        "model_type": ModelType.encoder_or_decoder,
        # An enum of Megatron's; before core 0.11 there is none.
        "attention_backend": enums.AttnBackend.auto if hasattr(enums, "AttnBackend") else None,
        "world_size": layout.world_size,
        "ckpt_format": request.format,
        "iteration": request.options["iteration"],
    }
    return argparse.Namespace(**values | request.options["args"])


def _rank_file(directory: Path) -> Path:
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if _pipeline_size() > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if parallel_state.get_expert_model_parallel_world_size() > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    return directory / name / "model_optim_rng.pt"


def _iteration_directory(directory: Path) -> Path:
    tracker = (directory / TRACKER).read_text().strip()
    return directory / ("release" if tracker == "release" else f"iter_{int(tracker):07d}")


def _load(request: Request, chunks: list[GPTModel]) -> None:
    directory = _iteration_directory(request.directory)
    for shard in _shards(chunks, {}):
        shard.data.fill_(float("nan"))
    if request.format == "torch":
        loaded = torch.load(
            _rank_file(directory),
            map_location="cpu",
            weights_only=request.options["weights_only"],
        )
    else:
        metadata = {}
        if hasattr(dist_checkpointing, "load_content_metadata"):  # since core 0.14
            common = dist_checkpointing.load_common_state_dict(str(directory))
            metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or {}
        said = request.options.get("strictness")
        strictness = {} if said is None else {"strict": StrictHandling(said)}
        loaded = dist_checkpointing.load(_sharded(chunks, metadata), str(directory), **strictness)
    for index, chunk in enumerate(chunks):
        key = "model" if len(chunks) == 1 else f"model{index}"
        result = chunk.load_state_dict(loaded[key], strict=request.options["strict"])
        wrong = [
            name
            for name in [*result.missing_keys, *result.unexpected_keys]
            if not name.endswith("_extra_state")
        ]
        if wrong:
            raise KeyError(f"{key}: missing or unexpected {wrong}")


def _common(request: Request) -> dict[str, Any]:
    directory = _iteration_directory(request.directory)
    if request.format == "torch_dist":
        return dist_checkpointing.load_common_state_dict(str(directory))
    file = min(directory.glob("mp_rank_*/model_optim_rng.pt"))
    return torch.load(file, map_location="cpu", weights_only=False)


def _plain(args: argparse.Namespace) -> argparse.Namespace:
    """Return args without objects of megatron's classes: enums become names, others their text."""

    def plain(value: object) -> object:
        if isinstance(value, enum.Enum):
            return value.name
        if value is None or isinstance(
            value, bool | int | float | str | list | tuple | torch.dtype
        ):
            return value
        return str(value)

    return argparse.Namespace(**{name: plain(value) for name, value in vars(args).items()})
