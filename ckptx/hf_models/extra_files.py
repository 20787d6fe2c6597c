"""Files beside a model's weights that plugins ask for: the hook ``side_files``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from ckptx.containers import torch_zip
from ckptx.errors import PluginError, listing
from ckptx.protocol.contracts import SideFile
from ckptx.registry import registry
from ckptx.storage.file_plan import FilePlan
from ckptx.tensors.lazy import LazyTensor


def split_off(
    config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], iteration: int | str
) -> tuple[dict[str, LazyTensor], list[FilePlan], tuple[str, ...]]:
    """Return the tensors that stay with the model, the files for others, and remarks.

    Raises:
        PluginError: a plugin asks for what is not there, for one file twice, or for a place
            outside of the model's directory.
    """
    left = dict(tensors)
    plans: list[FilePlan] = []
    notes: list[str] = []
    for wanted in registry.side_files(config, tuple(tensors), iteration):
        _check(wanted, tensors, {plan.path for plan in plans})
        state = {name: tensors[own] for name, own in wanted.tensors.items()}
        plans.append(torch_zip.plan_file(wanted.path, state))
        place = "the weights hold them, too" if wanted.keep else "not with the weights"
        notes.append(f"{wanted.path} holds {len(state)} tensors ({place})")
        if not wanted.keep:
            left = {name: one for name, one in left.items() if name not in wanted.tensors.values()}
    return left, plans, tuple(notes)


def _check(wanted: SideFile, tensors: Mapping[str, LazyTensor], taken: set[str]) -> None:
    path = PurePosixPath(wanted.path)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise PluginError(f"side file {wanted.path!r}: lies outside of the model's directory")
    if wanted.path in taken:
        raise PluginError(f"side file {wanted.path!r}: is asked for twice")
    missing = [own for own in wanted.tensors.values() if own not in tensors]
    if missing:
        raise PluginError(f"side file {wanted.path!r}: the model has no {listing(missing)}")
