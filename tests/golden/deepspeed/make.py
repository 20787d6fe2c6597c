"""Make the checkpoints of this directory with real DeepSpeed; PROVENANCE.md says how to run it.

    python make.py TARGET [CASE ...]      the cases kept here, unless some are named
    python make.py TARGET --all           every case of the grid

Every case leaves ``TARGET/<case>``, a directory as `DeepSpeedEngine.save_checkpoint` writes it, and
``TARGET/<case>.safetensors``, the weights that the ranks gathered from the live engine. Where
DeepSpeed's own ``zero_to_fp32`` can read the case, its result must be the same, bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import transformers
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from parallel import (
    gather_experts,
    gather_pipeline,
    gather_tensor_parallel,
    llama,
    mixture_groups,
    mixture_of,
    pipeline_of,
)
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "vocab_size": 23,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One way to train: what differs from a plain model with Adam."""

    stage: int
    world: int
    dtype: str
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    groups: bool = False
    tied: bool = False
    frozen: bool = False
    exclude: bool = False
    buffer: bool = False
    fused: bool = False
    universal: bool = False
    """Whether DeepSpeed makes a universal checkpoint of it, which is kept without the moments."""
    odd: bool = False
    """Whether there is a parameter whose size no alignment divides."""
    extract: bool = True
    """Whether ``zero_to_fp32`` reads this."""
    compare: bool = True
    """Whether `safe_get_full_fp32_param` gives the right weights."""
    tensor: int = 1
    """Tensor-parallel ranks of AutoTP."""
    pipeline: int = 0
    """Stages of a `PipelineModule`."""
    experts: int = 0
    """Experts of DeepSpeed's own mixture, over ``expert_parallel`` ranks."""
    expert_parallel: int = 1
    model: str = "Llama"


ROUND_ROBIN = {"round_robin_gradients": True}
FP32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}
ALIGNED = {"parameter_alignment": True}

KEPT = {
    "zero0_bf16": Case(0, 1, "bf16", extract=False),
    "zero0_fp32": Case(0, 2, "fp32", extract=False),
    "zero1_bf16_frozen": Case(1, 2, "bf16", frozen=True, groups=True, extract=False),
    "bf16_optimizer": Case(1, 2, "bf16", config=FP32_GRADIENTS, extract=False),
    "zero2_bf16_groups": Case(2, 3, "bf16", groups=True, tied=True),
    "zero2_fp16_round_robin": Case(2, 2, "fp16", zero=ROUND_ROBIN, compare=False),
    "zero3_bf16": Case(3, 3, "bf16", groups=True, frozen=True, tied=True),
    "zero3_fp32_buffer": Case(3, 2, "fp32", buffer=True),
    "universal2": Case(2, 2, "bf16", groups=True, tied=True, universal=True),
    "universal3": Case(3, 2, "bf16", frozen=True, universal=True),
    "zero2_excluded": Case(2, 1, "fp32", frozen=True, exclude=True),
    "zero3_excluded": Case(3, 2, "bf16", frozen=True, exclude=True),
    "zero3_hpz": Case(3, 4, "bf16", zero={"zero_hpz_partition_size": 2}),
    "tp2_zero1": Case(1, 4, "bf16", tensor=2, tied=True, extract=False),
    "tp2_zero3": Case(3, 4, "bf16", tensor=2, extract=False),
    "tp3_zero0_fp32": Case(0, 3, "fp32", tensor=3, model="Qwen2", extract=False),
    "pipeline_zero1": Case(1, 4, "bf16", pipeline=2, extract=False),
    "pipeline_tied": Case(1, 2, "bf16", pipeline=2, tied=True, extract=False),
    "pipeline_zero0_bf16": Case(0, 2, "bf16", pipeline=2, extract=False),
    "experts_zero2": Case(2, 4, "bf16", experts=4, expert_parallel=2, extract=False),
    "experts_zero0_fp32": Case(0, 2, "fp32", experts=2, expert_parallel=2, extract=False),
}
GRID = {
    f"grid_{stage}_{world}_{dtype}": Case(stage, world, dtype, groups=True, extract=stage > 0)
    for stage in (0, 1, 2, 3)
    for world in (1, 2, 4)
    for dtype in DTYPES
}
FURTHER = {
    "many_ranks": Case(2, 11, "bf16"),
    "zero3_many_ranks": Case(3, 11, "bf16", frozen=True),
    "aligned": Case(2, 2, "bf16", zero=ALIGNED, groups=True, odd=True),
    "zero1_round_robin": Case(1, 3, "bf16", zero=ROUND_ROBIN, groups=True, compare=False),
    "zero1_tied": Case(1, 2, "fp32", tied=True),
    "zero2_frozen": Case(2, 3, "bf16", frozen=True, groups=True, tied=True),
    "zero0_frozen": Case(0, 2, "bf16", frozen=True, groups=True, tied=True, extract=False),
    "zero0_fp16_frozen": Case(0, 2, "fp16", frozen=True, tied=True, extract=False),
    "zero3_sub_groups": Case(3, 2, "bf16", zero={"sub_group_size": 100}),
    "zero0_groups": Case(0, 1, "bf16", groups=True, extract=False),
    "zero0_fused": Case(0, 2, "bf16", fused=True, extract=False),
    "zero2_buffer": Case(2, 2, "bf16", buffer=True),
    "tp2_zero2": Case(2, 2, "fp16", tensor=2, model="Qwen2", extract=False),
    "tp2_starcoder": Case(1, 2, "bf16", tensor=2, model="Starcoder2", extract=False),
    "pipeline_zero0_fp32": Case(0, 2, "fp32", pipeline=2, extract=False),
    "experts_zero0_bf16": Case(0, 2, "bf16", experts=4, expert_parallel=2, extract=False),
    "experts_zero1": Case(1, 4, "bf16", experts=4, expert_parallel=4, extract=False),
    "experts_one_rank": Case(2, 2, "bf16", experts=2, expert_parallel=1, extract=False),
}
CASES = {**KEPT, **GRID, **FURTHER}


