"""Load and save ``weights.npz``, the model's small files beside it."""

from io import BytesIO
from typing import Any

import numpy as np

from ckptx.plugin_api import (
    ITEMSIZE,
    UNTOLD,
    ArchiveWriter,
    Begin,
    Context,
    FilePlan,
    FormatError,
    LazyTensor,
    Location,
    Messages,
    NewMember,
    Options,
    SavePlan,
    SourceFile,
    collect,
    config_of,
    hf_messages,
    hf_tensors,
    inventory,
    literal_files,
    read_members,
    sidecars,
    stored,
)
from ckptx_npz import WEIGHTS


class Npz:
    name = "npz"

    def options(self) -> list[Any]:
        return []

    def detect(self, source: Location) -> bool:
        return (source / WEIGHTS).is_file()

    def load(self, source: Location, options: Options, context: Context = UNTOLD) -> Messages:
        tensors = read_archive(path := str((source / WEIGHTS).absolute()))
        begin = Begin("npz", "hf", {}, (path,), inventory(tensors), str(source), sidecars(source))
        yield from hf_messages(begin, tensors)

    def plan(self, messages: Messages, options: Options, context: Context = UNTOLD) -> SavePlan:
        model = collect(messages)
        tensors, dropped = hf_tensors(model)
        archive = ArchiveWriter(root="")
        for name, tensor in tensors.items():
            head, dtype = BytesIO(), tensor.dtype
            if not hasattr(np, dtype):
                name, dtype = f"{name}:{dtype}", f"uint{8 * ITEMSIZE[dtype]}"  # as bfloat16
            form = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tensor.shape}
            np.lib.format.write_array_header_1_0(head, form)
            data = head.getvalue()
            archive.add(NewMember(f"{name}.npy", len(data) + tensor.nbytes, tensor, name, data))
        files = literal_files({**config_of(model), **model.begin.sidecars})
        return SavePlan([FilePlan(WEIGHTS, *archive.finish()), *files], dropped=dropped)


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
            known = other or dtype.name
            size = head.tell() + ITEMSIZE.get(known, 0) * int(np.prod(shape))
            if known not in ITEMSIZE or fortran or not dtype.isnative or size != place.size:
                raise FormatError(f"{path}: {member!r}: cannot use {dtype} {shape} as it is stored")
            tensors[name] = stored(0, place.offset + head.tell(), known, shape)
    return tensors
