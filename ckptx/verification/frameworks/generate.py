"""What ``ckptx generate`` asks of transformers, and how the result is shown."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptx.containers.safetensors import read_header
from ckptx.errors import CkptxError, ConversionError, FormatError
from ckptx.protocol.progress import Progress
from ckptx.protocol.sidecars import CONFIG, read_config
from ckptx.registry import registry
from ckptx.storage.source_file import read_small
from ckptx.verification.frameworks import child
from ckptx.verification.frameworks.tokenizer_files import holds_tokenizer

_COLUMN = 10  # where text begins, beside its label


@dataclass(frozen=True, slots=True)
class Generated:
    """What a model has generated; ``answer`` is that of the module `generation`."""

    answer: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values; seconds are wall clock."""
        return dict(self.answer)

    def render(self, width: int) -> str:
        """Return the result as text: every prompt, and what follows it."""
        lines: list[str] = []
        for one in self.answer["generations"]:
            ids = " ".join(map(str, one["prompt_tokens"]))
            lines += _beside("prompt", ids if one["prompt"] is None else one["prompt"], width)
            tokens = " ".join(map(str, one["tokens"]))
            lines += _beside("generated", tokens if one["text"] is None else one["text"], width)
            if "benchmark" in one:
                speed = one["benchmark"]
                lines.append(
                    f"speed     {speed['tokens_per_second']:.1f} tokens/s, median of "
                    f"{len(speed['samples'])} ({speed['lowest']:.1f} to {speed['highest']:.1f})"
                )
            lines.append("")
        count = sum(len(one["tokens"]) for one in self.answer["generations"])
        sampling = self.answer["sampling"]
        sampled = f", sampled with seed {sampling['seed']}" if sampling else ""
        last = (
            f"{self.answer['class']}, {self.answer['parameters']:,} parameters, "
            f"{self.answer['dtype']} on {self.answer['device']}: every weight was found; loaded in "
            f"{self.answer['load_seconds']:.1f} s; {count} tokens generated{sampled}"
        )
        return "\n".join([*lines, *textwrap.wrap(last, width)])


def _beside(label: str, text: str, width: int) -> list[str]:
    """Return a text beside its label: its own lines and blanks, and long lines broken."""
    columns = max(width - _COLUMN, _COLUMN)
    as_it_is = textwrap.TextWrapper(
        columns, expand_tabs=False, replace_whitespace=False, break_on_hyphens=False
    )
    found = []
    for line in text.split("\n"):
        found += as_it_is.wrap(line) or [""]
    labels = (label, *[""] * (len(found) - 1))
    return [f"{head:<{_COLUMN}}{line}".rstrip() for head, line in zip(labels, found, strict=True)]


def generate(
    model: Path,
    job: Mapping[str, Any],
    output: Path | None = None,
    progress: Progress | None = None,
) -> Generated:
    """Load a Hugging Face directory with transformers and generate; write ``output`` as JSON.

    Raises:
        CkptxError: the model does not load whole, computes no finite logits or generates nothing.
    """
    if not (model / CONFIG).is_file():
        raise FormatError(f"{model}: holds no {CONFIG}{_instead(model)}")
    read_config({CONFIG: read_small(model / CONFIG)}, model)
    place = Path(job["tokenizer"] or model)
    if (job["tokenizer"] or job["prompts"]) and not holds_tokenizer(place):
        raise FormatError(
            f"{place}: holds no tokenizer; name the directory of one with --tokenizer, or "
            'give tokens with --prompt-ids "1 2 3"'
        )
    child.require("transformers", "generate")
    for path in sorted(model.glob("*.safetensors")):
        read_header(path)  # whose errors name the file and what to do
    if output is not None and not output.resolve().parent.is_dir():
        raise FormatError(f"--output-file {output}: its directory does not exist")
    progress = progress or Progress()
    progress.stage(f"transformers runs {model.absolute().name}")
    try:
        result = Generated(child.ask("generation", {**job, "model": str(model)}))
    finally:
        progress.close()
    if output is not None:
        try:
            output.write_text(json.dumps(result.to_json(), indent=1) + "\n")
        except OSError as error:
            raise ConversionError(f"--output-file {output}: {error.strerror}") from error
    return result


def _instead(model: Path) -> str:
    """Return what to do with a checkpoint that transformers cannot load."""
    try:
        name = registry.detect(model)
    except CkptxError:
        return "; give the directory of a Hugging Face model"
    return f"; it is a checkpoint of format {name!r}: convert it --to hf first"
