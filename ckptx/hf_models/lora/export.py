"""Keep the adapter of a training checkpoint, as peft saves one: its tensors and its config."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ckptx.errors import FormatError
from ckptx.hf_models.lora.config import ADAPTER_CONFIG
from ckptx.hf_models.lora.extract import Adapter, ExtractedAdapters
from ckptx.hf_models.lora.names import PREFIX, TOKENS
from ckptx.protocol.messages import Dropped
from ckptx.tensors.lazy import LazyTensor

_NOT_MINE = "only the adapter is converted"


def exported(
    separated: ExtractedAdapters, model: Mapping[str, Any]
) -> tuple[dict[str, LazyTensor], dict[str, Any], tuple[Dropped, ...], tuple[str, ...]]:
    """Return the tensors, their config, what is dropped, and remarks.

    ``model`` is the config of the base, empty if it is unknown.

    Raises:
        FormatError: there is no adapter, or more than one, or its config cannot be known.
    """
    if len(separated.adapters) != 1:
        found = len(separated.adapters) or "no"
        raise FormatError(f"{separated.begin.root}: holds {found} adapters, expected one to save")
    (adapter,) = separated.adapters
    adapter.config.refuse_residual()
    config, note = _config(adapter, model)
    biases = _trained_biases(adapter, separated.tensors)
    own = {**adapter.tensors, **{key: separated.tensors[name] for key, name in biases.items()}}
    tensors = {PREFIX + key: tensor for key, tensor in own.items()}
    left = separated.tensors.keys() - biases.values()
    base = tuple(tensor for name, tensor in separated.tensors.items() if name in left)
    size = sum(tensor.nbytes for tensor in base)
    dropped = (Dropped("the base model", _NOT_MINE, size, base),) if base else ()
    return tensors, config, dropped, (note,)


def _config(adapter: Adapter, model: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the config to write, whose scale has been checked for every module."""
    names, ranks = adapter.names().values(), adapter.ranks()
    kinds = {name.kind for name in names}
    whole = {name.path for name in names if name.kind in ("", "saved")}
    said = dict(adapter.config.said)
    if said.get("target_modules") or said.get("target_parameters"):
        if not said.get("target_parameters"):
            for module, rank in ranks.items():
                adapter.config.scale(module, rank)
        return {**said, "inference_mode": True}, f"{ADAPTER_CONFIG} is {adapter.config.place}"
    if TOKENS in kinds or any(name.module != name.path for name in names):
        raise FormatError(
            f"{adapter.place}: trained rows and updates of parameters need the {ADAPTER_CONFIG} "
            "of the training, which says what they are of; put it beside"
        )
    for module, rank in ranks.items():
        adapter.config.scale(module, rank)
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else 8
    causal = any(str(one).endswith("ForCausalLM") for one in model.get("architectures") or ())
    made = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": model.get("_name_or_path") or None,
        "inference_mode": True,
        "r": common,
        "lora_alpha": said["lora_alpha"],
        "lora_dropout": 0.0,
        "target_modules": sorted(ranks),
        "rank_pattern": {re.escape(m): rank for m, rank in ranks.items() if rank != common},
        "alpha_pattern": {},
        "bias": "none",
        "lora_bias": "lora_B.bias" in kinds,
        "use_dora": "lora_magnitude_vector" in kinds,
        "use_rslora": bool(said.get("use_rslora")),
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in whole}) or None,
    }
    return (
        made,
        f"{ADAPTER_CONFIG} was made from the tensors and {adapter.config.place}; biases count as "
        "untrained",
    )


def _trained_biases(adapter: Adapter, base: Mapping[str, LazyTensor]) -> dict[str, str]:
    """Return the biases that were trained with the adapter: their keys in its file, their names."""
    trained = adapter.config.said.get("bias") or "none"
    wrapped = adapter.ranks()
    found = {}
    for name in base:
        module, _, last = name.rpartition(".")
        if last == "bias" and (trained == "all" or (trained == "lora_only" and module in wrapped)):
            found[f"{module}{'.base_layer' if module in wrapped else ''}.bias"] = name
    return found
