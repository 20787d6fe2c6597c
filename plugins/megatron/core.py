"""Megatron Core checkpoints, ``torch_dist`` or per rank, at any parallel layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import click

from ckptx.conversion.options import option, switch
from ckptx.errors import CkptxError, FormatError, SchemaError
from ckptx.hf_models.directory import base_sidecars, sidecars
from ckptx.model.canonical_names import check_shapes
from ckptx.model.family import unknown_keys_said
from ckptx.model.layout import Layout, Parts
from ckptx.model.pipeline_parallel import Pipeline, describe, stage_ranks
from ckptx.model.spec import ModelSpec
from ckptx.plugins.megatron import adapters, directory, llava, per_rank, rank_names, torch_dist
from ckptx.plugins.megatron.forms import LEGACY, Generation
from ckptx.plugins.megatron.options import (
    accept_arg_option,
    accept_config_key_option,
    heed_config,
    iteration_option,
    target_options,
    transformer_impl_option,
    true_vocab_size,
    vocabulary_options,
)
from ckptx.plugins.megatron.source import Source
from ckptx.plugins.megatron.target_parallelism import (
    TargetParallelism,
    check_tensor_parallel,
    choose_parallelism,
    parallel_sizes,
    repad,
)
from ckptx.plugins.megatron.writers import megatron_lm, table
from ckptx.plugins.megatron.writers.table import Writer
from ckptx.protocol.context import UNTOLD, Context, Options
from ckptx.protocol.contracts import SavePlan
from ckptx.protocol.from_names import begin_anyway, resolve_tie, tied_names
from ckptx.protocol.messages import Begin, Dropped, End, Messages
from ckptx.protocol.model import Model, check_messages, collect
from ckptx.protocol.sidecars import CONFIG, read_config
from ckptx.registry.families import (
    family_named,
    family_of,
    family_of_names,
    note_of,
    parts_from_config,
)
from ckptx.schemas.conventions.mcore import Style
from ckptx.schemas.megatron_settings import row_blocks, settings
from ckptx.schemas.megatron_settings.args import (
    NOTE,
    launch_flags,
    spec_from_args,
    unsupported_by_megatron,
)
from ckptx.schemas.megatron_settings.args import notes as notes_of_args
from ckptx.schemas.megatron_settings.experts import with_gate_of_files
from ckptx.schemas.megatron_settings.llava import is_llava, language_args
from ckptx.storage.file_plan import literal_files
from ckptx.storage.location import Location

_HEAD = re.compile(r"(^|\.)(v_head|(value|reward|rm|score)_head|score)\.")
"""The names of heads with one output, in forks."""


class CoreLoader:
    """Reads what Megatron Core writes, at any tensor and pipeline parallel size."""

    name = "core"
    names = "mcore"
    """How a model is named whose family is not known."""

    def options(self) -> list[click.Option]:
        """Return the options for the vocabulary and for args that stand in the way."""
        return [
            *vocabulary_options(),
            transformer_impl_option("loader"),
            accept_arg_option(),
            adapters.lora_alpha_option(),
            table.writer_option(),
        ]

    def detect(self, source: Location) -> bool:
        """Return whether there is a tracker file or an iteration directory, of no legacy model."""
        return directory.looks_like(source) and found_form(source) is not LEGACY

    def load(self, source: Location, options: Options, context: Context = UNTOLD) -> Messages:
        """Yield the model."""
        if context.fill_from_base:
            raise FormatError(
                "--fill-from-base fills tensors by their Hugging Face names, which a Megatron "
                "source has not; convert it to hf first, then fill"
            )
        place = directory.find(source)
        writer = table.writer_of(place.path, options)
        checkpoint = table.described(writer, self.read(place), options)
        beside = place.path / writer.sidecars
        files = {**(sidecars(beside) if beside.is_dir() else {}), **base_sidecars(context)}
        args = checkpoint.args
        begin = Begin(
            format=self.name,
            layout=self.names,
            files=checkpoint.files,
            sources=checkpoint.sources,
            root=str(place.path),
            sidecars=files,
            training={
                "iteration": place.iteration,
                "args": args,
                "consumed_train_samples": args.get("consumed_train_samples"),
                "consumed_valid_samples": args.get("consumed_valid_samples"),
            },
            parallel={
                "tp": args.get("tensor_model_parallel_size") or 1,
                "ep": args.get("expert_model_parallel_size") or 1,
                "etp": args.get("expert_tensor_parallel_size"),
                "ckpt_format": place.format,
            },
        )
        unfinished = directory.unfinished(source)
        model = self._model(begin, checkpoint, options, context, unfinished)
        yield from begin_anyway(begin, model, context)

    def _model(
        self,
        begin: Begin,
        checkpoint: Source,
        options: Options,
        context: Context,
        notes: tuple[str, ...],
    ) -> Messages:
        """Yield the model that args, or the config among the sidecars of ``begin``, describe."""
        files = dict(begin.sidecars)
        said = _parts_of_config(files, checkpoint)
        notes = (*notes, *unknown_keys_said(said or {}))
        dropped = list(checkpoint.dropped)
        accepted = tuple(options.get("accept_arg") or ())
        heeded = settings.without(checkpoint.args, accepted)
        parts: Parts = {"language": _spec(replace(checkpoint, args=heeded), said, options)}
        lora = adapters.adapters_of(checkpoint, options, context)
        _refuse_head(checkpoint)
        if seeing := is_llava(checkpoint.weights):
            known = said if said and "vision" in said else None
            if known is None:
                files.pop(CONFIG, None)  # the language model's own says nothing of the whole
            parts, dummies = llava.parts_of(checkpoint, known, parts["language"])
            _check_dummies(options, dummies, checkpoint)
            layout = family_named(llava.FAMILY).layout("mcore")
            stored = checkpoint.messages(layout, llava.stored_parts(parts, dummies))
            messages = list(llava.without_dummies(stored, parts["vision"], dummies, dropped))
        else:
            layout = self.layout(checkpoint, parts["language"])
            _drop_copy_of_embedding(begin, checkpoint, layout, parts["language"], dropped)
            if lora and not lora.is_merged:
                yield from lora.exported(begin, layout, parts, notes)
                return
            messages = [
                replace(message, tensors=row_blocks.in_halves(message.tensors, heeded))
                for message in (lora or checkpoint).messages(layout, parts)
            ]
        yield replace(
            begin,
            layout=layout.name,
            parts=parts,
            family=llava.FAMILY if seeing else "",
            accepted=accepted,
            sidecars=files,
            parallel={**begin.parallel, "pipeline": Pipeline.from_args(checkpoint.args)},
        )
        for message in messages:
            check_shapes(message.name, message.tensors, parts[message.part])
            yield message
        notes = (
            *notes,
            *(lora or checkpoint).notes,
            *settings.notes((lora or checkpoint).args, accepted),
            *row_blocks.notes(heeded),
            *self.notes(parts["language"]),
        )
        yield End(tuple(dropped), notes)

    def read(self, place: directory.IterationDirectory) -> Source:
        """Read the metadata of a checkpoint."""
        if place.format == "torch_dist":
            return torch_dist.read(place)
        return per_rank.read(place)

    def layout(self, checkpoint: Source, spec: ModelSpec) -> Layout:
        """Return how a model is named."""
        return family_named(spec.family).layout("mcore")

    def notes(self, spec: ModelSpec) -> list[str]:
        """Return remarks on a model that was found."""
        return family_named(spec.family).megatron.head_notes(spec)


def found_form(source: Location) -> Generation | None:
    """Return which kind of model a per-rank checkpoint holds, None where that cannot be told."""
    try:
        place = directory.find(source)
        return per_rank.first_rank(place)[0] if place.format == "torch" else None
    except CkptxError:
        return None  # the loader will say what is wrong


def _parts_of_config(files: Mapping[str, bytes], checkpoint: Source) -> Parts | None:
    """Return what a config among the files beside the weights says, None without a known one."""
    config = read_config(files, checkpoint.place / directory.SIDECARS)
    family = family_of(config) if config else None
    return parts_from_config(family, config) if config and family else None


def _refuse_head(checkpoint: Source) -> None:
    """Raise where the model has a head that is none of a language model."""
    for source in checkpoint.sources:
        name, shape = source.name.rpartition(":")[2], source.extent.shape
        if _HEAD.search(name) or (name.endswith("output_layer.weight") and shape[:1] == (1,)):
            raise FormatError(
                f"{checkpoint.place}: {name} {list(shape)} is the head of a value or reward "
                "model, for which Megatron's models have no place; those of verl are read from "
                "the directory that verl has saved (--from verl)"
            )


def _drop_copy_of_embedding(
    begin: Begin, checkpoint: Source, layout: Layout, spec: ModelSpec, dropped: list[Dropped]
) -> None:
    """Take an output layer that is the embedding out of ``torch_dist``, which never has one.

    Files of ranks hold a copy of the embedding, for the last stage, and so it is read.

    Raises:
        SchemaError: args say that the two are one, and they differ.
    """
    if not spec.tied or not layout.names_of("output layer", "weight"):
        return
    weights = dict(checkpoint.weights)
    embedding, output = tied_names(layout, weights)
    tied, copies, _ = resolve_tie(weights, embedding, output, checkpoint.files)
    if not tied:
        raise SchemaError(
            f"{checkpoint.place}: args say that embedding and output layer are one "
            f"(untie_embeddings_and_output_weights), and {output!r} differs from {embedding!r}; "
            "the args are not of these weights"
        )
    if begin.parallel["ckpt_format"] == "torch_dist" and copies:
        del checkpoint.weights[output]
        dropped += copies


def _check_dummies(options: Options, dummies: int, checkpoint: Source) -> None:
    said = options.get("vit_dummy_head_count")
    if said and said != dummies:
        raise SchemaError(
            f"{checkpoint.place}: --vit-dummy-head-count is {said}, the weights have {dummies}; "
            "leave the option out"
        )


def _spec(checkpoint: Source, said: Parts | None, options: Options) -> ModelSpec:
    """Return the language model's dimensions: args say what was trained, a config the rest."""
    named = said["language"] if said else None
    if not (args := language_args(checkpoint.args)):
        if named is None:
            raise SchemaError(
                f"{checkpoint.place}: holds no args that describe the model; give --hf-base with a "
                "config of a known architecture"
            )
        spec = named
    else:
        if named is None and (recognised := family_of_names(checkpoint.names)):
            args = {**args, NOTE: {**note_of(recognised), **(args.get(NOTE) or {})}}
        args = with_gate_of_files(args, checkpoint.names)
        spec = spec_from_args(args, named.family if named else None)
        if named is not None:
            # What args cannot say comes from the config; where both speak, args were trained with.
            spec = replace(
                spec,
                architecture=named.architecture,
                vocab_size=named.vocab_size,
                rotary_scaling=spec.rotary_scaling or named.rotary_scaling,
                extra={**named.extra, **spec.extra},
            )
            if problems := unsupported_by_megatron(spec):
                raise SchemaError(
                    f"{checkpoint.place}: the config at hand is not of this model: "
                    f"{'; '.join(problems)}"
                )
    spec = family_named(spec.family).megatron.from_weights(spec, checkpoint.weights)
    vocab_size = true_vocab_size(options, spec.vocab_size)
    return replace(spec, vocab_size=vocab_size, dtype=checkpoint.dtype)


