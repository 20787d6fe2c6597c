"""One name for several loaders: which of them is meant, the source says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptx.errors import FormatError

if TYPE_CHECKING:
    import click

    from ckptx.protocol.contracts import Loader
    from ckptx.protocol.messages import Message


class Alternatives:
    """A loader that hands a source to the one of several loaders that recognises it."""

    def __init__(self, name: str, loaders: Sequence[Loader]) -> None:
        self.name = name
        self.loaders = tuple(loaders)
        self.capabilities: Mapping[str, Any] = {
            "formats": [one for loader in loaders for one in loader.capabilities.get("formats", [])]
        }

    def options(self) -> list[click.Option]:
        """Return the options of all of them."""
        return [option for loader in self.loaders for option in loader.options()]

    def detect(self, source: Path) -> bool:
        """Return whether any of them recognises the source."""
        return any(loader.detect(source) for loader in self.loaders)

    def load(self, source: Path, options: Mapping[str, Any]) -> Iterator[Message]:
        """Yield the messages of the one that recognises the source.

        Raises:
            FormatError: none does, or several do.
        """
        matches = [loader for loader in self.loaders if loader.detect(source)]
        names = [loader.name for loader in matches or self.loaders]
        if len(matches) != 1:
            found = f"is {' and '.join(names)}" if matches else f"is neither {' nor '.join(names)}"
            raise FormatError(f"{source}: {found}, what {self.name!r} stands for; name the loader")
        return matches[0].load(source, options)
