"""Whether two checkpoints compute the same, each run by the framework that owns it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptx.errors import ConversionError, PlanError
from ckptx.processes.interrupts import Interrupts
from ckptx.protocol.progress import Progress
from ckptx.registry.source import Source
from ckptx.text.plain import plain
from ckptx.text.wrapping import wrapped
from ckptx.verification.frameworks import child
from ckptx.verification.frameworks.backends import Backend, prepare

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
    top1_agreement: float
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
        missing = ("max_abs", "mean_kl", "top1_agreement") if any(self.not_finite) else ()
        return {"equal": self.equal, **plain(asdict(self)), **dict.fromkeys(missing)}

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
            a, b = self.not_finite
            last = f"not equal: {a} logits of A and {b} of B are NaN or infinite"
        else:
            summary = (
                f"max abs difference {self.max_abs:.3g}, mean KL {self.mean_kl:.3g}, "
                f"same top token at {self.top1_agreement:.1%}"
            )
            lines += wrapped("", summary, width, 0)
            verdict = "equal" if self.equal else "not equal"
            last = f"{verdict}: logits differ by {self.max_abs:.3g}, {self.atol:g} is allowed"
        return "\n".join([*lines, *wrapped("", last, width, 0)])


def compare_logits(
    left: Source | Path,
    right: Source | Path,
    inputs: Inputs | None = None,
    atol: float = ATOL,
    progress: Progress | None = None,
) -> LogitsComparison:
    """Run both checkpoints on the same tokens in float32, one after the other, and compare.

    What must be converted first goes to a temporary directory (``TMPDIR``), which is removed.
    ``progress`` shows the stages, and is closed.

    Raises:
        CkptxError: one of them cannot be run.
    """
    first, second = (Source(one) if isinstance(one, Path) else one for one in (left, right))
    inputs = inputs or Inputs()
    progress = progress or Progress()
    with (
        closing(progress),
        Interrupts() as stopping,  # so that a signal leaves by way of the folder's removal
        tempfile.TemporaryDirectory(prefix="ckptx-logits-") as folder,
    ):
        scratch = Path(folder)
        backends = []
        for letter, source in (("a", first), ("b", second)):
            progress.stage(f"preparing {letter.upper()}")
            backends.append(prepare(source, scratch, letter))
            stopping.check()
        tokens = _tokens(backends, inputs)
        ran = []
        for letter, backend in zip("AB", backends, strict=True):
            progress.stage(f"running {letter} by {backend.framework}")
            ran.append(_logits(backend, tokens, scratch / letter))
            stopping.check()
    (one, a), (other, b) = ran
    paths, names = (str(first.path), str(second.path)), (one.framework, other.framework)
    notes = (*one.notes, *other.notes)
    return LogitsComparison(
        *paths, names, tokens.tolist(), **measured(a, b), atol=atol, notes=notes
    )


def _tokens(sides: Sequence[Backend], inputs: Inputs) -> npt.NDArray[np.int64]:
    """Return the tokens [batch, sequence] that both models know."""
    vocab_size = min(side.vocab_size for side in sides)
    if inputs.prompt is None:
        special = [token for side in sides for token in side.special]
        ordinary = np.setdiff1d(np.arange(vocab_size), special)
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


def _spoken(sides: Sequence[Backend], prompt: str) -> npt.NDArray[np.int64]:
    """Return the tokens of a text by the tokenizer that lies beside one of the models."""
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


def measured(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> dict[str, Any]:
    """Compare logits [batch, sequence, vocabulary], those of the smaller vocabulary.

    Returns:
        The fields of a `LogitsComparison` that are measured.
    """
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
    agreement = {"mean_kl": max(mean_kl, 0.0), "top1_agreement": top1, "not_finite": not_finite}
    return {"vocab_size": vocab_size, "max_abs": max_abs, **agreement}


def _log_softmax(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = x - x.max(-1, keepdims=True)
    logs: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logs
