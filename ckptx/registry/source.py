"""A checkpoint that somebody asks for: where it is, and how it is to be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptx.registry.open import Checkpoint


@dataclass(frozen=True)
class Source:
    """A checkpoint, and all that `ckptx.registry.open.open_checkpoint` takes."""

    path: Path
    format: str | None = None
    """The name of the loader; detected unless given."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The loader's own options."""
    hf_base: Path | None = None
    spool: Path | None = None
    """The directory where tensors are decoded to."""
    modules: Mapping[str, Any] = field(default_factory=dict)
    """What concerns Megatron-style modules: ``checking``, ``megatron_path``, ``model_type``."""

    def open(self) -> Checkpoint:
        """Open it.

        Raises:
            CkptxError: it cannot be read.
        """
        from ckptx.protocol.context import Context
        from ckptx.registry.open import find_loader, open_checkpoint

        loader = find_loader(self.path, self.format, self.modules.get("megatron_path"))
        told = {name: self.modules[name] for name in ("checking", "model_type") if self.modules}
        context = Context(hf_base=self.hf_base, **told)
        return open_checkpoint(
            self.path, loader, options=self.options, spool=self.spool, context=context
        )
