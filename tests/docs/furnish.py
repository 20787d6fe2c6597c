"""Tiny checkpoints by the names that pages use, from the frameworks that would have made them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from ckptx.cli.main import main
from tests.formats import zero_by_hand
from tests.oracles import fsdp, hf, llava, mcore_model, rlinf, verl

LORA = {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def run(*words: str) -> int:
    """Run a command of ``ckptx`` in this process; return its exit code."""
    with pytest.raises(SystemExit) as end:
        main(words)
    return int(end.value.code or 0)


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def a_llama(place: Path) -> None:
    hf.llama(place / "llama")


def readme(place: Path) -> None:
    a_llama(place)
    hf.llama(place / "base-model", seed=1)
    verl.save(place / "llama", place / "run" / "global_step_100" / "actor", 2)
    # The Trainer of transformers, through accelerate, so names what FSDP has sharded.
    trainer = place / "run" / "checkpoint-500"
    trainer.mkdir()
    fsdp.save(place / "llama", trainer / "pytorch_model_fsdp_0", 2, ("model",))
    adapter(place / "base-model", place / "adapter", seed=5)


def convert_page(place: Path) -> None:
    a_llama(place)
    hf.mixtral(place / "mixtral")
    towers(place)
    qwen = place / "Qwen3-8B"
    hf.qwen3(qwen)
    for seed, name in enumerate(("adapter", "first", "second")):
        adapter(qwen, place / name, seed=seed)
    lora_inside(qwen, place / "RUN" / "global_step_10")
    hf.llama(place / "trained", seed=1)
    for step in (10, 20):
        hf.llama(place / "sft" / f"checkpoint-{step}", seed=step)
    incomplete(place)
    reward(qwen, place / "reward-run")
    for step in (200, 400):
        actor = place / "results" / "actor"
        zero_by_hand.write(actor, weights(qwen), 3, 2, tag=f"global_step{step}", step=step)


def towers(place: Path) -> None:
    """A LLaVA of transformers, and one with InternViT that Megatron has saved."""
    llava.write(place / "llava-1.5", llava.config("clip"))
    model = llava.tower("internvit")
    one = mcore_model.Layout()
    llava.megatron_writes(model, one, place / "internvit-megatron", format="torch", images=None)


def adapter(base: Path, target: Path, seed: int) -> None:
    from tests.oracles import adapters  # which needs peft

    adapters.make(base, target, seed=seed, **LORA)


def lora_inside(base: Path, step: Path) -> None:
    """A step of verl whose model holds its adapter, without the file that says its alpha."""
    from tests.oracles import adapters

    adapters.save_sharded(base, step, 2, LORA)
    shutil.rmtree(step / "dcp")


def incomplete(place: Path) -> None:
    shutil.copytree(place / "llama", place / "incomplete")
    state = weights(place / "incomplete")
    del state["lm_head.weight"]
    save_file(state, place / "incomplete" / "model.safetensors", {"format": "pt"})


def reward(base: Path, root: Path) -> None:
    """A model with a score under ZeRO 2; the config of the base lies elsewhere."""
    config = AutoConfig.from_pretrained(base, num_labels=1, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_config(config)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    zero_by_hand.write(root, state, 2, 2, tag="global_step200", step=200)


def verify_page(place: Path) -> None:
    """What conversions have written, and a model in two dtypes."""
    a_llama(place)
    hf.tokenizer(place / "llama")
    os.chdir(place)
    assert run("convert", "llama", "tp4", "--to", "core", "--tp", "4") == 0
    assert run("convert", "tp4", "back", "--to", "hf") == 0
    shutil.copytree("back", "copied")
    hf.llama(place / "trained")
    hf.llama(place / "exported", dtype=torch.bfloat16)
    hf.llama(place / "bf16", dtype=torch.bfloat16)
    shutil.copytree("bf16", "bf16-as-fp32")
    wide = {name: tensor.float() for name, tensor in weights(place / "bf16").items()}
    save_file(wide, "bf16-as-fp32/model.safetensors", {"format": "pt"})


def fsdp_page(place: Path) -> None:
    a_llama(place)
    fsdp.save(place / "llama", place / "checkpoint-dcp", 2, ("model",))


def rlinf_page(place: Path) -> None:
    base = place / "BASE"
    hf.llama(base)
    rlinf.save(base, place / "global_step_10" / "actor", 2)
    torch.save(weights(base), place / "full_weights.pt")
    # The keys of RLinf's file that name places; JSON is YAML.
    config = {
        "convertor": {"ckpt_path": None, "save_path": None},
        "model": {"model_path": "BASE", "model_type": "llama"},
    }
    (place / "fsdp_model_convertor.yaml").write_text(json.dumps(config))


def verl_page(place: Path) -> None:
    a_llama(place)
    for seed, name in enumerate(("actor", "critic")):
        model = place / f"trained-{name}"
        hf.llama(model, seed=seed)
        verl.save(model, place / "RUN" / "global_step_10" / name, 2)


PAGES = {
    "README.md": readme,
    "docs/convert.md": convert_page,
    "docs/from-megatron.md": a_llama,
    "docs/inspect.md": a_llama,
    "docs/verify.md": verify_page,
    "docs/formats/fsdp.md": fsdp_page,
    "docs/formats/rlinf.md": rlinf_page,
    "docs/formats/verl.md": verl_page,
}
"""What lies in the current directory, where the commands of a page run."""
