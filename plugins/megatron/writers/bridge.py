"""What Megatron-Bridge writes beside the tensors, and reads.

    ROOT/latest_train_state.pt, latest_checkpointed_iteration.txt
    ROOT/iter_0000010/run_config.yaml, train_state.pt, tokenizer/, and the files of torch_dist

The common state has no ``args``: the model is what ``run_config.yaml`` says under ``model``.

Source: NVIDIA-NeMo/Megatron-Bridge src/megatron/bridge/training/{checkpointing,state,
model_load_save}.py, training/utils/checkpoint_utils.py @ v0.3.1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ckptx.containers import torch_zip
from ckptx.errors import FormatError, SchemaError, listing
from ckptx.model.family import Family
from ckptx.schemas.megatron_settings.providers import from_provider, to_provider
from ckptx.schemas.megatron_settings.row_blocks import SIZES
from ckptx.storage import gather
from ckptx.storage.location import Location
from ckptx.storage.source_file import read_small
from ckptx.storage.yaml_text import yaml_value
from ckptx.tensors.lazy import Filled, Stored

RUN_CONFIG, TRAIN_STATE = "run_config.yaml", "train_state.pt"
LATEST = f"latest_{TRAIN_STATE}"
_LARGEST = 4 << 20  # bytes of a run_config.yaml
_TRAINING = "megatron.bridge.training."


def section(path: Location, name: str) -> Mapping[str, Any]:
    """Return a section of a ``run_config.yaml``, empty where it has none.

    Raises:
        FormatError: the file is damaged, or the section is no mapping.
    """
    said = yaml_value(read_small(path, _LARGEST), f"{path}: not valid YAML")
    found = said.get(name) or {} if isinstance(said, dict) else None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise FormatError(f"{path}: expected a mapping, and one at {name!r} if it is there")
    return found


def settings(place: Location, accepted: Collection[str]) -> Mapping[str, Any]:
    """Return what the run's config says of the model, as args."""
    path = place / RUN_CONFIG
    if not path.is_file():
        raise FormatError(f"{path}: is missing; Megatron-Bridge describes the model there")
    fields = section(path, "model")
    if blocks := [name for name in SIZES if fields.get(name) and name not in accepted]:
        raise SchemaError(
            f"{path}: {listing(blocks)}: gate and up lie in blocks of rows as Bridge saved them up "
            f"to 0.4, in halves since 0.5; --accept-arg {blocks[0]} reads halves"
        )
    return from_provider(fields, accepted) if fields else {}


def files(args: Mapping[str, Any], family: Family) -> Mapping[str, bytes]:
    """Return the run's config and its state, of a run that has no optimizer."""
    import yaml

    tokenizer = {
        "_target_": f"{_TRAINING}tokenizers.config.TokenizerConfig",
        "tokenizer_type": args["tokenizer_type"],
        "tokenizer_model": args["tokenizer_model"],
    }
    config = {
        "_target_": f"{_TRAINING}config.ConfigContainer",
        "model": to_provider(args, family),
        "checkpoint": {
            "_target_": f"{_TRAINING}config.CheckpointConfig",
            "ckpt_format": "torch_dist",
            **dict.fromkeys(("save_optim", "save_rng", "fully_parallel_save"), False),
        },
        "tokenizer": tokenizer if args["tokenizer_model"] else None,
    }
    counts = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
    state = {"step": args["iteration"]} | {name: args.get(name) or 0 for name in counts}
    tensors = {name: Filled("int64", (), count) for name, count in state.items()}
    tensors["floating_point_operations_so_far"] = Filled("float32", ())
    tensors |= {name: Filled("bool", ()) for name in ("do_train", "do_valid", "do_test")}
    return {
        RUN_CONFIG: yaml.safe_dump(config).encode(),
        TRAIN_STATE: torch_zip.small_file(TRAIN_STATE, tensors),
    }


def step(path: Location) -> int:
    """Return the iteration that a state of training names.

    Raises:
        FormatError: the file is damaged.
    """
    state = torch_zip.read(path, 0)
    found = state.get("step") if isinstance(state, Mapping) else None
    if not isinstance(found, Stored) or (found.dtype[:3], found.shape) != ("int", ()):
        raise FormatError(f"{path}: expected a dictionary with the number 'step' in it")
    return int(gather.read(found, [str(path)])[()])
