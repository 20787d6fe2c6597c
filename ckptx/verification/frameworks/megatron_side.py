"""The logits of a ``torch_dist`` checkpoint, computed by megatron-core in one CPU process.

Megatron reshards it to TP 1 and PP 1 as it loads. Its local layers are used, whose
``sharded_state_dict`` finds what was written with Transformer Engine's, too. Everything is float32.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ckptx.errors import listing
from ckptx.verification.frameworks import megatron_cpu
from ckptx.verification.frameworks.megatron_args import arguments
from ckptx.verification.frameworks.worker import SideError, serve


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """Save float32 logits [batch, sequence, padded vocabulary] of the tokens."""
    megatron_cpu.install()
    torch.set_grad_enabled(False)
    _initialise(Path(job["scratch"]))
    model = build(job)
    load(model, Path(job["directory"]))
    tokens = torch.from_numpy(np.load(job["tokens"]))
    batch, length = tokens.shape
    positions = torch.arange(length).expand(batch, length)
    hidden = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), diagonal=1)
    np.save(job["out"], model(tokens, positions, hidden).float().numpy())
    return {"class": type(model).__name__}


def _initialise(scratch: Path) -> None:
    """Make the process groups of a world of one."""
    from megatron.core import parallel_state, tensor_parallel

    dist: Any = torch.distributed
    store = dist.FileStore(str(scratch / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def build(job: Mapping[str, Any]) -> Any:
    """Return the GPTModel that the args of a checkpoint describe.

    Raises:
        SideError: this megatron-core has no setting for what they say.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
    )

    settings, gpt = arguments(Namespace(**job["args"]))
    config = _config(settings)
    if config.num_moe_experts:
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=config.normalization
        )
        _name_norms(spec.layer_specs, Path(job["directory"]))
    else:
        spec = get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm, normalization=config.normalization
        )
    model = GPTModel(config, spec, **gpt).eval()
    if (scale := job["embedding_scale"]) is not None:
        model.embedding.register_forward_hook(lambda _module, _inputs, output: output * scale)
    return model


def _name_norms(layers: Sequence[Any], directory: Path) -> None:
    """Let mixtures find the norm before their experts under the name that the checkpoint has.

    The local layers look for it in linear_fc1, where Transformer Engine's dense layers keep it;
    Transformer Engine's mixtures keep it outside.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.transformer.moe.moe_layer import MoELayer

    names = dist_checkpointing.load_tensors_metadata(str(directory))
    if any("pre_mlp_layernorm" in name for name in names):
        for layer in layers:
            if layer.submodules.mlp.module is MoELayer:
                layer.submodules.sharded_state_dict_keys_map = {
                    name: other
                    for name, other in layer.submodules.sharded_state_dict_keys_map.items()
                    if not name.startswith("pre_mlp_layernorm")
                }


def _config(settings: Mapping[str, Any]) -> Any:
    """Return the config of a model that is run once, on one CPU, in float32."""
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import torch.nn.functional as F  # noqa: N812 - torch's own name for it
    from megatron.core.activations import quick_gelu, squared_relu
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # without TE megatron leaves it undefined, then tests it
    activations = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "squared_relu": squared_relu,
        "quick_gelu": quick_gelu,
    }
    values = {
        **settings,
        "activation_func": activations[settings.get("activation_func", "gelu")],
        "params_dtype": torch.float32,
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "persist_layer_norm": False,
        "bias_activation_fusion": False,
        # Grouped experts need a CUDA extension; torch_dist has one spelling for both ways.
        "moe_grouped_gemm": False,
        "moe_token_dispatcher_type": "allgather",
        "moe_router_load_balancing_type": "none",
        # The layers behind the model's own predictions are not compared.
        "mtp_num_layers": None,
    }
    if values.get("softmax_type") == "vanilla":
        del values["softmax_type"]  # the only one there was before it had a name
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(TransformerConfig)})
    if unknown:
        import megatron.core

        raise SideError(
            f"megatron-core {megatron.core.__version__} has no setting {listing(unknown)}, which "
            "the args of the checkpoint name; install a later one"
        )
    return TransformerConfig(**values)


def load(model: Any, directory: Path) -> None:
    """Load a checkpoint as megatron does; every weight is NaN before, so none is left as it was.

    Raises:
        SideError: weights were not loaded, or are NaN in the checkpoint.
    """
    from megatron.core import dist_checkpointing

    for tensor in _weights(model).values():
        tensor.fill_(torch.nan)
    metadata: dict[str, Any] = {}
    if hasattr(dist_checkpointing, "load_content_metadata"):
        common = dist_checkpointing.load_common_state_dict(str(directory))
        metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or {}
    wanted = {"model": model.sharded_state_dict(metadata=metadata)}
    loaded = dist_checkpointing.load(wanted, str(directory))
    result = model.load_state_dict(loaded["model"], strict=False)
    wrong = [
        name
        for name in (*result.missing_keys, *result.unexpected_keys)
        if not name.endswith("_extra_state")
    ]
    wrong += [name for name, tensor in _weights(model).items() if torch.isnan(tensor).any()]
    if wrong:
        raise SideError(
            f"{directory}: megatron-core has not loaded {len(wrong)} tensors, or found NaN in "
            f"them: {listing(sorted(wrong))}"
        )


def _weights(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    }


if __name__ == "__main__":
    serve(run)
