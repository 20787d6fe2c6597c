"""Whether a config still describes tensors that were changed beside it."""

from __future__ import annotations

from collections.abc import Mapping

from ckptx.errors import CkptxError
from ckptx.hf_models.directory import hf_messages
from ckptx.protocol.from_names import main_dtype
from ckptx.protocol.messages import Begin, End
from ckptx.protocol.sidecars import CONFIG, read_config
from ckptx.registry.families import family_of
from ckptx.tensors.lazy import LazyTensor


def _config_notes(begin: Begin, tensors: Mapping[str, LazyTensor]) -> tuple[str, ...]:
    """Return what is to be checked in the config that stays beside the tensors."""
    config = read_config(begin.sidecars, begin.root) or {}
    if family_of(config) is None:
        named = ", ".join(map(str, config.get("architectures") or ["nothing"]))
        return (
            f"{CONFIG} is kept and says {named}, which no schema knows: check that it still "
            "describes the tensors",
        )
    notes: list[str] = []
    said = config.get("dtype") or config.get("torch_dtype")
    dtype = main_dtype(tensors)
    if said not in (None, dtype) and "quantization_config" not in config:
        notes.append(f"{CONFIG}: dtype was {said} and is now {dtype}, as most weights are")
    try:
        for message in hf_messages(begin, tensors):
            if isinstance(message, End):
                notes += message.notes
    except CkptxError as error:
        notes.append(
            f"{CONFIG} is kept and no longer describes the tensors: {error}. Change it before the "
            "model is loaded by it"
        )
    return tuple(notes)
