"""``generate``, and ``verify --logits``: commands that run models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ckptx.cli.options import Checkpoint, output_options, show_result
from ckptx.conversion.options import Dtype
from ckptx.registry.source import Source

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_PROMPT = "The capital of France is"
_ABOUT_IMAGE = "What is in the image?"


class Tokens(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5
    """Token ids, separated by blanks or commas."""

    name = "tokens"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[int]:
        """Return the numbers."""
        if isinstance(value, list):
            return value
        words = value.replace(",", " ").split()
        if not words or not all(word.isdecimal() for word in words):
            self.fail(f'{value!r} is no list of tokens; write "1 2 3"', param, ctx)
        return [int(word) for word in words]


def generate_command() -> click.Command:
    """Return the command that lets a model generate text."""
    return click.Command(
        "generate",
        callback=_generate,
        help="Load a model with transformers and generate text; exit 1 if weights are missing or "
        "left over, logits are not finite, or nothing comes out.",
        short_help="Load a model with transformers and generate text.",
        params=[
            click.Argument(["model"], type=Checkpoint(file_okay=False)),
            click.Option(
                ["--prompt", "prompts"],
                multiple=True,
                help=f"Text to continue. Repeatable.  [default: {_PROMPT!r}]",
            ),
            click.Option(
                ["--prompt-ids"],
                multiple=True,
                type=Tokens(),
                metavar="IDS",
                help='Tokens to continue, as "1 2 3"; needs no tokenizer. Repeatable.',
            ),
            *_sampling_options(),
            click.Option(["--dtype"], type=Dtype(), help="Compute in this dtype.  [as stored]"),
            click.Option(
                ["--device"],
                type=click.Choice(["auto", "cpu", "cuda"]),
                default="auto",
                show_default=True,
                help="Where to compute.",
            ),
            click.Option(
                ["--tokenizer"], type=_FOLDER, help="Directory of the tokenizer.  [MODEL]"
            ),
            click.Option(
                ["--image"], type=_FILE, help="Image before every prompt, for models that see."
            ),
            click.Option(["--benchmark"], is_flag=True, help="Measure tokens/s, too."),
            click.Option(
                ["--samples"],
                type=click.IntRange(1),
                default=3,
                show_default=True,
                help="Runs that --benchmark measures, after one that warms up.",
            ),
            click.Option(
                ["--output-file"],
                type=click.Path(dir_okay=False, path_type=Path),
                help="Write the result here, too, as JSON.",
            ),
            click.Option(
                ["--trust-remote-code"],
                is_flag=True,
                help="Execute Python code that lies beside the weights.",
            ),
            *output_options(),
        ],
    )


def _sampling_options() -> list[click.Parameter]:
    """Return the options that say how tokens are chosen."""
    return [
        click.Option(
            ["--max-new-tokens"],
            type=click.IntRange(1),
            default=32,
            show_default=True,
            help="Generate so many tokens at most.",
        ),
        click.Option(
            ["--temperature"], type=click.FloatRange(0), help="Sample; 0 is greedy.  [greedy]"
        ),
        click.Option(
            ["--top-p"],
            type=click.FloatRange(0, 1, min_open=True),
            help="Sample from the likeliest tokens of this much probability.",
        ),
        click.Option(
            ["--top-k"], type=click.IntRange(1), help="Sample from so many likeliest tokens."
        ),
        click.Option(["--seed"], type=click.IntRange(0), help="Sample with this seed.  [0]"),
    ]


def _generate(
    model: Path, output_file: Path | None, as_json: bool, quiet: bool, verbose: bool, **given: Any
) -> None:
    from ckptx.cli.progress import Bar
    from ckptx.protocol.progress import Silent
    from ckptx.verification.frameworks.generate import generate

    shown = sys.stderr.isatty() and not (quiet or as_json or verbose)
    result = generate(model, _job(given), output_file, Bar() if shown else Silent())
    show_result(result, as_json, quiet)


def _job(given: dict[str, Any]) -> dict[str, Any]:
    """Return the job of `ckptx.verification.frameworks.generation`, as JSON has it."""
    chosen = [given[name] for name in ("temperature", "top_p", "top_k", "seed")]
    prompts = list(given["prompts"])
    if not prompts and not given["prompt_ids"]:
        prompts = [_ABOUT_IMAGE if given["image"] else _PROMPT]
    if given["image"] and given["prompt_ids"]:
        raise click.UsageError("--image goes with --prompt, not with --prompt-ids")
    return {
        **given,
        "prompts": prompts,
        "prompt_ids": list(given["prompt_ids"]),
        "sample": given["temperature"] != 0 and any(value is not None for value in chosen),
        "seed": given["seed"] or 0,
        "tokenizer": str(given["tokenizer"].resolve()) if given["tokenizer"] else None,
        "image": str(given["image"].resolve()) if given["image"] else None,
        "samples": given["samples"] if given["benchmark"] else 0,
    }


_LOGITS = ("logits_atol", "tokens", "seed", "prompt")


def logits_options() -> list[click.Parameter]:
    """Return the options of ``verify`` that run both models."""
    return [
        click.Option(
            ["--logits"],
            is_flag=True,
            help="Run both models, each in its own framework, and compare their logits instead.",
        ),
        click.Option(
            ["--logits-atol"],
            type=click.FloatRange(0),
            default=1e-4,
            show_default=True,
            help="Let float32 logits differ by so much.",
        ),
        click.Option(
            ["--tokens"],
            type=click.IntRange(1),
            default=16,
            show_default=True,
            help="With --logits: tokens of each of two random sequences.",
        ),
        click.Option(
            ["--seed"],
            type=click.IntRange(0),
            default=0,
            show_default=True,
            help="With --logits: seed of the random tokens.",
        ),
        click.Option(["--prompt"], help="With --logits: a text instead of random tokens."),
    ]


def check_inputs(logits: bool) -> None:
    """Refuse options of ``--logits`` where nothing is run, and the reverse.

    Raises:
        click.UsageError: one is given.
    """
    ctx = click.get_current_context()
    given = {
        name for name in ctx.params if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE
    }
    if "logits" in given and not logits:
        raise click.UsageError("--logits compares two checkpoints; give both")
    others = ("rtol", "atol", "ignore_dtype", "diagnosis")
    wrong = sorted(given & set(others if logits else _LOGITS))
    if wrong:
        options = {param.name: param.opts[0] for param in ctx.command.params}
        word = "does not go with" if logits else "needs"
        raise click.UsageError(f"{options[wrong[0]]} {word} --logits")


def compared_logits(a: Source, b: Source, given: dict[str, Any]) -> Any:
    """Return the comparison of what two models compute."""
    from ckptx.cli.progress import Bar
    from ckptx.protocol.progress import Silent
    from ckptx.verification.frameworks.logits import Inputs, compare_logits

    inputs = Inputs(given["tokens"], given["seed"], given["prompt"])
    still = given["quiet"] or given["as_json"] or given["verbose"]
    bar = Bar() if sys.stderr.isatty() and not still else Silent()
    return compare_logits(a, b, inputs, given["logits_atol"], bar)
