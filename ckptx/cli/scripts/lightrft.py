"""LightRFT: its scripts between DeepSpeed, FSDP and Hugging Face, and the one that tries a model.

Source: opendilab/LightRFT lightrft/utils/ckpt_scripts/{ds2hf,fsdp2hf,hf2fsdp,test_model}.py @
49e62cb.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ckptx.cli.scripts.script import SOURCE, TARGET, Script, Values, choice, dtype_of, flag, switch

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
        flag("--checkpoint_dir", required=True, help="The checkpoint, or a tag of it."),
        flag("--output_dir", required=True, help="Directory to write."),
        flag("--hf_base", required=True, help=_BASE),
        flag("--tag", "-t", becomes="--tag", help="Tag below the checkpoint."),
        switch(
            "--exclude_frozen_parameters",
            becomes="--exclude-frozen-parameters",
            help="Take frozen weights from the base, not from the checkpoint.",
        ),
        switch("--debug", "-d", becomes="--verbose", help="Show details."),
        choice(
            "--model_type",
            words={
                "vision2seq": ("--to", "hf"),
                "grm": ("--to", "hf", "--prefix", "model."),
                **dict.fromkeys(_SCALAR, ("--to", "pytorch")),
            },
            default="vision2seq",
            help="Module that was trained.",
        ),
        flag("--pooling_method", help="Of srm: attn or last.", needless=_SEEN),
        switch("--scale_for_train", help="Of srm: has a scale.", needless=_SEEN),
        flag("--probing_layer", help="Of srm: layer of the head.", needless=_SEEN),
        flag("--heads_types", help="Of srm: heads.", needless=_SEEN, many=True),
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
        flag("--hf_base", becomes="--hf-base", required=True, help=_BASE),
        flag("--checkpoint_dir", becomes=SOURCE, help="The checkpoint."),
        flag("--output_dir", becomes=TARGET, help="Directory to write."),
    ),
    always=("--from", "dcp", "--to", "hf"),
    further=lambda values: dtype_of(values["hf_base"]),
)

HF2FSDP = Script(
    "hf2fsdp",
    "LightRFT, lightrft/utils/ckpt_scripts/hf2fsdp.py",
    (
        flag("--hf_checkpoint", becomes=SOURCE, help="The model."),
        flag("--output", becomes=TARGET, help="Directory to write."),
    ),
    always=("--from", "hf", "--to", "dcp", "--target-names", "files"),
)

TEST_MODEL = Script(
    "test_model",
    "LightRFT, lightrft/utils/ckpt_scripts/test_model.py",
    (
        flag("--model_path", becomes=SOURCE, help="The model."),
        choice(
            "--device",
            words={name: ("--device", name) for name in ("cuda", "cpu", "auto")},
            help="Where to compute.",
        ),
        flag("--test_prompts", becomes="--prompt", many=True, help="Texts to continue."),
        flag(
            "--max_new_tokens", becomes="--max-new-tokens", default="256", help="Tokens for each."
        ),
        switch("--benchmark", becomes="--benchmark", help="Measure the speed, too."),
        flag("--benchmark_samples", becomes="--samples", help="Prompts to measure."),
        flag(
            "--output_file",
            becomes="--output-file",
            default="test_results.json",
            help="Where to write the texts as JSON.",
        ),
    ),
    command="generate",
    # As the script samples; it has a penalty for repetition besides.
    always=("--temperature", "0.7", "--top-p", "0.9"),
)

SCRIPTS = (DS2HF, FSDP2HF, HF2FSDP, TEST_MODEL)
