"""A plugin for ckptx: load and save ``weights.npz``, the model's small files beside it."""

from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ckptx.containers.source_file import SourceFile
from ckptx.containers.zip_archive import ArchiveWriter, NewMember, read_members
from ckptx.errors import FormatError
from ckptx.hookspecs import hookimpl
from ckptx.lazy import ITEMSIZE, LazyTensor, stored
from ckptx.loading import inventory
from ckptx.model_directory import CONFIG, hf_messages, hf_tensors, made_config, sidecars
from ckptx.plan import FilePlan, SavePlan, literal_files
from ckptx.protocol import Begin, Message
from ckptx.saving import collect

WEIGHTS = "weights.npz"


class Npz:
    """Both: tensors under Hugging Face's names, ``:bfloat16`` after those numpy has no dtype for."""

    name = "npz"
    capabilities: Mapping[str, Any] = {"formats": ["npz"], "layouts": ["hf"], "passthrough": True}

    def options(self) -> list[Any]:  # click.Option, if there were any
        return []

    def detect(self, source: Path) -> bool:
        return (source / WEIGHTS).is_file()

    def load(self, source: Path, options: Mapping[str, Any]) -> Iterator[Message]:
        path, files = str((source / WEIGHTS).resolve()), sidecars(source)
        tensors = read_archive(path)
        begin = Begin("npz", "hf", {}, (path,), inventory(tensors), str(source), files)
        yield from hf_messages(begin, tensors)

    def plan(self, messages: Iterator[Message], options: Mapping[str, Any]) -> SavePlan:
        model = collect(messages)
        tensors, dropped = hf_tensors(model)
        archive = ArchiveWriter(root="")
        for name, tensor in tensors.items():
            head, dtype = BytesIO(), tensor.dtype
            if not hasattr(np, dtype):
                name, dtype = f"{name}:{dtype}", f"uint{8 * ITEMSIZE[dtype]}"
            form = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tensor.shape}
            np.lib.format.write_array_header_1_0(head, form)
            data = head.getvalue()
            archive.add(NewMember(f"{name}.npy", len(data) + tensor.nbytes, tensor, name, data))
        weights = FilePlan(WEIGHTS, *archive.finish())
        files = literal_files({CONFIG: made_config(model)} | dict(model.begin.sidecars))
        return SavePlan([weights, *files], dropped=dropped)


def read_archive(path: str) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    with SourceFile(path) as file:
        for member, place in read_members(file).items():
            head = BytesIO(file.read(place.offset, min(place.size, 1 << 16)))
            try:
                np.lib.format.read_magic(head)
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(head)
            except ValueError as error:
                raise FormatError(f"{path}: {member!r} is no numpy array") from error
            name, _, other = member.removesuffix(".npy").partition(":")
            if (other or dtype.name) not in ITEMSIZE or fortran or not dtype.isnative:
                raise FormatError(f"{path}: {name!r}: a dtype or order that ckptx has not: {dtype}")
            tensors[name] = stored(0, place.offset + head.tell(), other or dtype.name, shape)
            if head.tell() + tensors[name].nbytes != place.size:
                raise FormatError(f"{path}: {name!r} has {place.size} bytes, not {dtype} {shape}")
    return tensors


@hookimpl
def register_loaders(register: Callable[[Npz], None]) -> None:
    register(Npz())


@hookimpl
def register_savers(register: Callable[[Npz], None]) -> None:
    register(Npz())
