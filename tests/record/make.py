"""Makes what the record starts from and cannot be made by hand: run once, its results committed.

    python -m tests.record.make

``families.json`` has the config and the names, dtypes and shapes of small models as transformers
writes them; the values are arithmetic, see `tests.record.sources`. ``made.tar.xz`` has small
checkpoints that torch, verl's and RLinf's calls, peft and megatron-core wrote. Nothing in here is
run by ``--check``: a later run with other versions makes other bytes, and so another record.
"""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.conftest import write_llama
from tests.formats import by_hand, legacy_by_hand, zero_by_hand
from tests.oracles import adapters, bert, fsdp, hf, llava, mcore, mcore_model, rlinf, verl
from tests.oracles.mcore import Layout

from .program import tiny_model
from .sources import FAMILIES, MADE, refill, tiny, values

SMALL = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "torch_dtype": "float32",
}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
TOKENS = torch.arange(8)[None]
STAGES = [[[0], [2]], [[1], [3]]]


def _mtp(directory: Path) -> None:
    hf.add_further_layer(directory, hf.deepseek_v3(directory))


def _llava(tower: str) -> Callable[[Path], object]:
    return lambda directory: llava.write(directory, llava.config(tower))


WRITERS: dict[str, Callable[[Path], object]] = {
    "llama": hf.llama,
    "llama3-rope": hf.llama3_rope,
    "mistral": hf.mistral,
    "qwen2-tied": lambda directory: hf.qwen2(directory, tied=True),
    "qwen3": hf.qwen3,
    "gpt2": hf.gpt2,
    "gpt-neox": hf.gpt_neox,
    "phi3": hf.phi3,
    "gemma": hf.gemma,
    "gemma2": hf.gemma2,
    "starcoder2": hf.starcoder2,
    "glm": hf.glm,
    "glm4": hf.glm4,
    "granite": hf.granite,
    "olmo2": hf.olmo2,
    "mixtral": hf.mixtral,
    "qwen2-moe": hf.qwen2_moe,
    "qwen3-moe": hf.qwen3_moe,
    "olmoe": hf.olmoe,
    "deepseek-v2": hf.deepseek_v2,
    "deepseek-v3": hf.deepseek_v3,
    "deepseek-v3-mtp": _mtp,
    "bert": bert.write,
    "bert-masked": lambda directory: bert.write(directory, "MegatronBertForMaskedLM"),
    "llava-clip": _llava("clip"),
    "llava-siglip": _llava("siglip"),
}


