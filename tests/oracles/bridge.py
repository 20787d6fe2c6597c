"""Checkpoints written and read by real Megatron-Bridge on a CPU, with the logits of its models.

Bridge and omegaconf lie where ``make`` puts them, or ``CKPTX_MEGATRON_BRIDGE`` says. It runs in a
process of its own, on the installed megatron-core and the stand-in for Transformer Engine.
What it imports and this needs not, models of other kinds among it, is replaced by empty modules.

    python -m tests.oracles.bridge REQUEST ANSWER      both files of torch.save
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import torch

from .mcore_versions import Empty

ROOT = Path(__file__).parents[2]
ABSENT = {
    *("PIL", "causal_conv1d", "datasets", "einops", "flash_attn", "mamba_ssm", "modelopt"),
    *("nvidia_resiliency_ext", "nvtx", "requests", "six", "triton", "wandb"),
}
BRIDGE = "megatron.bridge"


def place() -> Path | None:
    """Return the directory with ``megatron/bridge``, None where there is none."""
    home = Path(os.environ.get("CKPTX_MEGATRON_BRIDGE") or f"{sys.prefix}/megatron-bridge/0.3.1")
    return home if (home / "megatron/bridge").is_dir() else None


def write(
    directory: Path,
    provider: str,
    fields: dict[str, Any],
    tokens: torch.Tensor,
    tags: dict[str, int] | None = None,
) -> torch.Tensor:
    """Save a model with random weights as ``save_megatron_model`` does; return its logits.

    ``provider`` is a class below ``megatron.bridge.models``. Functions among its fields are named.
    With ``tags`` elements are what `mcore.write` makes of them.
    """
    fields = {"_target_": f"{BRIDGE}.models.{provider}", **fields}
    return _asked({"to": directory, "fields": fields, "tokens": tokens, "tags": tags})


def read(iteration: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Load an iteration as ``load_megatron_model`` does, and return the model's logits."""
    return _asked({"from": iteration, "tokens": tokens})


def _asked(request: dict[str, Any]) -> torch.Tensor:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        question, answer = Path(scratch) / "question.pt", Path(scratch) / "answer.pt"
        torch.save(request, question)
        ran = subprocess.run(
            [sys.executable, "-m", __name__, str(question), str(answer)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not ran.returncode, ran.stderr[-4000:]
        logits: torch.Tensor = torch.load(answer)
        return logits


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of packages that are not installed, empty."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in ABSENT:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Leave it empty."""


def _install() -> None:
    # Before functions of torch.cuda are replaced: torch.compile lists them by identity.
    import torch._dynamo.trace_rules

    torch._dynamo.trace_rules.get_torch_obj_rule_map()
    from . import mcore_cpu

    mcore_cpu.install(transformer_engine=True)
    home = place()
    assert home is not None
    sys.path.append(str(home))
    sys.meta_path.append(_Absent())
    for name in ("torch.utils.tensorboard", "torch.utils.tensorboard.writer"):
        sys.modules[name] = Empty(name)
    for name in (BRIDGE, f"{BRIDGE}.models"):  # their own import every model
        module = Empty(name)
        module.__path__ = [str(home / name.replace(".", "/"))]
        sys.modules[name] = module


def _main(question: Path, answer: Path) -> None:
    _install()
    from megatron.bridge.training import model_load_save as bridge
    from megatron.bridge.utils.instantiate_utils import instantiate
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from .mcore_versions import prepare_to_save

    prepare_to_save(filesystem_async)
    torch.set_grad_enabled(False)
    request = torch.load(question, weights_only=False)
    if "from" in request:
        run = bridge.load_megatron_model
        with bridge.temporary_distributed_context("gloo"):
            (model,) = run(str(request["from"]), use_cpu_init=True, skip_temp_dist_context=True)
            torch.save(_logits(model, request["tokens"]), answer)
        return
    cpu = dict.fromkeys(
        ("gradient_accumulation_fusion", "persist_layer_norm", "apply_rope_fusion"), False
    )
    provider = instantiate({**cpu, **request["fields"]})
    with bridge.temporary_distributed_context("gloo"):
        provider.finalize()
        models = provider.provide_distributed_model(
            wrap_with_ddp=False, use_cpu_initialization=True
        )
        torch.manual_seed(1)
        for name, parameter in models[0].named_parameters():
            key, layer = _key(name)
            if request["tags"]:
                first = request["tags"][key] + layer * parameter.numel()
                parameter.copy_(torch.arange(first, first + parameter.numel()).view_as(parameter))
            else:
                parameter += torch.randn_like(parameter) * 0.2
        torch.save(_logits(models[0], request["tokens"]), answer)
        bridge.save_megatron_model(models, str(request["to"]))


def _key(name: str) -> tuple[str, int]:
    """Return the torch_dist key of a parameter and its place among those stacked there."""
    name = name.removeprefix("module.")
    match = re.match(r"(decoder\.layers\.)(\d+)\.", name)
    return (match[1] + name[match.end() :], int(match[2])) if match else (name, 0)


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    batch, length = tokens.shape
    mask = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), diagonal=1)
    logits: torch.Tensor = model.eval()(tokens, torch.arange(length).expand(batch, length), mask)
    return logits.float()


if __name__ == "__main__":
    _main(*map(Path, sys.argv[1:]))
