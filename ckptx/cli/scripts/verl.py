"""verl: the model merger, old and new, the converter to Megatron, and a fork's simple converter.

Source: volcengine/verl verl/model_merger/base_model_merger.py @ 17321c5,
scripts/legacy_model_merger.py @ 0d3aa25, scripts/converter_hf_to_mcore.py @ 03951d8 and later.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ckptx.cli.scripts.script import ROUNDED, SAME, SOURCE, TARGET, Script, Values, flag, switch

_NO_MODEL = "no model is built"
_NO_CODE = "no model is built, so no code of it is run"


_LOCAL = flag("--local_dir", "Directory of the ranks' files, .../global_step_N/actor.", SOURCE)
_BACKEND = ("fsdp", "megatron")
_BACKEND_HELP = "Who has saved it; ckptx sees it in the files."
_UNUSED = (
    switch("--use_cpu_initialization", "Start on the CPU.", needless=_NO_MODEL),
    switch(
        "--trust-remote-code --trust_remote_code", "Run the code of the model.", needless=_NO_CODE
    ),
)
_NOT_UPLOADED = "nothing is uploaded; convert, then: hf upload REPOSITORY DIRECTORY"

_OLD_TEST = "write 'ckptx from-script model_merger test' with the other flags"

MERGE = Script(
    "merge",
    "verl, model_merger merge",
    (
        flag("--backend", _BACKEND_HELP, dict.fromkeys(_BACKEND, ()), required=True),
        _LOCAL,
        flag("--target_dir", "Directory of the merged model.", TARGET, default="tmp"),
        flag("--hf_model_path", "Model whose config is taken.", "--hf-base"),
        switch("--tie-word-embedding", "Of Megatron: the model is tied.", SAME),
        switch("--is-value-model", "Of Megatron: the model has a head with one output.", SAME),
        flag("--hf_upload_path", "Repository.", refused=_NOT_UPLOADED),
        switch("--private", "Make the repository private.", refused=_NOT_UPLOADED),
        switch("--test", "Compare, in old releases.", refused=_OLD_TEST),
        flag("--test_hf_dir", "What with.", refused=_OLD_TEST),
        *_UNUSED,
    ),
    always=("--from", "verl", "--to", "hf", "--dtype", "bfloat16"),
)

_TOLERANCES = {
    # The merger compares what it has rounded to bfloat16 with what it has rounded before.
    "fsdp": ROUNDED,
    "megatron": ("--ignore-dtype", "--rtol", "0.05", "--atol", "0.01"),
}

TEST = Script(
    "test",
    "verl, model_merger test",
    (
        flag("--backend", "Who has saved it.", _TOLERANCES, required=True),
        _LOCAL,
        flag("--test_hf_dir", "Model to compare with.", TARGET),
        flag(
            "--hf_model_path",
            "Model whose config is taken.",
            needless="the config in the checkpoint is taken",
        ),
        *(
            switch(name, text, needless="it is seen in the files")
            for name, text in (
                ("--tie-word-embedding", "Of Megatron: the model is tied."),
                ("--is-value-model", "Of Megatron: the model has a head with one output."),
            )
        ),
        *_UNUSED,
    ),
    command="verify",
    always=("--from-a", "verl", "--from-b", "hf"),
)


def _compared(values: Values) -> Iterator[str]:
    """Yield the second command where a conversion is to be tested."""
    if values["test"]:
        yield from ("verify", values["hf_model_path"], values["output_path"], *ROUNDED)


MCORE = Script(
    "converter_hf_to_mcore",
    "verl, scripts/converter_hf_to_mcore.py",
    (
        flag("--hf_model_path", "Hugging Face model to convert.", SOURCE),
        flag("--output_path", "Directory to write.", TARGET),
        flag("--pp_size", "Pipeline stages.  [default: 1]", "--pp"),
        flag("--ep_size", "Expert-parallel ranks.  [default: 1]", "--ep"),
        switch("--test", "Compare the result with the model."),
        *_UNUSED,
    ),
    # verl pads no vocabulary, and reads the directory itself (dist_checkpointing_path).
    always=(
        *("--from", "hf", "--to", "core", "--ckpt-format", "torch_dist", "--dtype", "bfloat16"),
        *("--make-vocab-size-divisible-by", "1", "--no-iteration-directory"),
    ),
    then=_compared,
)


def _beside(values: Values) -> tuple[str, str]:
    """Return the checkpoint, and ``CHECKPOINT_merged`` next to it where no output is named."""
    source = Path(values["checkpoint"])
    return str(source), values["output"] or str(source.with_name(f"{source.name}_merged"))


def _states(values: Values) -> tuple[str, ...]:
    """Return the option that keeps the states of the training, where there are any."""
    folder = Path(values["checkpoint"]) / values["actor_dir"]
    return ("--extra-state",) if any(folder.glob("extra_state_world_size_*")) else ()


SIMPLE = Script(
    "convert_checkpoint_simple",
    "a fork of verl, scripts/convert_checkpoint_simple.py",
    (
        flag("checkpoint", "The step, .../global_step_150.", required=True),
        flag("--output", "Directory to write.  [default: CHECKPOINT_merged]"),
        flag("--actor-dir", "Directory of the ranks' files in it.", SAME, default="actor"),
        flag(
            "--dtype",
            "Dtype of the model.",
            {name: ("--dtype", name) for name in ("bfloat16", "float16", "float32")},
            default="bfloat16",
        ),
    ),
    always=("--from", "verl", "--to", "hf"),
    places=_beside,
    further=_states,
)

SCRIPTS = (
    Script(
        "model_merger",
        "verl, verl/model_merger and scripts/legacy_model_merger.py",
        parts=(MERGE, TEST),
        aliases=("legacy_model_merger",),
        unnamed="merge",  # scripts/model_merger.py before verl 0.4 had no sub-commands
    ),
    MCORE,
    SIMPLE,
)
