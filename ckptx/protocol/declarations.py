"""What a plugin declares of its formats: enough to list, name and detect them, importing nothing.

An entry point ``formats_X`` of the group ``ckptx`` names a tuple of `Format`, as a rule in the
``__init__`` of the plugin's folder:

    formats_npz = "ckptx_npz:FORMATS"

    FORMATS = (Format("npz", "NumPy archives", loader="ckptx_npz.npz:Npz", files=("weights.npz",)),)

This module and whoever declares import neither numpy nor any loader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Format:
    """One format: its names, its files, its classes, and what they can do."""

    name: str
    """What follows ``--from`` and ``--to``: ``"hf"``."""
    summary: str
    """What it is, in a few words."""
    loader: str = ""
    """``module:Class`` of the loader; empty where nothing reads the format."""
    saver: str = ""
    """``module:Class`` of the saver; it may be the same class."""
    aliases: tuple[str, ...] = ()
    """Other names. Of several formats with one alias the source says which is read; the first, by
    name, is written."""
    files: tuple[str, ...] = ()
    """Patterns of names, one of which a source has, or holds, or a folder in it (``*/x``): only
    then is the loader imported and asked. None: the format is read where it is named."""
    above: tuple[str, ...] = ()
    """Formats whose files may lie beside those of this one, which is then what is read."""
    containers: tuple[str, ...] = ()
    """Kinds of files: ``"safetensors"``."""
    layouts: tuple[str, ...] = ()
    """Layouts of families that it holds: ``"hf"``, ``"mcore"``."""
    parallel: tuple[str, ...] = ()
    """Parallel axes that it is split along: ``"tp"``, ``"pp"``, ``"vpp"``, ``"ep"``."""
    passthrough: bool = False
    """Whether it holds tensors of unknown families, by name."""
    lossless: bool = True
    """Whether reading gives what is stored, and nothing computed from it."""
    saves: Mapping[str, Any] = field(default_factory=dict)
    """Where the saver differs from the loader: ``{"containers": (...), "lossless": True}``."""

    def capabilities(self, kind: Literal["loader", "saver"]) -> dict[str, Any]:
        """Return plain data for ``ckptx plugins`` and the kit; what is not there is left out."""
        own = self.saves if kind == "saver" else {}
        found: dict[str, Any] = {
            "formats": list(own.get("containers", self.containers)),
            "layouts": list(own.get("layouts", self.layouts)),
            **dict.fromkeys(self.parallel, True),
        }
        for name in ("passthrough", "lossless"):
            if own.get(name, getattr(self, name)):
                found[name] = True
        return found
