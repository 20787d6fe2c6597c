"""The logits of a DeepSpeed checkpoint: gathered by DeepSpeed itself, computed by transformers.

DeepSpeed's gatherer asks torch to unpickle with full trust. It does not get it: torch's own setting
holds every `torch.load` of this process to the globals that are allowed, which are torch's and the
records named here.

Source: deepspeedai/DeepSpeed deepspeed/utils/zero_to_fp32.py @ v0.19.8,
pytorch/pytorch torch/serialization.py @ v2.13.0.
"""

from __future__ import annotations

import importlib
import os
import re
import traceback
from collections.abc import Mapping
from typing import Any

import torch

from ckptx.errors import listing
from ckptx.verification.frameworks import transformers_model, transformers_side
from ckptx.verification.frameworks.worker import SideError, first_sentence, serve

RECORDS = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Classes in the pickles of ZeRO's checkpoints: numbers with names, which do nothing when built."""
_REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+)")


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """Save float32 logits [batch, sequence, vocabulary] of the tokens.

    The answer is ``refused`` with the reason where DeepSpeed does not gather a whole model of these
    names: it leaves out frozen weights of ZeRO 1, and reads no tensor-parallel ranks.
    """
    try:
        model = filled(job["directory"], _gathered(job["root"], job["tag"]))
    except Exception as error:
        traceback.print_exc()  # for --verbose
        return {"refused": _reason(error)}
    return transformers_side.save_logits(model, job)


def _gathered(root: str, tag: str) -> dict[str, torch.Tensor]:
    """Return the weights by the names of the module that was trained; masters are float32."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}
    for path in RECORDS:
        module, name = path.rsplit(".", 1)
        if (record := _found(module, name)) is not None:
            torch.serialization.add_safe_globals([record])
    gather: Any = importlib.import_module("deepspeed.utils.zero_to_fp32")
    state: dict[str, torch.Tensor] = gather.get_fp32_state_dict_from_zero_checkpoint(root, tag)
    return state


def _found(module: str, name: str) -> Any:
    """Return a class of DeepSpeed, None in versions that have it elsewhere."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def filled(directory: str, state: Mapping[str, torch.Tensor]) -> Any:
    """Return the model of the config in a directory with these weights, and no others.

    Of weights that the model ties one name is enough.

    Raises:
        SideError: names are missing or left over, or tied weights differ.
        RuntimeError: shapes differ.
    """
    model = transformers_model.unfilled(directory, "float32")
    result = model.load_state_dict(state, strict=False)
    tied = _tied(model)
    missing = [
        name for name in result.missing_keys if not any(other in state for other in tied[name])
    ]
    if missing:
        raise SideError(
            f"it leaves out {len(missing)} of the model's weights: {listing(sorted(missing))}"
        )
    if left := sorted(result.unexpected_keys):
        raise SideError(f"it finds {len(left)} tensors that the model has not: {listing(left)}")
    for name, others in tied.items():
        for other in others - {name}:
            if name in state and other in state and not _same(state[name], state[other]):
                raise SideError(f"{name} and {other} are tied in the model, and differ")
    return model.eval()


def _tied(model: Any) -> dict[str, set[str]]:
    """Return for each name of a model's state all names of the same parameter, its own too."""
    owners: dict[int, set[str]] = {}
    names = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    for name, owner in names.items():
        owners.setdefault(owner, set()).add(name)
    return {name: owners[owner] for name, owner in names.items()}


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, 0, 0, equal_nan=True)


def _reason(error: Exception) -> str:
    """Return why there is no model, in one short line."""
    match = _REFUSED_GLOBAL.search(str(error))
    if match:
        return f"the pickles hold {match[1]}, which is not unpickled for it"
    return first_sentence(error)


if __name__ == "__main__":
    serve(run)
