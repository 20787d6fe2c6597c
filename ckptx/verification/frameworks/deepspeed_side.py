"""The logits of a DeepSpeed checkpoint: gathered by DeepSpeed itself, computed by transformers.

DeepSpeed's gatherer asks torch to unpickle with full trust. It does not get it: torch's own setting
holds every `torch.load` of this process to the globals that are allowed, which are torch's and the
records named here.

Source: deepspeedai/DeepSpeed deepspeed/utils/zero_to_fp32.py @ v0.19.8,
pytorch/pytorch torch/serialization.py @ v2.13.0.
"""

from __future__ import annotations

import contextlib
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
        if match := _REFUSED_GLOBAL.search(str(error)):
            return {"refused": f"the pickles hold {match[1]}, which is not unpickled for it"}
        return {"refused": first_sentence(error)}
    return transformers_side.save_logits(model, job)


def _gathered(root: str, tag: str) -> dict[str, torch.Tensor]:
    """Return the weights by the names of the module that was trained; masters are float32."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}
    for path in RECORDS:
        module, name = path.rsplit(".", 1)
        with contextlib.suppress(ImportError, AttributeError):  # other versions have it elsewhere
            record = getattr(importlib.import_module(module), name)
            torch.serialization.add_safe_globals([record])
    gather: Any = importlib.import_module("deepspeed.utils.zero_to_fp32")
    state: dict[str, torch.Tensor] = gather.get_fp32_state_dict_from_zero_checkpoint(root, tag)
    return state


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
    missing = sorted(name for name in result.missing_keys if not tied[name] & state.keys())
    if missing:
        raise SideError(f"it leaves out {len(missing)} of the model's weights: {listing(missing)}")
    if left := sorted(result.unexpected_keys):
        raise SideError(f"it finds {len(left)} tensors that the model has not: {listing(left)}")
    for name, others in tied.items():
        for other in (others - {name}) & state.keys() if name in state else ():
            one, two = state[name], state[other]
            if one.shape != two.shape or not torch.allclose(one, two, 0, 0, equal_nan=True):
                raise SideError(f"{name} and {other} are tied in the model, and differ")
    return model.eval()


def _tied(model: Any) -> dict[str, set[str]]:
    """Return for each name of a model's state all names of the same parameter, its own too."""
    owners: dict[int, set[str]] = {}
    names = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    for name, owner in names.items():
        owners.setdefault(owner, set()).add(name)
    return {name: owners[owner] for name, owner in names.items()}


if __name__ == "__main__":
    serve(run)