def config_of(case: Case) -> dict[str, Any]:
    """Return a config whose heads the tensor-parallel ranks can share."""
    heads = {"hidden_size": 12, "num_attention_heads": 6, "num_key_value_heads": 3}
    layers = {"num_hidden_layers": 2} if case.pipeline else {}
    pair = {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    return CONFIG | layers | {3: heads, 2: pair}.get(case.tensor, {})


def model_of(case: Case) -> torch.nn.Module:
    """Return the same random weights for every rank."""
    if case.experts:
        return mixture_of(case)
    torch.manual_seed(7)
    make_config = getattr(transformers, f"{case.model}Config")
    make_model = getattr(transformers, f"{case.model}ForCausalLM")
    model = make_model(make_config(**config_of(case), tie_word_embeddings=case.tied))
    if case.tensor > 1:  # a bias of zeros would lie anywhere
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter)
    if case.buffer:
        model.register_buffer("ages", torch.arange(5, dtype=torch.int64) * 1000003)
        model.register_buffer("scale", torch.linspace(0, 1, 3))
    if case.odd:
        model.odd = torch.nn.Parameter(torch.linspace(1, 2, 5))
    if case.frozen:
        model.model.embed_tokens.weight.requires_grad_(False)
        model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
        model.model.norm.weight.requires_grad_(False)
    return model


def groups_of(case: Case, model: torch.nn.Module) -> list[dict[str, Any]]:
    """Return the parameter groups of the optimizer: one, or matrices and vectors apart."""
    if case.experts:
        return mixture_groups(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not case.groups:
        return [{"params": trained}]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]


def gathered(case: Case, engine: Any) -> dict[str, torch.Tensor]:
    """Return the weights of the live engine: fp32 masters, and what is not trained as it is."""
    masters = {}
    if case.stage == 0 and case.dtype != "fp32" and hasattr(engine.optimizer, "fp16_groups"):
        masters = masters_of(engine)
    if case.tensor > 1:
        return gather_tensor_parallel(engine, masters)
    if case.experts:
        return gather_experts(case, engine, masters)
    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter in masters:
            value = masters[parameter].detach()
        elif parameter.requires_grad and case.stage and case.compare:
            value = deepspeed.utils.safe_get_full_fp32_param(parameter)
        else:
            with deepspeed.zero.GatheredParameters([parameter], enabled=case.stage == 3):
                value = parameter.detach().clone()
        found[name] = value.clone().contiguous()
    for name, buffer in engine.module.named_buffers():
        if name in engine.module.state_dict():
            found[name] = buffer.detach().clone()
    return found


