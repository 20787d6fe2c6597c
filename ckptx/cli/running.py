"""``generate``, and ``verify --logits``: commands that run models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ckptx.cli.options import Checkpoint, output_options, show_result
from ckptx.conversion.options import FOLDER, Dtype, option, switch
from ckptx.registry.source import Source

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
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
    about_prompt = f"Text to continue. Repeatable.  [default: {_PROMPT!r}]"
    ids = 'Tokens to continue, as "1 2 3"; needs no tokenizer. Repeatable.'
    image = "Image before every prompt, for models that take images."
    samples = "Runs that --benchmark measures, after one that warms up."
    output = click.Path(dir_okay=False, path_type=Path)
    return click.Command(
        "generate",
        callback=_generate,
        help="Load a model with transformers and generate text; exit 1 if weights are missing or "
        "left over, logits are not finite, or nothing comes out.",
        short_help="Load a model with transformers and generate text.",
        params=[
            click.Argument(["model"], type=Checkpoint(file_okay=False)),
            option("--prompt prompts", str, about_prompt, multiple=True),
            option("--prompt-ids", Tokens(), ids, multiple=True, metavar="IDS"),
            *_sampling_options(),
            option("--dtype", Dtype(), "Compute in this dtype.  [as stored]"),
            option("--device", click.Choice(["auto", "cpu", "cuda"]), "Where to compute.", "auto"),
            option("--tokenizer", FOLDER, "Directory of the tokenizer.  [MODEL]"),
            option("--image", FILE, image),
            switch("--benchmark", "Measure tokens/s, too."),
            option("--samples", click.IntRange(1), samples, 3),
            option("--output-file", output, "Write the result here, too, as JSON."),
            switch("--trust-remote-code", "Execute Python code that lies beside the weights."),
            *output_options(),
        ],
    )


def _sampling_options() -> list[click.Parameter]:
    """Return the options that say how tokens are chosen."""
    share = click.FloatRange(0, 1, min_open=True)
    likeliest = "Sample from the likeliest tokens of this much probability."
    return [
        option("--max-new-tokens", click.IntRange(1), "Generate so many tokens at most.", 32),
        option("--temperature", click.FloatRange(0), "Sample; 0 is greedy.  [greedy]"),
        option("--top-p", share, likeliest),
        option("--top-k", click.IntRange(1), "Sample from so many likeliest tokens."),
        option("--seed", click.IntRange(0), "Sample with this seed.  [0]"),
    ]


def _generate(
    model: Path, output_file: Path | None, as_json: bool, quiet: bool, verbose: bool, **given: Any
) -> None:
    from ckptx.cli.progress import bar
    from ckptx.verification.frameworks.generate import generate

    result = generate(model, _job(given), output_file, bar(quiet or as_json or verbose))
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
    run = "Run both models, each in its own framework, and compare their logits instead."
    tokens = "With --logits: tokens of each of two random sequences."
    seed = "With --logits: seed of the random tokens."
    return [
        switch("--logits", run),
        option("--logits-atol", click.FloatRange(0), "Let float32 logits differ by so much.", 1e-4),
        option("--tokens", click.IntRange(1), tokens, 16),
        option("--seed", click.IntRange(0), seed, 0),
        option("--prompt", str, "With --logits: a text instead of random tokens."),
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
    if wrong := sorted(given & set(others if logits else _LOGITS)):
        options = {param.name: param.opts[0] for param in ctx.command.params}
        word = "does not go with" if logits else "needs"
        raise click.UsageError(f"{options[wrong[0]]} {word} --logits")


def compared_logits(a: Source, b: Source, given: dict[str, Any]) -> Any:
    """Return the comparison of what two models compute."""
    from ckptx.cli.progress import bar
    from ckptx.verification.frameworks.logits import Inputs, compare_logits

    inputs = Inputs(given["tokens"], given["seed"], given["prompt"])
    shown = bar(given["quiet"] or given["as_json"] or given["verbose"])
    return compare_logits(a, b, inputs, given["logits_atol"], shown)
