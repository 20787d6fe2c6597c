"""Checkpoints written and read by real megatron-core, with the logits it computes from them.

Nothing here imports ckptx or, in the calling process, megatron: a server process imports megatron
once per session (`mcore_server`) and forks one process per rank for every call (`mcore_rank`). One
server runs the local spec without Transformer Engine, another the TE spec on the stand-in.

The weights of `write` are a function of (seed, torch_dist key) alone, so the same `Model` written
at two layouts is the same logical model. Every parameter differs from its default.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from math import lcm
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Mapping

    import numpy.typing as npt

Format = Literal["torch_dist", "torch"]
ArgsNames = Literal["0.16", "0.15"]


class OracleError(RuntimeError):
    """Megatron refused or crashed; the message is the failing rank's traceback."""


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
    """

    config: Mapping[str, Any]
    gpt: Mapping[str, Any]
    spec: Literal["local", "te"] = "te"
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Request:
    """One call to a server: what `mcore_rank` does on every rank."""

    action: Literal["write", "read", "args"]
    directory: Path
    format: Format
    spec: str
    layout: Layout = field(default_factory=Layout)
    model: Model | None = None
    tokens: npt.NDArray[np.int64] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 120.0


def _tokens(tokens: object) -> npt.NDArray[np.int64]:
    array = np.asarray(tokens, dtype=np.int64)
    if array.ndim != 2:
        raise ValueError(f"tokens are [batch, sequence], not of shape {list(array.shape)}")
    return array


def write(
    model: Model,
    layout: Layout,
    directory: Path,
    tokens: object,
    *,
    format: Format = "torch_dist",  # noqa: A002 - the field's term
    seed: int = 0,
    args: Mapping[str, Any] | None = None,
    args_names: ArgsNames = "0.16",
    iteration: int | Literal["release"] = 10,
    content_metadata: Mapping[str, Any] | None = None,
    timeout: float = 120.0,
) -> torch.Tensor:
    """Write a checkpoint with random weights into ``directory`` and return the model's logits.

    ``directory`` becomes what megatron's ``--save`` is: it receives the tracker file and
    ``iter_0000010`` or ``release``. ``args`` is added to, or replaces fields of, the args namespace;
    ``args_names`` chooses between layernorm_epsilon (core 0.16) and norm_epsilon (up to 0.15).
    ``content_metadata`` steers sharded_state_dict, e.g. ``{"singleton_local_shards": True}``.

    Returns:
        Float32 logits [batch, sequence, padded vocabulary], computed by megatron at ``layout``.
    """
    options = {
        "seed": seed,
        "args": dict(args or {}),
        "args_names": args_names,
        "iteration": iteration,
        "content_metadata": dict(content_metadata or {}),
    }
    request = Request(
        "write", Path(directory), format, model.spec, layout, model, _tokens(tokens), options, timeout
    )
    return torch.from_numpy(_ask(request))


def read(
    model: Model | None,
    layout: Layout,
    directory: Path,
    tokens: object,
    *,
    format: Format = "torch_dist",  # noqa: A002 - the field's term
    timeout: float = 120.0,
) -> torch.Tensor:
    """Load a checkpoint the way megatron does at its default strictness; return the logits.

    torch_dist: dist_checkpointing.load with every argument at its default, then
    ``load_state_dict(strict=True)``. torch: each rank unpickles its own file (weights_only=False),
    then the same. Every parameter is NaN before, so one that is not loaded shows. With ``model``
    None the model is built from the checkpoint's own args, as with ``--use-checkpoint-args``.

    Returns:
        Float32 logits [batch, sequence, padded vocabulary].
    """
    if model is None:
        model = model_from_args(checkpoint_args(directory, format=format))
    request = Request(
        "read", Path(directory), format, model.spec, layout, model, _tokens(tokens), {}, timeout
    )
    return torch.from_numpy(_ask(request))


def checkpoint_args(
    directory: Path,
    *,
    format: Format = "torch_dist",  # noqa: A002 - the field's term
) -> Namespace:
    """Return the args of a checkpoint, unpickled where megatron is; enums arrive as their names.

    torch_dist: by dist_checkpointing.load_common_state_dict, so under torch's weights_only with
    megatron's list of safe globals. torch: by torch.load of the first rank's file.
    """
    return _ask(Request("args", Path(directory), format, "local"))


_ACTIVATIONS = ("swiglu", "squared_relu", "quick_geglu")
_SAME_NAME = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "normalization",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "rotary_interleaved",
    "window_size",
    "softmax_type",
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "rotary_base",
    "rotary_percent",
    "rotary_scaling_factor",
    "rope_type",
    "mscale",
    "mscale_all_dim",
    "beta_fast",
    "beta_slow",
    "original_max_position_embeddings",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_layer_freq",
    "moe_grouped_gemm",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "moe_router_score_function",
    "moe_router_pre_softmax",
    "moe_router_enable_expert_bias",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
    "moe_router_load_balancing_type",
    "moe_token_dispatcher_type",
    "mtp_num_layers",
    "heterogeneous_layers_config_path",
)
_MLA_ONLY = frozenset(
    "q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rotary_base rotary_percent "
    "rotary_scaling_factor rope_type mscale mscale_all_dim beta_fast beta_slow "
    "original_max_position_embeddings".split()
)


def _first_of(args: object, *names: str, default: object = None) -> Any:  # noqa: ANN401 - args hold anything
    return next((getattr(args, name) for name in names if hasattr(args, name)), default)


def model_from_args(args: object) -> Model:
    """Return the model that megatron's pretrain_gpt builds from these args.

    Facts of megatron/training/arguments.py core_transformer_config_from_args and gpt_builders.py at
    core_v0.16.1; the names of 0.15 and before (norm_epsilon, apply_layernorm_1p) are taken too.
    gpt_builders passes no rope_scaling_factor, so it is GPTModel's 8 whatever the args say.

    Raises:
        AttributeError: a field without which megatron cannot build the model is absent.
    """
    mla = bool(_first_of(args, "multi_latent_attention"))
    config: dict[str, Any] = {
        name: getattr(args, name)
        for name in _SAME_NAME
        if getattr(args, name, None) is not None and (mla or name not in _MLA_ONLY)
    }
    for name in ("num_layers", "hidden_size", "num_attention_heads"):
        config[name] = getattr(args, name)
    config["layernorm_epsilon"] = _first_of(args, "layernorm_epsilon", "norm_epsilon", default=1e-5)
    config["layernorm_zero_centered_gamma"] = bool(
        _first_of(args, "layernorm_zero_centered_gamma", "apply_layernorm_1p", default=False)
    )
    config["num_moe_experts"] = _first_of(args, "num_experts")
    config["num_query_groups"] = (
        getattr(args, "num_query_groups") if _first_of(args, "group_query_attention") else None  # noqa: B009 - must exist here
    )
    chosen = [name for name in _ACTIVATIONS if _first_of(args, name)]
    if chosen:
        config["activation_func"] = {"swiglu": "silu", "quick_geglu": "quick_gelu"}.get(
            chosen[-1], chosen[-1]
        )
        config["gated_linear_unit"] = chosen[-1] != "squared_relu"
    elif _first_of(args, "bias_gelu_fusion", "openai_gelu"):
        config["activation_func"] = "gelu_tanh"
    gpt = {
        "vocab_size": getattr(args, "padded_vocab_size"),  # noqa: B009 - absent is an error
        "max_sequence_length": getattr(args, "max_position_embeddings"),  # noqa: B009 - absent is an error
        "share_embeddings_and_output_weights": not _first_of(
            args, "untie_embeddings_and_output_weights", default=False
        ),
        "position_embedding_type": _first_of(
            args, "position_embedding_type", default="learned_absolute"
        ),
        "rotary_percent": _first_of(args, "rotary_percent", default=1.0),
        "rotary_base": _first_of(args, "rotary_base", default=10000),
        "rope_scaling": bool(_first_of(args, "use_rope_scaling", default=False)),
    }
    spec = "te" if _first_of(args, "transformer_impl") == "transformer_engine" else "local"
    return Model(config, gpt, spec, _first_of(args, "params_dtype", default=torch.float32))


class _Server:
    """A process that has imported megatron and forks ranks on request."""

    def __init__(self, spec: str) -> None:
        mine, theirs = socket.socketpair()
        package = __package__ or ""
        root = Path(__file__).parents[package.count(".") + 1]
        program = (
            f"import sys; sys.path.insert(0, {str(root)!r}); "
            f"from {package}.mcore_server import serve; serve({theirs.fileno()}, {spec!r})"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        theirs.close()
        self._connection = Connection(mine.detach())

    def ask(self, request: Request) -> Any:  # noqa: ANN401 - logits or a namespace
        """Return the answer of the ranks, or raise `OracleError` with their traceback."""
        start_allowance = 120.0
        self._connection.send(request)
        if not self._connection.poll(request.timeout + start_allowance):
            self.stop()
            raise OracleError(f"no answer from the megatron server to {request.action}")
        try:
            succeeded, answer = self._connection.recv()
        except EOFError:
            raise OracleError("the megatron server died; its output is above") from None
        if not succeeded:
            raise OracleError(answer)
        return answer

    def alive(self) -> bool:
        """Tell whether the process runs."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End the server; it ends its ranks."""
        self._connection.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


_servers: dict[tuple[int, str], _Server] = {}


def _ask(request: Request) -> Any:  # noqa: ANN401 - logits or a namespace
    key = (os.getpid(), request.spec)
    server = _servers.get(key)
    if server is None or not server.alive():
        server = _servers[key] = _Server(request.spec)
    return server.ask(request)


@atexit.register
def stop() -> None:
    """End this process's servers; the next call starts them again."""
    for key in [key for key in _servers if key[0] == os.getpid()]:
        _servers.pop(key).stop()
