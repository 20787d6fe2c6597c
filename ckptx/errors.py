"""The exceptions of ckptx: every error a user can meet is one of these.

A message names the file, the tensor, what was expected, what was found and what to do. The command
line prints it as one line; ``--verbose`` adds the traceback.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class CkptxError(Exception):
    """Base of all errors that ckptx raises on purpose."""


class PluginError(CkptxError):
    """A plugin is unknown, ambiguous, broken, or was given options that are not its own."""


class FormatError(CkptxError, ValueError):
    """A file or directory is not what its format says it should be."""


class SchemaError(CkptxError, ValueError):
    """Tensors or a configuration do not fit the layout of the model family."""


class NamesError(SchemaError):
    """A model's tensors are not those of its family: some are missing, or there are others."""

    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()


class PlanError(CkptxError, ValueError):
    """The conversion asked for is impossible, or its plan is not complete."""


class ConversionError(CkptxError, RuntimeError):
    """The conversion failed while it ran: a process died, a disk filled, a source changed."""


class CutShortError(ConversionError):
    """The conversion was cut short from outside: a process was killed, a disk is full.

    Nothing is wrong with what was asked for, so what is on disk is kept, and the same command goes
    on from there.
    """


def listing(names: Iterable[str], limit: int = 10) -> str:
    """Return the first ``limit`` names, quoted, and the count of the others.

    Examples:
        >>> listing(["a", "b", "c"], limit=2)
        "'a', 'b' and 1 more"
    """
    return first_few([repr(name) for name in names], limit)


def first_few(texts: Sequence[str], limit: int) -> str:
    """Return the first ``limit`` texts, and the count of the others.

    Examples:
        >>> first_few(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    rest = len(texts) - limit
    return ", ".join(texts[:limit]) + (f" and {rest:,} more" if rest > 0 else "")
