"""How results show themselves: printed, and in a notebook."""

from __future__ import annotations

import html


def printable(text: str) -> str:
    r"""Return a text that does nothing to a terminal: names of tensors come from strangers.

    Examples:
        >>> print(printable("a\x1b[31m\nb"))
        a\x1b[31m
        b
    """
    return "\n".join(
        line
        if line.isprintable()
        else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        for line in text.split("\n")
    )


class Shown:
    """A result that prints as the command line shows it."""

    __slots__ = ()

    def render(self, width: int = 80) -> str:
        """Return the result as text of at most ``width`` columns."""
        raise NotImplementedError

    def __str__(self) -> str:
        """Return what the command line prints."""
        return printable(self.render(80))

    def _repr_html_(self) -> str:
        """Return the same for a notebook."""
        return f"<pre>{html.escape(str(self))}</pre>"
