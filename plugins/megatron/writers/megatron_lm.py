"""How Megatron-LM loads what is written for it, and what else lies in its root.

Source: NVIDIA/Megatron-LM megatron/training/checkpointing.py (load_checkpoint,
load_args_from_checkpoint, check_checkpoint_args) @ core_v0.19.2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ckptx.errors import CkptxError
from ckptx.plugins.megatron import directory, per_rank, torch_dist
from ckptx.plugins.megatron.directory import SIDECARS
from ckptx.plugins.megatron.forms import CORE
from ckptx.plugins.megatron.target_parallelism import TargetParallelism
from ckptx.storage.location import Location

_OF_MODEL = """
    num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups num_experts
    normalization swiglu position_embedding_type add_bias_linear add_qkv_bias qk_layernorm
    multi_latent_attention untie_embeddings_and_output_weights
"""
"""The args by which two models are told apart."""
_TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}


def step_flag(chosen: TargetParallelism) -> str:
    """Return the flag that loads an iteration which the tracker does not name, if there is one."""
    return f" --ckpt-step {chosen.number}" if chosen.number else ""


def form_in_words(generation: str, ckpt_format: str) -> str:
    """Return a form of checkpoints, as messages call it."""
    return f"{generation} --ckpt-format {ckpt_format}" if generation == CORE.name else generation


def load_command(
    script: str,
    args: Mapping[str, Any],
    chosen: TargetParallelism,
    flags: Sequence[str],
    sidecars: Collection[str],
) -> str:
    """Return the command that loads a target, whose root is ``{target}``.

    Megatron takes a state of the optimizer and of random numbers for granted unless the iteration
    is a release, and the tokenizer of args whether they name one or not.
    """
    of_iteration = ["--no-load-optim --no-load-rng"] * (chosen.iteration != "release")
    of_tokenizer = []
    if not args.get("tokenizer_model"):
        of_tokenizer += ["--no-use-tokenizer-model-from-checkpoint-args"]
        if _TOKENIZER_FILES.intersection(sidecars):
            of_tokenizer += [
                "--tokenizer-type HuggingFaceTokenizer",
                f"--tokenizer-model {{target}}/{chosen.directory}/{SIDECARS}",
            ]
    experts = []
    if args.get("num_experts"):
        experts += [f"--expert-model-parallel-size {chosen.ep}"]
    return " ".join(
        [
            *(script, "--load {target}{step} --use-checkpoint-args"),
            *of_iteration,
            *of_tokenizer,
            f"--ckpt-format {args['ckpt_format']} --tensor-model-parallel-size {chosen.tp}",
            *chosen.pipeline.flags(),
            *experts,
            *flags,
        ]
    )


def conflict(
    root: Location | None, chosen: TargetParallelism, form: str, args: Mapping[str, Any]
) -> str:
    """Return how the checkpoint that a root's tracker names differs from what is to be written.

    A run goes on in its root in one form, with one model. ``form`` is that to be written, in
    words. Empty where the two go together, or nothing that can be read is there.
    """
    try:
        found = directory.find(root) if root and root.is_dir() else None
        if found is None or found.path.name == chosen.directory:
            return ""
        kind, there = CORE, {}
        if found.format == "torch_dist":
            there = torch_dist.args_in(found)
        else:
            kind, there = per_rank.first_rank(found)
    except CkptxError:
        return ""
    other = form_in_words(kind.name, found.format)
    differing = [
        f"{name} {there[name]}, here {args[name]}"
        for name in _OF_MODEL.split()
        if name in there and name in args and there[name] != args[name]
    ]
    if other != form:
        differing.insert(0, f"{other}, here {form}")
    if not differing:
        return ""
    return (
        f"{root}: {found.path.name}, which its tracker names, is another model, or of another form "
        f"({'; '.join(differing)}); choose another target, or write beside it with --overwrite"
    )
