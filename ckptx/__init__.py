"""Convert checkpoints of large language models, proved before a byte moves.

    report = ckptx.convert("run/global_step_100", "out", to="hf")
    with ckptx.open("out") as checkpoint:
        weight = checkpoint["model.embed_tokens.weight"][:4]

Nothing of this is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptx.version import __version__

if TYPE_CHECKING:
    from ckptx.api import average, convert, families, formats, inspect, modify, open, plan, verify
    from ckptx.conversion.report import Plan, Report
    from ckptx.errors import (
        CkptxError,
        ConversionError,
        CutShortError,
        FormatError,
        PlanError,
        PluginError,
        SchemaError,
    )
    from ckptx.inspection.checkpoint import Checkpoint, LazyTensor
    from ckptx.inspection.summary import Inspection
    from ckptx.verification.compare import Comparison

__all__ = [
    "Checkpoint",
    "CkptxError",
    "Comparison",
    "ConversionError",
    "CutShortError",
    "FormatError",
    "Inspection",
    "LazyTensor",
    "Plan",
    "PlanError",
    "PluginError",
    "Report",
    "SchemaError",
    "__version__",
    "average",
    "convert",
    "families",
    "formats",
    "inspect",
    "modify",
    "open",
    "plan",
    "verify",
]
_HOMES = {
    "Checkpoint": "ckptx.inspection.checkpoint",
    "LazyTensor": "ckptx.inspection.checkpoint",
    "Plan": "ckptx.conversion.report",
    "Report": "ckptx.conversion.report",
    "Comparison": "ckptx.verification.compare",
    "Inspection": "ckptx.inspection.summary",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'ckptx' has no attribute {name!r}")
    from importlib import import_module

    home = _HOMES.get(name, "ckptx.errors" if name.endswith("Error") else "ckptx.api")
    value = globals()[name] = getattr(import_module(home), name)
    return value


def __dir__() -> list[str]:
    return __all__
