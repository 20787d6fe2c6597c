"""What is fuzzed: each target takes any bytes, and may raise nothing but a `CkptxError`.

A target puts the bytes where a reader finds them and reads all that metadata leads to. Nothing here
imports torch, so that a fuzzer starts fast.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from ckptx.containers import dcp, pickle_reader, safetensors, torch_zip
from ckptx.containers.carried import as_json, carried
from ckptx.containers.sharded import Rank, share, whole
from ckptx.errors import CkptxError
from ckptx.hf_models.weights import read_weights
from ckptx.protocol.sidecars import read_config
from ckptx.registry import registry
from ckptx.registry.families import family_of, parts_from_config

CORPUS = Path(__file__).with_name("corpus")
DCP_ITEMS = Path(__file__).with_name("items.distcp")
_PLACE = Path(tempfile.mkdtemp(prefix="ckptx-fuzz-"))


def _file(name: str, data: bytes) -> Path:
    path = _PLACE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def archived(pickled: bytes) -> bytes:
    """Return a file of ``torch.save`` with this pickle, and one storage of 64 bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as members:
        members.writestr("archive/data.pkl", pickled)
        members.writestr("archive/data/0", bytes(64))
    return stream.getvalue()


def safetensors_header(data: bytes) -> None:
    """A whole safetensors file."""
    safetensors.tensors(_file("a.safetensors", data), 0)


def torch_archive(data: bytes) -> None:
    """A whole file of ``torch.save``."""
    torch_zip.read(_file("a.pt", data), 0)


def unpickler(data: bytes) -> None:
    """A pickle, as records."""
    pickle_reader.loads(data, file="a")


def pickle_values(data: bytes) -> None:
    """A pickle in an archive, resolved, and carried over into another."""
    value = torch_zip.read(_file("a.pt", archived(data)), 0)
    with contextlib.suppress(TypeError):  # what JSON cannot say
        as_json(carried(value, "a"))


def dcp_metadata(data: bytes) -> None:
    """The ``.metadata`` of a directory."""
    _file("dcp/.metadata", data)
    if not (_PLACE / "dcp/__0_0.distcp").exists():
        _file("dcp/__0_0.distcp", DCP_ITEMS.read_bytes())
    metadata = dcp.read_metadata(_PLACE / "dcp")
    for key in metadata.objects:
        with contextlib.suppress(CkptxError):
            dcp.read_object(metadata, key, [])
    list(registry.loader("dcp").load(_PLACE / "dcp", {}))


def shares(data: bytes) -> None:
    """The file of the one rank of a sharded checkpoint."""
    value = torch_zip.read(_file("verl/model_world_size_1_rank_0.pt", archived(data)), 0)
    if isinstance(value, dict):
        for name, entry in value.items():
            with contextlib.suppress(CkptxError):
                whole([share(entry, Rank("a", 0, 1), str(name))], str(name))
    list(registry.loader("verl").load(_PLACE / "verl", {}))


def config(data: bytes) -> None:
    """A ``config.json``."""
    found = read_config({"config.json": data}, "a")
    family = family_of(found) if found else None
    if found is not None and family is not None:
        parts_from_config(family, found)


def params(data: bytes) -> None:
    """A ``params.json`` beside the weights of a Llama of one layer."""
    _file("meta/params.json", data)
    place = _PLACE / "meta" / "consolidated.safetensors"
    if not place.exists():
        square = {f"attention.w{letter}.weight": (4, 4) for letter in "qkvo"}
        mlp = {f"feed_forward.w{n}.weight": (4, 12) if n == 2 else (12, 4) for n in (1, 2, 3)}
        norms = {"attention_norm.weight": (4,), "ffn_norm.weight": (4,)}
        shapes = {f"layers.0.{name}": shape for name, shape in {**square, **mlp, **norms}.items()}
        shapes |= {"tok_embeddings.weight": (4, 4), "output.weight": (4, 4), "norm.weight": (4,)}
        header, position = {}, 0
        for name, shape in shapes.items():
            end = position + 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, end]}
            position = end
        text = json.dumps(header).encode()
        _file(
            "meta/consolidated.safetensors",
            len(text).to_bytes(8, "little") + text + bytes(position),
        )
    list(registry.loader("meta").load(_PLACE / "meta", {}))


def index(data: bytes) -> None:
    """An index of shards, of which one is there."""
    _file("hf/model.safetensors.index.json", data)
    header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    _file("hf/s.safetensors", len(header).to_bytes(8, "little") + header + b"x")
    read_weights(_PLACE / "hf")


def rank_file(data: bytes) -> None:
    """The file of the one rank of a Megatron checkpoint."""
    _file("core/latest_checkpointed_iteration.txt", b"1")
    _file("core/iter_0000001/mp_rank_00/model_optim_rng.pt", archived(data))
    for loader in ("core", "legacy"):
        with contextlib.suppress(CkptxError):
            list(registry.loader(loader).load(_PLACE / "core", {}))


def deepspeed(data: bytes) -> None:
    """The model states of a DeepSpeed checkpoint of one rank."""
    _file("deepspeed/step/mp_rank_00_model_states.pt", archived(data))
    list(registry.loader("deepspeed").load(_PLACE / "deepspeed" / "step", {"weights": "module"}))


TARGETS: dict[str, Callable[[bytes], None]] = {
    one.__name__: one
    for one in (
        *(safetensors_header, torch_archive, unpickler, pickle_values, dcp_metadata, shares),
        *(config, params, index, rank_file, deepspeed),
    )
}


def run(name: str, data: bytes) -> None:
    """Run a target; what is refused is well."""
    with contextlib.suppress(CkptxError):
        TARGETS[name](data)
