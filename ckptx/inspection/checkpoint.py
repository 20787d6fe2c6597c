"""A checkpoint of any format as a mapping of names to lazy tensors: what ``ckptx.open`` returns."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from ckptx.inspection.values import numbers_along, read_index, unknown
from ckptx.protocol.sidecars import read_config
from ckptx.storage.open_files import Files
from ckptx.tensors import lazy
from ckptx.text.shown import Shown
from ckptx.text.sizes import size_text

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from ckptx.model.spec import ModelSpec
    from ckptx.registry.open import Checkpoint as OpenCheckpoint
    from ckptx.registry.open import Problem

Index: TypeAlias = int | slice | EllipsisType
_SHOWN = 10  # tensors of a checkpoint that is printed


class Checkpoint(Mapping[str, "LazyTensor"], Shown):
    """The tensors of a checkpoint by name, whole, whatever the ranks hold of each; read only.

    Names are Hugging Face's where a schema knows the model. Nothing but metadata is in memory. Use
    it in a ``with`` statement, or `close` it; what is left open is closed with its last tensor.
    """

    def __init__(self, opened: OpenCheckpoint, names: str = "model") -> None:
        self.opened = opened
        self.names, self._tensors = opened.tensors(names)
        self._files = opened.files()
        self._finalizer = weakref.finalize(self, _close, opened, self._files)

    def __getitem__(self, name: str) -> LazyTensor:
        """Return a tensor, of which nothing is read.

        Raises:
            KeyError: there is none of this name; near ones are said.
        """
        if name not in self._tensors:
            raise KeyError(unknown(str(name), self._tensors))
        return LazyTensor(self, name, self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; no tensor can be read after that."""
        self._finalizer()

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return not self._finalizer.alive

    @property
    def files(self) -> Files:
        """The open files.

        Raises:
            ValueError: the checkpoint was closed.
        """
        if self.closed:
            raise ValueError(f"{self.path}: the checkpoint was closed")
        return self._files

    @property
    def path(self) -> Path:
        """Where it lies."""
        return Path(self.opened.path)

    @property
    def format(self) -> str:
        """Its format: ``"hf"``."""
        return self.opened.format

    @property
    def family(self) -> str | None:
        """Its model family (``"llama"``), None if no schema knows the model."""
        spec = self.spec
        return self.opened.begin.family or (spec.family if spec else None)

    @property
    def spec(self) -> ModelSpec | None:
        """The sizes of its language model."""
        return self.opened.begin.parts.get("language")

    @property
    def config(self) -> Mapping[str, Any] | None:
        """Its ``config.json``, None where there is none beside the weights."""
        begin = self.opened.begin
        return read_config(begin.sidecars, begin.root)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What is wrong with it, as far as its metadata tell."""
        return self.opened.problems

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def render(self, width: int = 80) -> str:
        """Return the format, the family, and the first tensors."""
        family = self.family or "of no known family"
        lines = [
            f"{self.path}: {self.format}, {family}, {len(self)} tensors, {size_text(self.nbytes)}"
        ]
        lines += [f"  problem: {problem.message}" for problem in self.problems]
        for name, tensor in list(self._tensors.items())[:_SHOWN]:
            lines.append(f"  {name}  {tensor.dtype} {list(tensor.shape)}")
        if len(self) > _SHOWN:
            lines.append(f"  ... and {len(self) - _SHOWN:,} more")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Checkpoint {str(self.path)!r}: {self.format}, {len(self)} tensors>"

    __str__ = Shown.__str__


class LazyTensor:
    """A tensor of an open checkpoint; indexing reads what is asked for, and no more."""

    __slots__ = ("_checkpoint", "_tensor", "name")

    def __init__(self, checkpoint: Checkpoint, name: str, tensor: lazy.LazyTensor) -> None:
        self._checkpoint = checkpoint
        self._tensor = tensor
        self.name = name

    @property
    def shape(self) -> tuple[int, ...]:
        """Its elements along every axis."""
        return self._tensor.shape

    @property
    def dtype(self) -> str:
        """Its dtype as torch calls it: ``"bfloat16"``."""
        return self._tensor.dtype

    @property
    def ndim(self) -> int:
        """The number of its axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self._tensor.nbytes

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a tensor without axes has no length")
        return self.shape[0]

    def __getitem__(self, index: Index | tuple[Index, ...]) -> NDArray[Any]:
        """Return a part as a numpy array of its own; bfloat16 and float8 are ml_dtypes'.

        Raises:
            IndexError: a number is out of range, or there are more numbers than axes.
            TypeError: an index is neither a whole number, a slice nor ``...``.
            ValueError: the checkpoint was closed.
            CkptxError: a file cannot be read.
        """
        numbers = numbers_along(index if isinstance(index, tuple) else (index,), self.shape)
        ranges = [one for one in numbers if isinstance(one, range)]
        rising = [one[::-1] if isinstance(one, range) and one.step < 0 else one for one in numbers]
        values = read_index(self._tensor, rising, self._checkpoint.files)
        return values[tuple(slice(None, None, 1 if one.step > 0 else -1) for one in ranges)]

    def __array__(
        self, dtype: np.dtype[Any] | None = None, copy: bool | None = None
    ) -> NDArray[Any]:
        """Return all of it, for numpy."""
        values = self[...]
        return values if dtype is None else values.astype(dtype)

    def torch(self) -> torch.Tensor:
        """Return all of it as a torch tensor on the CPU.

        Raises:
            ImportError: torch is not installed.
        """
        framework: Any = importlib.import_module("torch")
        values = self[...]
        wanted = getattr(framework, self.dtype)
        if values.dtype.isbuiltin != 1:  # bfloat16 and float8, which torch takes from no array
            values = values.view(f"u{values.dtype.itemsize}")
        return cast("torch.Tensor", framework.from_numpy(values).view(wanted))

    def __repr__(self) -> str:
        return f"<LazyTensor {self.name!r}: {self.dtype} {list(self.shape)}>"


def _close(opened: OpenCheckpoint, files: Files) -> None:
    files.close()
    opened.close()
