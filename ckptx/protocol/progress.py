"""How far a long run is: the interface that whoever runs it implements."""

from __future__ import annotations


class Progress:
    """Told what is being done, how many bytes there are, and how many more are done.

    This one shows nothing.
    """

    def stage(self, name: str) -> None:
        """Something begins that is not measured in bytes, as ``"planning"``."""

    def begin(self, total: int, stage: str = "writing") -> None:
        """``total`` bytes are about to be written, or read."""

    def advance(self, count: int) -> None:
        """``count`` more bytes are done."""

    def close(self) -> None:
        """Nothing more comes, for better or worse; called once, even without `begin`."""
