"""What reading either form of a Megatron checkpoint gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ckptx.model.layout import Layout, Parts
from ckptx.protocol.messages import Dropped, SourceTensor, Tensors
from ckptx.storage.location import Location
from ckptx.tensors.lazy import LazyTensor

Excluded: TypeAlias = Callable[[str, LazyTensor], bool]
"""Says of a weight, by its name, that it is no part of what a layout describes."""

ENGINE_STATE = "quantisation state of Transformer Engine; holds no weights"


BUFFERS = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")
"""Endings of names of rotary frequencies, which old releases and forks save."""
MADE_ANEW = "no weights: the model makes it anew"


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that was read as far as its metadata goes."""

    place: Location
    args: Mapping[str, Any]
    files: tuple[str, ...]
    sources: tuple[SourceTensor, ...]
    dropped: Sequence[Dropped]
    dtype: str
    messages: Callable[[Layout, Parts], Iterator[Tensors]]
    """Yields canonical tensors, once names and dimensions are known."""
    weights: dict[str, LazyTensor]
    """What the first rank holds; of ``torch_dist`` everything, layers stacked or not."""
    cut: int = 1
    """Into how many tensor-parallel parts these weights are cut."""
    version: Any = None
    """The ``checkpoint_version`` of rank files."""
    apart: Mapping[str, Sequence[LazyTensor]] = field(default_factory=dict)
    """What `Excluded` has named, by name; of several ranks, what each of them holds."""
    notes: Sequence[str] = ()

    @property
    def names(self) -> list[str]:
        """The names of all tensors, a rank's behind its own."""
        return [source.name for source in self.sources]


def exclude_nothing(_: str, __: LazyTensor) -> bool:
    """Take everything for what a layout describes."""
    return False
