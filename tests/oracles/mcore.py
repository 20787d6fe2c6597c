"""Checkpoints written and read by real megatron-core, with the logits it computes from them.

Of ckptx it takes how megatron runs on a CPU and what it makes of args, nothing that converts. The
calling process imports no megatron: a server process does once per session (`mcore_server`) and
forks one process per rank for every call (`mcore_rank`). One server runs the local spec without
Transformer Engine, another the TE spec on the stand-in.

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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from . import mcore_versions
from .mcore_args import ArgsNames, model_from_args
from .mcore_model import Layout, Model

__all__ = [
    "ArgsNames",
    "Format",
    "Layout",
    "Model",
    "OracleError",
    "checkpoint_args",
    "model_from_args",
    "read",
    "stop",
    "write",
]

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Mapping

    import numpy.typing as npt

Format = Literal["torch_dist", "torch"]


class OracleError(RuntimeError):
    """Megatron refused or crashed; the message is the failing rank's traceback."""


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
    version: str | None = None


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
    format: Format = "torch_dist",
    seed: int = 0,
    args: Mapping[str, Any] | None = None,
    args_names: ArgsNames = "0.16",
    iteration: int | Literal["release"] = 10,
    content_metadata: Mapping[str, Any] | None = None,
    verl: Mapping[str, Any] | None = None,
    tags: Mapping[str, int] | None = None,
    timeout: float = 120.0,
    version: str | None = None,
) -> torch.Tensor:
    """Write a checkpoint with random weights into ``directory`` and return the model's logits.

    ``directory`` becomes what megatron's ``--save`` is: it receives the tracker file and
    ``iter_0000010`` or ``release``. ``args`` is added to the args namespace or replaces
    its fields; ``args_names`` chooses between layernorm_epsilon (core 0.16) and norm_epsilon
    (up to 0.15).
    ``content_metadata`` steers sharded_state_dict, e.g. ``{"singleton_local_shards": True}``.
    With ``verl`` the directory becomes what verl's Megatron workers save below ``actor``; its
    ``head`` is None, or the bias (True, False) of a head with one output; without ``weights`` only
    states are saved.
    With ``tags`` an element of a weight is the number given for its torch_dist key plus its place
    among the elements of the whole, row-major.
    ``version`` is a release that `mcore_versions` finds, the installed one if None.

    Returns:
        Float32 logits [batch, sequence, padded vocabulary], computed by megatron at ``layout``.
    """
    options = {
        "seed": seed,
        "args": dict(args or {}),
        "args_names": args_names,
        "iteration": iteration,
        "content_metadata": dict(content_metadata or {}),
        **({} if verl is None else {"verl": dict(verl)}),
        "tags": tags,
    }
    request = Request(
        "write",
        Path(directory),
        format,
        model.spec,
        layout,
        model,
        _tokens(tokens),
        options,
        timeout,
        version,
    )
    return torch.from_numpy(ask(request))


def read(
    model: Model | None,
    layout: Layout,
    directory: Path,
    tokens: object,
    *,
    format: Format = "torch_dist",
    weights_only: bool = True,
    strict: bool = True,
    strictness: str | None = None,
    timeout: float = 120.0,
    version: str | None = None,
) -> torch.Tensor:
    """Load a checkpoint the way megatron does at its default strictness; return the logits.

    torch_dist: dist_checkpointing.load with every argument at its default. torch: each rank
    unpickles its own file; with ``weights_only`` under megatron's safe globals, as megatron does
    since core 0.14, or without, as before (common.pt of torch_dist has no choice). Then
    ``load_state_dict``; ``strict=False`` forgives absent ``_extra_state`` and nothing else, as
    megatron.training does in the end. Every parameter is NaN before, so one that is not loaded
    shows. ``strictness`` is a value of megatron's StrictHandling. With ``model`` None the model is
    built from the checkpoint's own args, as with ``--use-checkpoint-args``.

    Returns:
        Float32 logits [batch, sequence, padded vocabulary].
    """
    if model is None:
        model = model_from_args(checkpoint_args(directory, format=format, version=version))
    request = Request(
        "read",
        Path(directory),
        format,
        model.spec,
        layout,
        model,
        _tokens(tokens),
        {"weights_only": weights_only, "strict": strict, "strictness": strictness},
        timeout,
        version,
    )
    return torch.from_numpy(ask(request))


def checkpoint_args(
    directory: Path,
    *,
    format: Format = "torch_dist",
    version: str | None = None,
) -> Namespace:
    """Return the args of a checkpoint, unpickled where megatron is; enums arrive as their names.

    torch_dist: by dist_checkpointing.load_common_state_dict, so under torch's weights_only with
    megatron's list of safe globals. torch: by torch.load of the first rank's file.
    """
    return ask(Request("args", Path(directory), format, "local", version=version))


class _Server:
    """A process that has imported megatron and forks ranks on request."""

    def __init__(self, spec: str, version: str | None) -> None:
        mine, theirs = socket.socketpair()
        package = __package__ or ""
        root = Path(__file__).parents[package.count(".") + 1]
        place = None if version is None else mcore_versions.place(version)
        if version is not None and place is None:
            raise OracleError(f"megatron-core {version} is not here")
        first = [str(root), *([] if place is None else [str(place)])]
        program = (
            f"import sys; sys.path[:0] = {first!r}; "
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

    def ask(self, request: Request) -> Any:
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


_servers: dict[tuple[int, str, str | None], _Server] = {}


def ask(request: Request) -> Any:
    """Return what the ranks of a request compute; its server starts on the first."""
    key = (os.getpid(), request.spec, request.version)
    server = _servers.get(key)
    if server is None or not server.alive():
        server = _servers[key] = _Server(request.spec, request.version)
    return server.ask(request)


@atexit.register
def stop() -> None:
    """End this process's servers; the next call starts them again."""
    for key in [key for key in _servers if key[0] == os.getpid()]:
        _servers.pop(key).stop()
