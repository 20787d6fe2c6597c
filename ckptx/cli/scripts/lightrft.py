"""LightRFT: its scripts between DeepSpeed, FSDP and Hugging Face, and the one that tries a model.

Source: opendilab/LightRFT lightrft/utils/ckpt_scripts/{ds2hf,fsdp2hf,hf2fsdp,test_model}.py @
49e62cb.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ckptx.cli.scripts.script import SAME, SOURCE, TARGET, Script, Values, dtype_of, flag, switch

_SCALAR = ("srm_vl", "srm_al")
"""Reward models whose state dict LightRFT saves whole, with the names of its own module."""
_BASE = "Model that the training began with."


def _output(values: Values) -> tuple[str, str]:
    """Return source and target; a scalar reward model is one file in the directory."""
    target = values["output_dir"]
    if values["model_type"] in _SCALAR:
        target = str(Path(target) / "pytorch_model.bin")
    return values["checkpoint_dir"], target


def _ds2hf(values: Values) -> Iterator[str]:
    base = values["hf_base"]
    yield from dtype_of(base)
    if values["model_type"] not in _SCALAR:
        yield from ("--hf-base", base)
        if values["exclude_frozen_parameters"]:
            yield from ("--fill-from-base", "*")


def _own_names(values: Values) -> Iterator[str]:
    if values["model_type"] in _SCALAR:
        yield (
            "the file has the names of LightRFT's module, for LightRFT; config and tokenizer of "
            "--hf_base are not copied to it, since transformers could not load them together"
        )


_SEEN = "no model is built: the tensors are converted by name"

DS2HF = Script(
    "ds2hf",
    "LightRFT, lightrft/utils/ckpt_scripts/ds2hf.py",
    (
        flag("--checkpoint_dir", "The checkpoint, or a tag of it.", required=True),
        flag("--output_dir", "Directory to write.", required=True),
        flag("--hf_base", _BASE, required=True),
        flag("--tag -t", "Tag below the checkpoint.", SAME),
        switch(
            "--exclude_frozen_parameters",
            "Take frozen weights from the base, not from the checkpoint.",
            SAME,
        ),
        switch("--debug -d", "Show details.", "--verbose"),
        flag(
            "--model_type",
            "Module that was trained.",
            {
                "vision2seq": ("--to", "hf"),
                "grm": ("--to", "hf", "--strip-prefix", "model."),
                **dict.fromkeys(_SCALAR, ("--to", "pytorch")),
            },
            default="vision2seq",
        ),
        flag("--pooling_method", "Of srm: attn or last.", needless=_SEEN),
        switch("--scale_for_train", "Of srm: has a scale.", needless=_SEEN),
        flag("--probing_layer", "Of srm: layer of the head.", needless=_SEEN),
        flag("--heads_types", "Of srm: heads.", needless=_SEEN, many=True),
    ),
    always=("--from", "deepspeed"),
    places=_output,
    further=_ds2hf,
    differs=_own_names,
)

FSDP2HF = Script(
    "fsdp2hf",
    "LightRFT, lightrft/utils/ckpt_scripts/fsdp2hf.py",
    (
        flag("--hf_base", _BASE, SAME, required=True),
        flag("--checkpoint_dir", "The checkpoint.", SOURCE),
        flag("--output_dir", "Directory to write.", TARGET),
    ),
    always=("--from", "dcp", "--to", "hf"),
    further=lambda values: dtype_of(values["hf_base"]),
)

HF2FSDP = Script(
    "hf2fsdp",
    "LightRFT, lightrft/utils/ckpt_scripts/hf2fsdp.py",
    (
        flag("--hf_checkpoint", "The model.", SOURCE),
        flag("--output", "Directory to write.", TARGET),
    ),
    always=("--from", "hf", "--to", "dcp", "--target-names", "files"),
)

TEST_MODEL = Script(
    "test_model",
    "LightRFT, lightrft/utils/ckpt_scripts/test_model.py",
    (
        flag("--model_path", "The model.", SOURCE),
        flag(
            "--device",
            "Where to compute.",
            {name: ("--device", name) for name in ("cuda", "cpu", "auto")},
        ),
        flag("--test_prompts", "Texts to continue.", "--prompt", many=True),
        flag("--max_new_tokens", "Tokens for each.", SAME, default="256"),
        switch("--benchmark", "Measure the speed, too.", SAME),
        flag("--benchmark_samples", "Prompts to measure.", "--samples"),
        flag(
            "--output_file", "Where to write the texts as JSON.", SAME, default="test_results.json"
        ),
    ),
    command="generate",
    # As the script samples; it has a penalty for repetition besides.
    always=("--temperature", "0.7", "--top-p", "0.9"),
)

SCRIPTS = (DS2HF, FSDP2HF, HF2FSDP, TEST_MODEL)