def described(directory: Path) -> dict[str, object]:
    """Return config, and name to dtype and shape, of a model directory."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                part = opened.get_slice(name)
                tensors[name] = " ".join([part.get_dtype(), *map(str, part.get_shape())])
    config = json.loads((directory / "config.json").read_text())
    config.pop("transformers_version", None)
    return {"config": config, "tensors": tensors}


def families() -> None:
    """Write ``families.json``."""
    found = {}
    for name, write in WRITERS.items():
        with tempfile.TemporaryDirectory() as place:
            directory = Path(place, "model")
            write(directory)
            found[name] = described(directory)
    rows = [f"{json.dumps(name)}: {json.dumps(said)}" for name, said in sorted(found.items())]
    FAMILIES.write_text("{\n" + ",\n".join(rows) + "\n}\n")


def trained(place: Path) -> None:
    """Write what training runs leave, of one small Llama."""
    model = refill(write_llama(place / "model", **SMALL))
    (model / "generation_config.json").write_text("{}\n")
    for how in ("fsdp", "columns", "older mesh", "tp", "fsdp1", "fsdp1-mesh"):
        step = place / f"verl-{how.replace(' ', '-')}" / "global_step_10"
        step.parent.mkdir()
        verl.save(model, step / "actor", 2, how)
    for how in ("ddp x fsdp", "fsdp x tp"):
        step = place / f"verl-{how.replace(' ', '-')}" / "global_step_10"
        verl.save(model, step / "actor", 4, how)
    for form in ("dcp", "local_shard"):
        actor = place / f"rlinf-{form}" / "global_step_20" / "actor"
        rlinf.save(model, actor, 2, form=form)
        shutil.copy(model / "config.json", actor)
    fsdp.save(model, place / "dcp-container", 2, ("app", "model"))
    fsdp.save(model, place / "dcp-plain", 2)
    fsdp.save_safetensors(model, place / "dcp-safetensors", 2)
    adapters.make(model, place / "adapter", **LORA)
    adapters.make(model, place / "adapter-2", seed=9, **LORA)
    refill(place / "adapter", "adapter_model.safetensors")
    refill(place / "adapter-2", "adapter_model.safetensors", salt="2")
    adapters.save_sharded(model, place / "lora-inside" / "global_step_10", 2, LORA)
    shutil.rmtree(place / "lora-inside" / "global_step_10" / "dcp")
    state = load_file(model / "model.safetensors")
    for stage in (1, 2, 3):
        root = zero_by_hand.write(place / f"zero{stage}", state, stage, 3, groups=2)
        shutil.copy(model / "config.json", root)


def megatron(place: Path) -> None:
    """Write what Megatron has saved, itself and by hand."""
    model = refill(write_llama(place / "llama", **SMALL | {"num_hidden_layers": 4}))
    config = hf.config(model)
    pipeline = Layout(tp=2, pp=2, vpp=2)
    for form in ("torch", "torch_dist"):
        mcore.write(hf.mcore_model(config, pad_to=8), pipeline, place / form, TOKENS, format=form)
        actor = place / f"verl-{form}" / "global_step_30" / "actor"
        (actor / "huggingface").mkdir(parents=True)
        shutil.copy(model / "config.json", actor / "huggingface")
        said = {"head": None, "weights": True}
        mcore.write(
            hf.mcore_model(config, pad_to=8), pipeline, actor, TOKENS, format=form, verl=said
        )
    by_hand.write_ranks(place / "ranks", tiny("llama"), 2, STAGES, 64)
    by_hand.write_distributed(place / "distributed", tiny("qwen2-tied"), 64)
    for version in (None, 1.0, 2.0, 3.0):
        root = place / f"legacy-{version}"
        model = tiny("gpt") if (version or 0) > 1 else tiny_model("gpt", num_query_groups=8)
        legacy_by_hand.write(root, model, 2, by_hand.even(4, 2), 40, version=version)
    for spelling in ("old", "oldest"):
        root = place / f"legacy-{spelling}"
        legacy_by_hand.write(root, tiny("gpt"), 1, by_hand.even(4, 1), 40, spelling=spelling)

    one = mcore_model.Layout()
    tower = llava.tower("internvit")
    llava.megatron_writes(tower, one, place / "internvit", format="torch", images=None)
    (file,) = (place / "internvit").rglob("model_optim_rng.pt")
    state = torch.load(file, weights_only=False)
    for name, tensor in state["model"].items():  # as they are they would take 3 MB
        if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
            state["model"][name] = torch.from_numpy(
                values(name, "F16", tensor.shape).astype("float32")
            )
    torch.save(state, file)


def cleaned(place: Path) -> None:
    """Remove what is no part of a checkpoint, and the paths of this run."""
    for junk in (*place.rglob("store-*"), *place.rglob("README.md")):
        junk.unlink()
    for path in place.rglob("adapter_config.json"):
        said = json.loads(path.read_text())
        said["base_model_name_or_path"] = "base"
        path.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")


def pack(place: Path) -> None:
    """Write ``made.tar.xz``, the same for the same files."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime, member.uid, member.gid, member.uname, member.gname = 0, 0, 0, "", ""
        return member

    with tarfile.open(MADE, "w:xz", preset=9) as archive:
        for path in sorted(place.iterdir()):
            archive.add(path, path.name, filter=plain)


def main() -> None:
    families()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for kind, write in (("trained", trained), ("megatron", megatron)):
            (place / kind).mkdir()
            write(place / kind)
        cleaned(place)
        pack(place)


if __name__ == "__main__":
    sys.exit(main())
