"""Options of the Megatron plugins, in Megatron's own spelling and short."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click

from ckptx.conversion.options import option, switch
from ckptx.errors import FormatError, PlanError
from ckptx.protocol.context import Options
from ckptx.protocol.model import Model
from ckptx.protocol.sidecars import CONFIG


def vocabulary_options() -> list[click.Option]:
    """Return the options that give the true vocabulary; loader and saver declare them alike."""
    rows = "Rows of the vocabulary without padding.  [default: the config's, then args']"
    file = "A vocab.json; its length is the true vocabulary."
    return [
        option("--true-vocab-size", click.IntRange(1), rows),
        option("--vocab-file", click.Path(exists=True, dir_okay=False), file),
    ]


def true_vocab_size(options: Options, known: int | None) -> int | None:
    """Return the vocabulary that the options give, else the one that is ``known``.

    Raises:
        PlanError: the two options disagree, or rows that the model is known to use would be cut.
    """
    given = _given(options)
    if given is not None and known is not None and given < known:
        raise PlanError(
            f"a true vocabulary of {given} was given, but the model's own is {known}: "
            f"{known - given} rows of weights would be cut as padding"
        )
    return given or known


def _given(options: Options) -> int | None:
    given: int | None = options.get("true_vocab_size")
    if (path := options.get("vocab_file")) is None:
        return given
    try:
        length = len(json.loads(Path(path).read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise FormatError(f"{path}: not a vocabulary: {error}") from error
    if given is not None and given != length:
        raise PlanError(f"--true-vocab-size is {given}, {path} has {length} entries")
    return length


def accept_arg_option() -> click.Option:
    """Return ``--accept-arg``, with which loaders read args that they would refuse."""
    about = "Read the checkpoint as if its args did not have this entry; repeatable."
    return option("--accept-arg", str, about, multiple=True, metavar="NAME")


def accept_config_key_option() -> click.Option:
    """Return ``--accept-config-key``, with which savers write what they would refuse."""
    return click.Option(
        ["--accept-config-key"],
        multiple=True,
        metavar="KEY",
        help="Write the model as if its config did not have this key; repeatable.",
    )


def heed_config(model: Model, options: Options) -> list[str]:
    """Return remarks on a model's config, without whose unknown keys it goes on where accepted.

    Raises:
        PlanError: the config has no such key, or it is known.
    """
    unknown = model.spec.unknown_keys
    accepted = options.get("accept_config_key") or ()
    for key in accepted:
        if key not in unknown:
            raise PlanError(
                f"--accept-config-key {key}: the config has no such key that is unknown; it has "
                f"{', '.join(unknown) or 'none'}"
            )
    left = {key: value for key, value in unknown.items() if key not in accepted}
    spec = replace(model.spec, unknown_keys=left)
    model.begin = replace(model.begin, parts={**model.begin.parts, "language": spec})
    assumed = ", ".join(f"{key} {value}" for key, value in spec.assumed.items())
    return [
        *(
            f"{key} is {unknown[key]!r} in {CONFIG} and was ignored (--accept-config-key)"
            for key in accepted
        ),
        *[f"{CONFIG} does not say {assumed}: the defaults of its class"] * bool(assumed),
    ]


def transformer_impl_option(role: str, default: str = "transformer_engine") -> click.Option:
    """Return ``--loader-transformer-impl`` or its saver counterpart."""
    meaning = {
        "loader": "Accepted for Megatron's sake: either spelling of names is read.",
        "saver": "Names of norms: fused into the next layer, or modules of their own.",
    }
    kinds = click.Choice(["transformer_engine", "local"])
    return option(f"--{role}-transformer-impl", kinds, meaning[role], default)


def iteration_option() -> click.Option:
    """Return ``--iteration``, which savers declare alike."""
    about = "Number, or 'release'.  [default: the source's, 'release' if it has none]"
    return option("--iteration", str, about)


def tokenizer_model_option() -> click.Option:
    """Return ``--tokenizer-model``; loader and saver declare it alike."""
    return option("--tokenizer-model", str, "Recorded in args for Megatron.")


def vocabulary_multiple_option() -> click.Option:
    """Return ``--make-vocab-size-divisible-by``; loader and saver declare it alike."""
    about = "Pad the vocabulary to a multiple of this times TP.  [default: the source's, else 128]"
    return option("--make-vocab-size-divisible-by", click.IntRange(1), about)


def target_options(implementation: str = "transformer_engine") -> list[click.Option]:
    """Return what every saver asks: parallel layout, vocabulary, tokenizer, spelling of names."""
    return [
        *parallel_options(),
        *vocabulary_options(),
        vocabulary_multiple_option(),
        tokenizer_model_option(),
        transformer_impl_option("saver", implementation),
    ]


def parallel_options() -> list[click.Option]:
    """Return the options that choose the parallel layout of a target."""
    size = click.IntRange(1)
    keep = "  [default: the source's, else 1]"

    virtual = "Virtual stages per stage."
    etp = "Tensor-parallel ranks of every expert.  [default: the source's while TP stays, else TP]"
    layout = "Stages spelt out, as 'Et*3|t*4|t*4|t*3L'."
    embedding = "Count the embedding as a layer when layers are spread."
    loss = "Count the output layer as a layer when layers are spread."
    return [
        option("--target-tensor-parallel-size --tp", size, f"Tensor-parallel ranks.{keep}"),
        option("--target-pipeline-parallel-size --pp", size, f"Pipeline stages.{keep}"),
        option("--target-virtual-pipeline-parallel-size --vpp", size, f"{virtual}{keep}"),
        option("--target-expert-parallel-size --ep", size, f"Expert-parallel ranks.{keep}"),
        option("--target-expert-tensor-parallel-size --etp", size, etp),
        option("--decoder-first-pipeline-num-layers", size, "Layers of the first stage."),
        option("--decoder-last-pipeline-num-layers", size, "Layers of the last stage."),
        option("--pipeline-model-parallel-layout", str, layout),
        switch("--account-for-embedding-in-pipeline-split", embedding),
        switch("--account-for-loss-in-pipeline-split", loss),
    ]