class CoreSaver:
    """Writes what Megatron Core loads with ``--use-checkpoint-args``."""

    name = "core"

    def options(self) -> list[click.Option]:
        """Return the options for format, parallel layout and vocabulary."""
        form = "Distributed and loadable at any layout, or one file per rank."
        root = "Write the files to DST itself, without tracker: verl's dist_checkpointing_path."
        return [
            option("--ckpt-format", click.Choice(["torch_dist", "torch"]), form, "torch_dist"),
            table.target_writer_option(),
            *target_options(),
            click.Option(
                ["--moe-grouped-gemm/--no-moe-grouped-gemm"],
                default=None,
                help="Per rank: all local experts in one module, or one each.  "
                "[default: the source's, else one each]",
            ),
            iteration_option(),
            accept_config_key_option(),
            switch(
                "--no-iteration-directory iteration_directory", root, flag_value=False, default=True
            ),
        ]

    def plan(self, messages: Messages, options: Options, context: Context = UNTOLD) -> SavePlan:
        """Return the plan of one iteration directory below the target root."""
        model = collect(messages)
        remarks = heed_config(model, options)
        spec = model.spec
        style = _style(model, options)
        ckpt_format = options.get("ckpt_format") or "torch_dist"
        writer = table.target_writer(options, ckpt_format)
        # torch_dist has one spelling, but a family may refuse the local spec altogether.
        layout = family_named(model.family).layout(style.convention)
        tp, pipeline = parallel_sizes(model, options)
        seeing = model.family == llava.FAMILY
        unused, remarked = llava.prepare(model, tp, pipeline) if seeing else ((), ())
        check_messages(model, layout)
        _widen_biases(model)
        notes = [*check_tensor_parallel(spec, tp), *_check_expressible(spec, style.local)]
        chosen = choose_parallelism(model, options)
        if writer.pointers:  # they say a number
            chosen = replace(chosen, iteration=chosen.number)
        dropped = (*unused, *repad(model, chosen))
        chunks = chosen.chunks(spec)
        stored = stage_ranks if ckpt_format == "torch_dist" else rank_names.stored_ranks
        stage = stored(tp, chosen.ep, chosen.etp)
        args = chosen.args(
            *(model, options, stage),
            transformer_impl=options.get("saver_transformer_impl") or "transformer_engine",
            ckpt_format=ckpt_format,
        )
        args |= _grouping(spec, style, options)
        if seeing:
            args = llava.args_of_parts(model.parts, args, model.begin.training.get("args"))
        states = tuple(writer.states(layout.extra_states))
        target = torch_dist.Target(layout, states, stage, chunks, args, chosen.number)
        files = (
            torch_dist.plan(model, target)
            if ckpt_format == "torch_dist"
            else per_rank.plan(model, target, pipeline.pp)
        )
        rooted = options.get("iteration_directory", True)
        own = writer.files(args, family_named(model.family))
        pointers = {name: own[file] for name, file in writer.pointers.items()}
        return SavePlan(
            [*files, *literal_files(own), *literal_files(model.begin.sidecars, writer.sidecars)],
            directory=chosen.directory if rooted else "",
            pointers={**chosen.pointers, **pointers} if rooted else {},
            dropped=dropped,
            notes=(*remarks, *notes, *remarked),
            accepted=tuple(options.get("accept_config_key") or ()),
            stages=llava.describe(chunks) if seeing else describe(chunks),
            load_hint=_load_hint(model, args, chosen, writer, rooted),
            conflict=megatron_lm.conflict(
                context.target if rooted else None,
                *(chosen, megatron_lm.form_in_words(self.name, ckpt_format), args),
            ),
            step_flag=megatron_lm.step_flag(chosen),
            details={"ckpt_format": ckpt_format, **chosen.details()},
        )


