"""The tour of ``make demo``: a small Llama to Megatron Core and back, every byte the same.

A seeded Llama of about 30 million parameters is saved by transformers, with a tokenizer trained on
the spot. Then only the ``ckptx`` command runs; every command is shown before its output.
"""

from __future__ import annotations

import filecmp
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

TEXT = [
    "A checkpoint is a placement of bytes.",
    "Every target byte is written exactly once.",
    "Every source tensor is consumed, or dropped by name with a reason.",
    "Every inexact step is listed in the report.",
]


def main() -> int:
    """Run the tour in a temporary directory, or in the one that is given; return the exit code."""
    if len(sys.argv) > 1:
        place = Path(sys.argv[1])
        place.mkdir(parents=True, exist_ok=True)
        return tour(place)
    with tempfile.TemporaryDirectory(prefix="ckptx-demo-") as temporary:
        return tour(Path(temporary))


def tour(place: Path) -> int:
    """Make a model in ``place``, convert it around, compare the ends."""
    os.chdir(place)
    say("Make a Llama of about 30M parameters: grouped queries, untied, a vocabulary of 8191.")
    make_model(Path("llama"))
    say("What would a conversion to Megatron Core at TP=2, PP=2 do? Plan it; nothing moves.")
    run("ckptx", "plan", "llama", "megatron", "--to", "core", "--tp", "2", "--pp", "2")
    say("Do it, in Megatron's own spelling.")
    run(
        *("ckptx-convert", "--model-type", "GPT", "--loader", "hf", "--saver", "core"),
        *("--load-dir", "llama", "--save-dir", "megatron"),
        *("--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2"),
    )
    say("Reshard it: TP=4, one pipeline stage, one file per rank.")
    reshard = ("--to", "core", "--tp", "4", "--pp", "1", "--ckpt-format", "torch")
    run("ckptx", "convert", "megatron", "resharded", *reshard)
    say("Return it to Hugging Face. No base model is needed: config and tokenizer rode along.")
    run("ckptx", "convert", "resharded", "back", "--to", "hf")
    say("Compare the checkpoints in canonical space, across formats.")
    run("ckptx", "verify", "llama", "resharded")
    say("And compare the two Hugging Face directories, byte by byte.")
    return same_bytes(Path("llama"), Path("back"))


def make_model(directory: Path) -> None:
    """Save a seeded Llama and a byte-pair tokenizer with transformers."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8191,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(TEXT, vocab_size=400, special_tokens=["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(directory)
    count = sum(parameter.numel() for parameter in model.parameters())
    out(f"{count:,} parameters, {', '.join(sorted(path.name for path in directory.iterdir()))}")


def same_bytes(left: Path, right: Path) -> int:
    """Say of every file whether it is the same; return 0 if all are.

    A config that transformers 5 wrote gets the keys of transformers 4 besides its own.
    """
    names = sorted({path.name for side in (left, right) for path in side.iterdir()})
    ours = {"ckptx-manifest.json"}
    different = 0
    for name in names:
        if name in ours:
            continue
        files = [left / name, right / name]
        same = all(file.is_file() for file in files) and filecmp.cmp(*files, shallow=False)
        more = ""
        if name == "config.json" and not same:
            before, after = (json.loads(file.read_text()) for file in files)
            if same := before.items() <= after.items():
                more = f", with {', '.join(after.keys() - before.keys())} for transformers 4"
        different += not same
        size = max(file.stat().st_size for file in files if file.is_file())
        out(f"{'same' if same else 'DIFFERENT':<10}{name:<28}{size:>12,} bytes{more}")
    out("everything came back" if not different else f"{different} files differ")
    return int(different > 0)


def say(text: str) -> None:
    """Write a step of the tour."""
    out(f"\n# {text}")


def run(*command: str) -> None:
    """Show a command and run it; end the tour if it fails."""
    out(f"$ {shlex.join(command)}")
    subprocess.run(command, check=True)


def out(text: str) -> None:
    """Write a line at once, so that it stands before the output of commands."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
