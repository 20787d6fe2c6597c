"""What NeMo 2 writes: the model in ``context``, torch_dist in ``weights``, keys behind ``module.``.

    NAME/context/model.yaml, io.json, nemo_tokenizer/
    NAME/weights/metadata.json, .metadata, common.pt, __0_0.distcp, ...

Source: NVIDIA-NeMo/NeMo nemo/lightning/io/mixin.py, nemo/lightning/ckpt_utils.py @ v2.4.0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ckptx.plugins.megatron.writers import bridge
from ckptx.schemas.megatron_settings.providers import from_provider
from ckptx.storage.location import Location

TOKENIZER = "../context/nemo_tokenizer"


def weights_of(source: Location) -> Location:
    """Return where the weights of a checkpoint lie, of NeMo 2 or not."""
    inside = source / "weights"
    return inside if (source / "context").is_dir() and inside.is_dir() else source


def wrote(place: Location) -> bool:
    """Return whether there is a context beside the weights."""
    return place.name == "weights" and _model(place).is_file()


def settings(place: Location, accepted: Collection[str]) -> Mapping[str, Any]:
    """Return what the context says of the model, as args."""
    config = bridge.section(_model(place), "config")
    return from_provider(config, accepted) if "_target_" in config else {}


def _model(place: Location) -> Location:
    return place.parent / "context" / "model.yaml"
