"""Whether two checkpoints compute the same, each run by the framework that owns it."""

from __future__ import annotations

import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptx.errors import ConversionError, PlanError
from ckptx.processes.interrupts import Interrupts
from ckptx.protocol.progress import Progress, Silent
from ckptx.registry.source import Source
from ckptx.text.wrapping import wrapped
from ckptx.verification.frameworks import child
from ckptx.verification.frameworks.backends import Backend, prepare

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ATOL = 1e-4
"""What float32 logits of two implementations of one model may differ by."""
SEQUENCES = 2
"""Random sequences that are compared."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What both models are given: ``prompt``, or random sequences of ``tokens`` tokens each."""

    tokens: int = 16
    seed: int = 0
    prompt: str | None = None


@dataclass(frozen=True, slots=True)
class LogitsComparison:
    """How far the logits of two models are apart."""

    left: str
    right: str
    frameworks: tuple[str, str]
    tokens: list[list[int]]
    vocab_size: int
    """Logits that are compared, for each token: those of the smaller vocabulary."""
    max_abs: float
    mean_kl: float
    """In nats, of A's next-token distribution from B's, averaged over positions."""
    top1: float
    """The share of positions where both find the same token likeliest."""
    not_finite: tuple[int, int]
    """Logits that are NaN or infinite, of either side."""
    atol: float
    notes: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether all logits are finite and as close as asked for."""
        return not any(self.not_finite) and self.max_abs <= self.atol

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as plain values; numbers that do not exist are null."""
        finite = not any(self.not_finite)
        return {
            "equal": self.equal,
            "left": self.left,
            "right": self.right,
            "frameworks": list(self.frameworks),
            "tokens": self.tokens,
            "vocab_size": self.vocab_size,
            "max_abs": self.max_abs if finite else None,
            "mean_kl": self.mean_kl if finite else None,
            "top1_agreement": self.top1 if finite else None,
            "not_finite": list(self.not_finite),
            "atol": self.atol,
            "notes": list(self.notes),
        }

    def render(self, width: int) -> str:
        """Return the comparison as text."""
        count = sum(len(row) for row in self.tokens)
        given = f"{count} tokens in {len(self.tokens)} sequences, {self.vocab_size:,} logits each"
        lines = [
            *wrapped("A", f"{self.left}: {self.frameworks[0]}", width, 3),
            *wrapped("B", f"{self.right}: {self.frameworks[1]}", width, 3),
            *wrapped("", given, width, 0),
            *(line for note in self.notes for line in wrapped("note:", note, width, 6)),
        ]
        if any(self.not_finite):
            last = [
                f"not equal: {self.not_finite[0]} logits of A and {self.not_finite[1]} of B are "
                "NaN or infinite"
            ]
        else:
            last = [
                f"max abs difference {self.max_abs:.3g}, mean KL {self.mean_kl:.3g}, "
                f"same top token at {self.top1:.1%}",
                f"{'equal' if self.equal else 'not equal'}: logits differ by "
                f"{self.max_abs:.3g}, {self.atol:g} is allowed",
            ]
        return "\n".join(lines + [part for one in last for part in wrapped("", one, width, 0)])


def compare_logits(
    left: Source | Path,
    right: Source | Path,
    inputs: Inputs | None = None,
    atol: float = ATOL,
    progress: Progress | None = None,
) -> LogitsComparison:
    """Run both checkpoints on the same tokens in float32, one after the other, and compare.

    What must be converted first goes to a temporary directory (``TMPDIR``), which is removed.
    ``progress`` is told of the stages, and closed.

    Raises:
        CkptxError: one of them cannot be run.
    """
    first, second = (Source(one) if isinstance(one, Path) else one for one in (left, right))
    inputs = inputs or Inputs()
    progress = progress or Silent()
    with (
        closing(progress),
        Interrupts() as stopping,  # so that a signal leaves by way of the folder's removal
        tempfile.TemporaryDirectory(prefix="ckptx-logits-") as folder,
    ):
        scratch = Path(folder)
        progress.stage("preparing A")
        one = prepare(first, scratch, "a")
        stopping.check()
        progress.stage("preparing B")
        other = prepare(second, scratch, "b")
        stopping.check()
        sides = (one, other)
        tokens = _tokens(sides, inputs)
        progress.stage(f"running A by {one.framework}")
        one, a = _logits(one, tokens, scratch / "0")
        stopping.check()
        progress.stage(f"running B by {other.framework}")
        other, b = _logits(other, tokens, scratch / "1")
    sides = (one, other)
    notes = tuple(note for side in sides for note in side.notes)
    names = (sides[0].framework, sides[1].framework)
    return measured((str(first.path), str(second.path)), names, tokens, a, b, atol, notes)


