"""The messages between a loader and a saver.

A loader yields one `Begin`, any number of `Tensors`, one `End`. Tensors are lazy: references to
bytes in the files of `Begin.files`, never the bytes. The names of messages and keys are Megatron's
converter protocol (``"transformer layer 3"``, ``"qkv weight"``); `ckptx.model.canonical_names`
lists them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ckptx.model.spec import ModelSpec
from ckptx.tensors.lazy import LazyTensor

VERSION = 1
"""Rises when a message changes its meaning."""

PASSTHROUGH = "passthrough"
"""The message that carries tensors under the names of their source layout."""

WEIGHT = "weight"
"""The state that every saver writes; no saver of this version writes another."""

TRAINING_STATE = "only weights are converted"
"""Why loaders drop the state of a training; inspection tells it from the rest by it."""


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor as it lies in the source: the unit of the proof that nothing is lost.

    ``name`` tells it from every other (a rank or file is part of it where ranks repeat names);
    ``extent`` is where its bytes are.
    """

    name: str
    extent: LazyTensor


@dataclass(frozen=True, slots=True)
class Dropped:
    """Something of the source that the target will not hold, and why."""

    name: str
    """A tensor, or a part of the source that is no weight (an optimizer file)."""
    reason: str
    """Why, for the report."""
    nbytes: int = 0
    """Its size in bytes; 0 where ``tensors`` tell it."""
    tensors: tuple[LazyTensor, ...] = ()
    """The extents that are not converted."""

    def to_json(self) -> dict[str, Any]:
        """Return name, reason and size as plain values."""
        nbytes = self.nbytes or sum(tensor.nbytes for tensor in self.tensors)
        return {"name": self.name, "reason": self.reason, "bytes": nbytes}


@dataclass(frozen=True, slots=True)
class Begin:
    """What the source is."""

    format: str
    """The plugin's format: ``"hf"``, ``"core"``."""
    layout: str = "hf"
    """How its tensors are named: ``"hf/llama"``; passthrough tensors speak it."""
    parts: Mapping[str, ModelSpec] = field(default_factory=dict)
    """Model dimensions by part: ``"language"``, and ``"vision"``, ``"projection"`` where there are.

    Empty where the family is unknown."""
    files: tuple[str, ...] = ()
    """Absolute paths; `ckptx.tensors.lazy.Stored.file` indexes them."""
    sources: tuple[SourceTensor, ...] = ()
    """Every tensor of the source, dropped ones included."""
    root: str = ""
    """The directory that paths in reports and manifests are relative to."""
    sidecars: Mapping[str, bytes] = field(default_factory=dict)
    """``config.json``, tokenizer files and other small files of a model, by relative path."""
    training: Mapping[str, Any] = field(default_factory=lambda: {"iteration": "release"})
    """``iteration`` (number or ``"release"``), ``consumed_train_samples``, the source's `args`."""
    parallel: Mapping[str, Any] = field(default_factory=dict)
    """How the source is split: ``tp``, ``pp``, ``vpp``, ``ep`` and the layer placement."""
    family: str = ""
    """The family of the whole where there are several parts (``"llava"``); else its part's own."""
    accepted: tuple[str, ...] = ()
    """Settings and keys of the source that the user told to ignore, whatever they change."""
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class Tensors:
    """Tensors of one place in the model, in canonical shape: full, unsharded, [out, in]."""

    name: str
    """``"embeddings"``, ``"transformer layer 3"``, ``"final norm"``, ..., or `PASSTHROUGH`."""
    tensors: Mapping[str, LazyTensor]
    part: str = "language"
    """The key in `Begin.parts` of the part that it is of; names are unique over all parts."""
    state: str = WEIGHT
    """Which state of the parameters these are; `ckptx.protocol.model.collect` refuses others."""


@dataclass(frozen=True, slots=True)
class End:
    """The source has no more tensors; what stays behind, and remarks for the report."""

    dropped: tuple[Dropped, ...] = ()
    notes: tuple[str, ...] = ()


Message: TypeAlias = Begin | Tensors | End
Messages: TypeAlias = Iterator[Message]
