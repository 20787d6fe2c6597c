"""A checkpoint of any format, opened to be looked at: what it holds, by which names.

Tensors are whole and have the names that Hugging Face has for them where a schema knows the model,
whatever the ranks hold of each.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from ckptx.errors import CkptxError
from ckptx.protocol.messages import Begin, End, Message
from ckptx.protocol.model import Model, collect
from ckptx.registry import registry
from ckptx.registry.families import hf_tensors
from ckptx.tensors.lazy import LazyTensor

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong with a checkpoint.

    ``kind`` is ``unreadable``, ``incomplete`` (tensors do not fit the model that config or args
    describe), ``unfinished`` (a conversion was killed), ``nan`` or ``inf``.
    """

    kind: str
    message: str
    tensor: str = ""


def opened(
    path: Path, loader: str | None, options: Mapping[str, Any] | None
) -> tuple[Model, tuple[Problem, ...]]:
    """Return a checkpoint, and what is wrong with it if its tensors can still be listed.

    Raises:
        CkptxError: it cannot be read.
    """
    plugin = registry.loader(loader or registry.detect(path))
    messages: Iterator[Message] = iter(plugin.load(path, options or {}))
    begin = next(messages, None)
    if not isinstance(begin, Begin):
        return collect(iter([begin] if begin else [])), ()
    try:
        return collect(chain([begin], messages)), ()
    except CkptxError as error:
        return Model(begin, End()), (Problem("incomplete", str(error)),)


def tensors_by_name(model: Model, names: str = "model") -> tuple[str, Mapping[str, LazyTensor]]:
    """Return how the tensors of a model are named, and the tensors.

    With ``names`` ``"model"`` they are whole: under Hugging Face's names, or canonical ones
    (``"transformer layer 0: qkv weight"``) where Hugging Face has none. With ``"stored"``, and
    where nothing else is known, each is what one place of the files holds.
    """
    if names != "stored" and model.passthrough is not None:
        hf = model.begin.layout.startswith("hf")
        return "huggingface" if hf else "stored", model.passthrough
    if names != "stored" and model.messages:
        try:  # on a copy: the names of Hugging Face have no padding
            return "huggingface", hf_tensors(replace(model, messages=dict(model.messages)))[0]
        except CkptxError as error:
            _log.info("no names of Hugging Face: %s", error)
        return "canonical", {
            f"{message}: {key}": tensor
            for message, tensors in model.messages.items()
            for key, tensor in tensors.items()
        }
    return "stored", {source.name: source.extent for source in model.begin.sources}