def _tokens(sides: tuple[Backend, Backend], inputs: Inputs) -> npt.NDArray[np.int64]:
    """Return the tokens [batch, sequence] that both models know."""
    import numpy as np

    vocab_size = min(side.vocab_size for side in sides)
    if inputs.prompt is None:
        special = sides[0].special | sides[1].special
        ordinary = np.setdiff1d(np.arange(vocab_size), list(special))
        generator = np.random.default_rng(inputs.seed)
        tokens = generator.choice(ordinary, (SEQUENCES, inputs.tokens)).astype(np.int64)
    else:
        tokens = _spoken(sides, inputs.prompt)
        if tokens.max(initial=0) >= vocab_size:
            raise PlanError(
                f"token {tokens.max()} of --prompt is outside the smaller vocabulary, which has "
                f"{vocab_size}"
            )
    limits = [side.longest for side in sides if side.longest is not None]
    if limits and tokens.shape[1] > min(limits):
        raise PlanError(
            f"Megatron on a CPU runs windows of attention on texts up to their {min(limits)} "
            f"tokens only, not on {tokens.shape[1]}; give --tokens {min(limits)} or a shorter one"
        )
    return tokens


def _spoken(sides: tuple[Backend, Backend], prompt: str) -> npt.NDArray[np.int64]:
    """Return the tokens of a text by the tokenizer that lies beside one of the models."""
    import numpy as np

    places = [one for side in sides for one in (side.directory, side.directory / "huggingface")]
    place = next((one for one in places if (one / "tokenizer_config.json").is_file()), None)
    if place is None:
        raise PlanError("--prompt: neither side has a tokenizer; use --tokens")
    child.require("transformers", "--prompt")
    answer = child.ask("transformers_side", {"directory": str(place), "prompt": prompt})
    if not answer["tokens"][0]:
        raise PlanError("--prompt: it has no tokens")
    return np.array(answer["tokens"], np.int64)


def _logits(
    side: Backend, tokens: npt.NDArray[np.int64], scratch: Path
) -> tuple[Backend, npt.NDArray[np.float32]]:
    """Return what a model computes, float32 [batch, sequence, vocabulary], and how it was run."""
    import numpy as np

    scratch.mkdir(exist_ok=True)
    given, out = scratch / "tokens.npy", scratch / "logits.npy"
    np.save(given, tokens)
    job = {**side.job, "tokens": str(given), "out": str(out), "scratch": str(scratch)}
    # A GPU is hidden: the same road everywhere, and no TF32.
    answer = child.ask(side.module, job, CUDA_VISIBLE_DEVICES="")
    if side.instead is not None and "refused" in answer:
        return _logits(side.instead(answer["refused"]), tokens, scratch)
    logits: npt.NDArray[np.float32] = np.load(out)
    if logits.shape[:2] != tokens.shape:
        raise ConversionError(
            f"{side.directory}: {side.framework} has computed logits {list(logits.shape)} of "
            f"tokens {list(tokens.shape)}"
        )
    return side, logits


def measured(
    paths: tuple[str, str],
    frameworks: tuple[str, str],
    tokens: npt.NDArray[np.int64],
    a: npt.NDArray[np.float32],
    b: npt.NDArray[np.float32],
    atol: float,
    notes: tuple[str, ...],
) -> LogitsComparison:
    """Compare logits [batch, sequence, vocabulary], those of the smaller vocabulary."""
    import numpy as np

    vocab_size = min(a.shape[-1], b.shape[-1])
    one, other = (x[..., :vocab_size].reshape(-1, vocab_size).astype(np.float64) for x in (a, b))
    not_finite = tuple(int((~np.isfinite(x)).sum()) for x in (one, other))
    if any(not_finite):
        max_abs = mean_kl = float("inf")
        top1 = 0.0
    else:
        max_abs = float(np.abs(one - other).max())
        p, q = _log_softmax(one), _log_softmax(other)
        mean_kl = float((np.exp(p) * (p - q)).sum(-1).mean())
        top1 = float((one.argmax(-1) == other.argmax(-1)).mean())
    return LogitsComparison(
        *paths,
        frameworks,
        tokens.tolist(),
        vocab_size,
        max_abs,
        max(mean_kl, 0.0),
        top1,
        (not_finite[0], not_finite[1]),
        atol,
        notes,
    )


def _log_softmax(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    import numpy as np

    shifted = x - x.max(-1, keepdims=True)
    logs: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logs
