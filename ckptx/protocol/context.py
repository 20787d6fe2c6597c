"""What the engine tells a plugin, apart from the plugin's own options, which cannot change it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from ckptx.storage.spool import Spool


Options: TypeAlias = Mapping[str, Any]
"""A plugin's own options by their click names."""


@dataclass(frozen=True, slots=True)
class Wants:
    """What of a checkpoint is to be loaded; a loader is told this, and never by whom."""

    weights: bool = True
    """Whole weights: adapters are merged into those that they were trained on."""
    adapters: bool = False
    """Adapters alone. With ``weights`` these are what is left where the weights are not given."""
    states: tuple[str, ...] = ("weight",)
    """What of each parameter: its weight."""


WEIGHTS, ADAPTERS = Wants(), Wants(weights=False, adapters=True)
ANYTHING = Wants(adapters=True)
"""What is only looked at."""


@dataclass(frozen=True, slots=True)
class Context:
    """The conversion that a loader or a saver is part of."""

    dtype: str | None = None
    """Dtype to convert to; the engine casts what travels between the two."""
    hf_base: Path | None = None
    """Directory of a Hugging Face model: source of config, tokenizer, and of an adapter's base."""
    fill_from_base: tuple[str, ...] = ()
    """Patterns of tensor names that may be filled from ``hf_base``."""
    target: Path | None = None
    """The path that the user named, for the names of single files."""
    wants: Wants = ANYTHING
    """What of the source is to be loaded."""
    spool: Spool | None = None
    """Loaders put tensors there that exist in memory only."""
    model_type: str = "GPT"
    """What Megatron-style modules are told."""
    checking: bool = True
    """Whether Megatron-style modules must send messages in protocol order."""


UNTOLD = Context()
"""What a plugin goes by that is called without a context."""

_READING = ("dtype", "hf_base", "fill_from_base")


def split_options(options: Options | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the loader's own among keywords, and those of the engine that concern reading."""
    own = dict(options or {})
    engine = {name: own.pop(name) for name in _READING if name in own}
    if engine.get("hf_base") is not None:
        engine["hf_base"] = Path(engine["hf_base"])
    return own, engine
