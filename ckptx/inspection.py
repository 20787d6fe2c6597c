"""Say what a checkpoint is, from its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ckptx import manager
from ckptx.lazy import LazyTensor, Stored
from ckptx.parallel import Pipeline
from ckptx.pieces import leaves
from ckptx.protocol import Begin, SourceTensor
from ckptx.saving import Model, collect


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a checkpoint holds."""

    path: str
    begin: Begin
    model: Model

    @property
    def parameters(self) -> int:
        """The elements of all weights; copies and padding counted as the source counts them."""
        tensors: list[LazyTensor] = list((self.model.passthrough or {}).values())
        for message in self.model.messages.values():
            tensors += message.values()
        return sum(tensor.numel for tensor in tensors)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        spec = self.begin.parts.get("language")
        return {
            "path": self.path,
            "format": self.begin.format,
            "layout": self.begin.layout,
            "family": self.begin.family or (spec.family if spec else None),
            "architecture": spec.architecture if spec else None,
            "dtype": self._dtypes(),
            "parameters": self.parameters,
            "bytes": sum(source.extent.nbytes for source in self.begin.sources),
            "iteration": self.begin.training.get("iteration"),
            "parallel": _parallel(self.begin.parallel),
            "model": _plain(asdict(spec)) if spec else None,
            "parts": {
                part: _plain(asdict(one))
                for part, one in self.begin.parts.items()
                if part != "language"
            },
            "files": [Path(file).name for file in self.begin.files],
            "sidecars": sorted(self.begin.sidecars),
            "left_out": [
                {"name": drop.name, "reason": drop.reason, "bytes": drop.nbytes}
                for drop in self.model.end.dropped
            ],
            "notes": list(self.model.end.notes),
            "tensors": [self._tensor(source) for source in self.begin.sources],
        }

    def render(self, width: int, *, tensors: bool = True) -> str:
        """Return the summary, and the table of tensors, for a terminal of ``width`` columns."""
        lines = [f"{label:<12} {value}" for label, value in self._summary() if value]
        if tensors:
            lines += ["", *self._table(width)]
        return "\n".join(lines)

    def _summary(self) -> list[tuple[str, str]]:
        spec = self.begin.parts.get("language")
        size = sum(source.extent.nbytes for source in self.begin.sources)
        parallel = _parallel(self.begin.parallel)
        sizes = ", ".join(f"{k} {v}" for k, v in parallel.items() if k != "stages")
        summary = [
            ("path", self.path),
            ("format", f"{self.begin.format} ({self.begin.layout})"),
            ("model", f"{spec.architecture}, {spec.num_layers} layers" if spec else "no schema"),
            *(
                (part, f"{one.family}, {one.num_layers} layers" if one.num_layers else one.family)
                for part, one in self.begin.parts.items()
                if part != "language"
            ),
            ("parameters", f"{self.parameters:,}"),
            ("stored", f"{size:,} bytes in {len(self.begin.files)} files"),
            ("dtype", ", ".join(self._dtypes())),
            ("iteration", str(self.begin.training.get("iteration", ""))),
            ("parallel", sizes),
        ]
        summary += [("", stage) for stage in parallel.get("stages", [])]
        summary += [("beside", ", ".join(sorted(self.begin.sidecars)))]
        summary += [
            ("left out", f"{drop.name}: {drop.nbytes:,} bytes, {drop.reason}")
            for drop in self.model.end.dropped
        ]
        return summary + [("note", note) for note in self.model.end.notes]

    def _table(self, width: int) -> list[str]:
        rows = [self._tensor(source) for source in self.begin.sources]
        name_width = min(max((len(row["name"]) for row in rows), default=0), max(20, width - 34))
        lines = []
        for row in rows:
            shape = "x".join(map(str, row["shape"])) or "scalar"
            lines.append(f"{row['name']:<{name_width}}  {row['dtype']:<9} {shape}")
        return lines

    def _tensor(self, source: SourceTensor) -> dict[str, Any]:
        numbers = {leaf.file for leaf in leaves(source.extent) if isinstance(leaf, Stored)}
        return {
            "name": source.name,
            "dtype": source.extent.dtype,
            "shape": list(source.extent.shape),
            "bytes": source.extent.nbytes,
            "files": [Path(self.begin.files[number]).name for number in sorted(numbers)],
        }

    def _dtypes(self) -> list[str]:
        return sorted({source.extent.dtype for source in self.begin.sources})


def inspect(path: Path, loader: str | None = None) -> Inspection:
    """Return what the checkpoint at ``path`` holds; the loader is detected unless named.

    Raises:
        CkptxError: it cannot be read.
    """
    plugin = manager.loader(loader or manager.detect(path))
    model = collect(iter(plugin.load(path, {})))
    return Inspection(str(path), model.begin, model)


def _parallel(parallel: Mapping[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for name, value in parallel.items():
        if isinstance(value, Pipeline):
            shown["pp"] = value.pp
            if value.vpp:
                shown["vpp"] = value.vpp
        else:
            shown[name] = value
    return shown


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
