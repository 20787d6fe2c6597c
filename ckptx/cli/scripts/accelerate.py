"""accelerate: ``accelerate merge-weights``.

Source: huggingface/accelerate src/accelerate/commands/merge.py @ v1.15.0.
"""

from __future__ import annotations

from ckptx.cli.scripts.script import SOURCE, TARGET, Script, flag, switch

MERGE_WEIGHTS = Script(
    "merge-weights",
    "accelerate merge-weights",
    (
        flag("checkpoint_directory", becomes=SOURCE, help="The checkpoint."),
        flag("output_path", becomes=TARGET, help="Directory to write."),
        switch(
            "--unsafe_serialization",
            becomes={True: ("--weight-files", "bin")},
            help="Write pytorch_model.bin, not model.safetensors.",
        ),
        switch(
            "--remove_checkpoint_dir",
            help="Remove the checkpoint.",
            refused="ckptx removes no checkpoint; remove it when 'ckptx verify' says equal",
        ),
    ),
    # accelerate writes one file, whatever its size.
    always=("--from", "dcp", "--to", "hf", "--max-shard-size", "1000000GB"),
)

SCRIPTS = (MERGE_WEIGHTS,)
