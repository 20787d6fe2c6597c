"""accelerate: ``accelerate merge-weights``.

Source: huggingface/accelerate src/accelerate/commands/merge.py @ v1.15.0.
"""

from ckptx.cli.scripts.script import SOURCE, TARGET, Script, flag, switch

MERGE_WEIGHTS = Script(
    "merge-weights",
    "accelerate merge-weights",
    (
        flag("checkpoint_directory", "The checkpoint.", SOURCE),
        flag("output_path", "Directory to write.", TARGET),
        switch(
            "--unsafe_serialization",
            "Write pytorch_model.bin, not model.safetensors.",
            {True: ("--weight-files", "bin")},
        ),
        switch(
            "--remove_checkpoint_dir",
            "Remove the checkpoint.",
            refused="ckptx removes no checkpoint; remove it when 'ckptx verify' says equal",
        ),
    ),
    # accelerate writes one file, whatever its size.
    always=("--from", "dcp", "--to", "hf", "--no-config", "--max-shard-size", "1000000GB"),
)

SCRIPTS = (MERGE_WEIGHTS,)