def masters_of(engine: Any) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Return the fp32 masters of an optimizer without ZeRO, by parameter."""
    groups = engine.optimizer.fp16_groups
    if hasattr(engine.optimizer, "fp32_groups_flat"):
        flat = torch._utils._unflatten_dense_tensors
        masters = map(flat, engine.optimizer.fp32_groups_flat, groups)
    else:
        masters = engine.optimizer.fp32_groups
    pairs = zip(groups, masters, strict=True)
    return {own: master for pair in pairs for own, master in zip(*pair, strict=True)}


def train(rank: int, case: Case, directory: Path, port: int) -> None:
    """Train for three steps as one rank, save, and let rank 0 write the gathered weights."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.world)}
    os.environ |= {"LOCAL_SIZE": str(case.world), "MASTER_ADDR": "localhost"}
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    names: dict[int, str] = {}
    if case.pipeline:
        model, names = pipeline_of(case, llama(case, config_of(case)))
    else:
        model = model_of(case)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        **({"tensor_parallel": {"autotp_size": case.tensor}} if case.tensor > 1 else {}),
        "zero_optimization": {"stage": case.stage, **case.zero},
        "bf16": {"enabled": case.dtype == "bf16"},
        "fp16": {"enabled": case.dtype == "fp16", "initial_scale_power": 4},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        **case.config,
    }
    adam = deepspeed.ops.adam.FusedAdam if case.fused else torch.optim.AdamW
    optimizer = adam(groups_of(case, model), lr=0.01)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    torch.manual_seed(100 + rank // case.tensor)
    for _ in range(3):
        step(case, engine)
    engine.save_checkpoint(str(directory), exclude_frozen_parameters=case.exclude)
    weights = gather_pipeline(engine, names) if case.pipeline else gathered(case, engine)
    torch.distributed.barrier()
    if rank == 0:
        keep(case, directory, weights)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def step(case: Case, engine: Any) -> None:
    """Train for one step on random tokens."""
    tokens = torch.randint(CONFIG["vocab_size"], (2, 8))
    if case.pipeline:
        engine.train_batch(iter([(tokens, tokens)]))
        return
    loss = engine(tokens) if case.experts else engine(input_ids=tokens, labels=tokens).loss
    engine.backward(loss + engine.module.odd.sum() if case.odd else loss)
    engine.step()


def keep(case: Case, directory: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write the gathered weights, after a comparison with those of ``zero_to_fp32``."""
    if case.extract:
        extracted = get_fp32_state_dict_from_zero_checkpoint(str(directory))
        if not case.compare:
            narrow = weights
            weights = {name: extracted[name].clone() for name in weights}
            for name, value in narrow.items():
                assert torch.equal(weights[name].to(value.dtype), value), name
        for name, value in extracted.items():
            own = weights.get(name, weights["model.embed_tokens.weight"])  # tied: under both names
            assert value.dtype == own.dtype, name
            assert torch.equal(value, own), name
    save_file(weights, directory.parent / f"{directory.name}.safetensors")
    for script in directory.glob("zero_to_*.py"):
        script.unlink()


def make_universal(directory: Path) -> None:
    """Put a universal checkpoint in the place of the one that it is made from."""
    tag = directory / (directory / "latest").read_text()
    module = "deepspeed.checkpoint.ds_to_universal"
    flags = ["--input_folder", tag, "--output_folder", f"{tag}_universal", "--inject_missing_state"]
    subprocess.run([sys.executable, "-m", module, *map(str, flags)], check=True)
    shutil.rmtree(tag)
    (directory / "latest").unlink()
    for path in directory.rglob("*.pt"):
        if path.name in ("exp_avg.pt", "exp_avg_sq.pt", "step.pt"):
            path.unlink()


def main(target: Path, names: list[str]) -> None:
    """Make the named cases, those that are kept, or all."""
    target.mkdir(parents=True, exist_ok=True)
    chosen = list(CASES) if names == ["--all"] else names or list(KEPT)
    (target / "model").mkdir(exist_ok=True)
    (target / "model" / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **CONFIG})
    )
    for name in chosen:
        shutil.rmtree(target / name, ignore_errors=True)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        case = CASES[name]
        torch.multiprocessing.spawn(train, (case, target / name, port), case.world)
        if case.universal:
            make_universal(target / name)
        sys.stderr.write(f"made {name}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
