"""Checkpoints of legacy Megatron models, those from before Megatron Core."""

from __future__ import annotations

from dataclasses import replace

import click

from ckptx.conversion.options import option
from ckptx.errors import FormatError, PlanError, SchemaError
from ckptx.model.family import FUNCTION_SETTINGS, function_settings
from ckptx.model.layout import Layout
from ckptx.model.pipeline_parallel import Pipeline, describe
from ckptx.model.spec import ModelSpec
from ckptx.plugins.megatron import directory, per_rank, rank_names
from ckptx.plugins.megatron.core import CoreLoader, found_form
from ckptx.plugins.megatron.directory import SIDECARS
from ckptx.plugins.megatron.forms import LEGACY
from ckptx.plugins.megatron.options import (
    accept_config_key_option,
    heed_config,
    iteration_option,
    target_options,
)
from ckptx.plugins.megatron.source import Source
from ckptx.plugins.megatron.target_parallelism import (
    check_tensor_parallel,
    choose_parallelism,
    parallel_sizes,
    repad,
)
from ckptx.plugins.megatron.torch_dist import Target
from ckptx.plugins.megatron.writers import megatron_lm
from ckptx.protocol.context import UNTOLD, Context, Options
from ckptx.protocol.contracts import SavePlan
from ckptx.protocol.messages import Messages
from ckptx.protocol.model import check_messages, collect
from ckptx.registry.families import family_named
from ckptx.schemas.conventions import legacy
from ckptx.schemas.megatron_settings.args import launch_flags
from ckptx.storage.file_plan import literal_files
from ckptx.storage.location import Location


class LegacyLoader(CoreLoader):
    """Reads per-rank files of any ``checkpoint_version``, in old spellings and new."""

    name = names = "legacy"

    def options(self) -> list[click.Option]:
        """Return those of the core loader, and one that Megatron has and ckptx does not need."""
        kinds = click.Choice(["learned_absolute", "rope"])
        about = "Accepted for Megatron's sake: the checkpoint's args say it."
        return [*super().options(), option("--position-embedding-type", kinds, about)]

    def detect(self, source: Location) -> bool:
        """Return whether the files of ranks hold a legacy model."""
        return directory.looks_like(source) and found_form(source) is LEGACY

    def read(self, place: directory.IterationDirectory) -> Source:
        """Read the pickles of every rank.

        Raises:
            FormatError: the checkpoint is none of ranks, or its files do not belong together.
        """
        if place.format == "deepspeed":
            kind = rank_names.DEEPSPEED_FILES
            source = per_rank.read(place, LEGACY, legacy.completed, kind)
            note = "the module's weights were taken; fp32 masters of an optimizer are not read"
            return replace(source, notes=(*source.notes, note))
        if place.format != "torch":
            raise FormatError(
                f"{place.path}: legacy Megatron models lie in mp_rank_* directories; this is "
                f"{place.format}: use --loader core (--from core)"
            )
        return per_rank.read(place, LEGACY, legacy.completed)

    def layout(self, checkpoint: Source, spec: ModelSpec) -> Layout:
        """Return how a model is named and ordered in files of this version."""
        if spec.extra.get(FUNCTION_SETTINGS):
            raise SchemaError(
                f"{checkpoint.files[0]}: args say {function_settings(spec)}, which changes what "
                "the model computes and which no other model has"
            )
        layout = family_named(spec.family).layout("legacy")
        try:
            return legacy.ordered(layout, checkpoint.version, spec)
        except SchemaError as error:
            raise SchemaError(f"{checkpoint.files[0]}: {error}") from error

    def notes(self, spec: ModelSpec) -> list[str]:
        """Return what legacy models compute otherwise than the args say."""
        return [*legacy.notes(spec), *family_named(spec.family).megatron.head_notes(spec)]


class LegacySaver:
    """Writes what Megatron loads with ``--use-legacy-models``, in ``checkpoint_version`` 3."""

    name = "legacy"

    def options(self) -> list[click.Option]:
        """Return the options for parallel layout and vocabulary."""
        return [*target_options("local"), iteration_option(), accept_config_key_option()]

    def plan(self, messages: Messages, options: Options, context: Context = UNTOLD) -> SavePlan:
        """Return the plan of one iteration directory below the target root.

        Raises:
            SchemaError: a legacy model cannot be what the messages describe.
            PlanError: the parallel sizes do not fit the model, or legacy models.
        """
        model = collect(messages)
        remarks = heed_config(model, options)
        spec = model.spec
        family = family_named(spec.family)
        layout, megatron = family.layout("legacy"), family.megatron
        legacy.check(spec)
        check_messages(model, layout)
        _check_implementation(options)
        tp, pipeline = parallel_sizes(model, options)
        _check_parallel(spec, tp, pipeline)
        chosen = choose_parallelism(model, options)
        dropped = repad(model, chosen)
        chunks = chosen.chunks(spec)
        stage = rank_names.stored_ranks(tp, chosen.ep, chosen.etp)
        args = chosen.args(model, options, stage, transformer_impl="local", ckpt_format="torch")
        args |= legacy.to_args(spec)
        target = Target(layout, (), stage, chunks, args, chosen.number)
        return SavePlan(
            [
                *per_rank.plan(model, target, pipeline.pp, LEGACY),
                *literal_files(model.begin.sidecars, SIDECARS),
            ],
            directory=chosen.directory,
            pointers=chosen.pointers,
            dropped=dropped,
            notes=(
                *remarks,
                *legacy.notes(spec),
                *_group_notes(spec, tp),
                *megatron.model_notes(spec),
            ),
            accepted=tuple(options.get("accept_config_key") or ()),
            stages=describe(chunks),
            load_hint=megatron_lm.load_command(
                *(megatron.script, args, chosen),
                [
                    *legacy.launch_flags(spec),
                    *launch_flags(spec),
                    *megatron.launch_flags(spec, False),
                ],
                model.begin.sidecars,
            ),
            conflict=megatron_lm.conflict(
                *(context.target, chosen, megatron_lm.form_in_words(self.name, "torch"), args)
            ),
            step_flag=megatron_lm.step_flag(chosen),
            details={"checkpoint_version": legacy.VERSION, **chosen.details()},
        )


def _check_implementation(options: Options) -> None:
    if options.get("saver_transformer_impl") == "transformer_engine":
        raise PlanError(
            "--saver-transformer-impl transformer_engine: the layers of a legacy model are then "
            "Transformer Engine's own, whose names ckptx does not know; leave it at local"
        )


def _group_notes(spec: ModelSpec, tp: int) -> list[str]:
    """Return what keeps several query groups of one rank from running."""
    groups = spec.num_query_groups // tp
    if groups == 1 or spec.num_query_groups == spec.num_attention_heads:
        return []
    return [
        f"{groups} query groups per rank: ParallelAttention of legacy models (core 0.12 to 0.16) "
        "cannot view their queries and stops in the first forward pass; make .view there .reshape, "
        f"or use --tp {spec.num_query_groups}"
    ]


def _check_parallel(spec: ModelSpec, tp: int, pipeline: Pipeline) -> None:
    """Refuse sizes that legacy models cannot have, though Megatron Core has them."""
    check_tensor_parallel(spec, tp)
    if spec.num_query_groups % tp:
        raise PlanError(
            f"tensor-parallel size {tp} does not divide {spec.num_query_groups} query groups, as "
            "it must for legacy models"
        )
    if pipeline != Pipeline(pipeline.pp, pipeline.vpp):
        raise PlanError(
            f"{pipeline}: legacy models spread their layers evenly; give --pp (and --vpp) alone"
        )