def _load_hint(
    model: Model, args: Mapping[str, Any], chosen: TargetParallelism, writer: Writer, rooted: bool
) -> str:
    """Return what loads the target: the code of its writer, or a command of Megatron's."""
    if writer.load_hint:
        place = f"{{target}}/{chosen.directory}" if rooted else "{target}"
        return writer.load_hint.replace("{place}", place)
    if not rooted:
        return 'megatron.core.dist_checkpointing.load(sharded_state_dict, "{target}")'
    spec, seeing = model.spec, model.family == llava.FAMILY
    megatron = family_named(spec.family).megatron
    flags = [
        *_expert_flags(spec, chosen),
        *launch_flags(spec),
        *megatron.launch_flags(spec, args["transformer_impl"] == "local"),
        *(llava.launch_flags(args) if seeing else ()),
    ]
    script = llava.SCRIPT if seeing else megatron.script
    return megatron_lm.load_command(script, args, chosen, flags, model.begin.sidecars)


def _widen_biases(model: Model) -> None:
    """Make the biases that choose experts float32, as Megatron's router holds them."""
    key = "router expert bias"
    for name, tensors in model.messages.items():
        if key in tensors:
            model.messages[name] = {**tensors, key: tensors[key].cast("float32")}


def _style(model: Model, options: Options) -> Style:
    """Return the spelling to write; the source's own grouping of experts unless it is chosen."""
    local = options.get("saver_transformer_impl") == "local"
    if (options.get("ckpt_format") or "torch_dist") == "torch_dist":
        return Style(local, distributed=True)
    args = model.begin.training.get("args") or {}
    if (grouped := options.get("moe_grouped_gemm")) is None:
        grouped = bool(args.get("moe_grouped_gemm"))
    return Style(local, bool(grouped))


def _grouping(spec: ModelSpec, style: Style, options: Options) -> dict[str, Any]:
    """Return the entry of ``args`` for grouped experts, where there is a choice."""
    chosen = options.get("moe_grouped_gemm") if style.distributed else style.grouped
    return {"moe_grouped_gemm": chosen} if spec.num_experts and chosen is not None else {}


def _expert_flags(spec: ModelSpec, chosen: TargetParallelism) -> list[str]:
    """Return the further options of mixtures, which train over TP as sequences only."""
    if not spec.num_experts:
        return []
    return [
        f"--expert-tensor-parallel-size {chosen.etp}",
        *["--sequence-parallel"] * (chosen.tp > 1),
    ]


def _check_expressible(spec: ModelSpec, local: bool) -> list[str]:
    """Refuse what Megatron has no weights for; return what it must be told by hand."""
    problems = unsupported_by_megatron(spec)
    if spec.multi_latent_attention and local:
        problems.append("the local spec, asked for, has no multi-latent attention")
    if problems:
        raise SchemaError(f"Megatron Core cannot hold this model: {'; '.join(problems)}")
    return notes_of_args(spec)
