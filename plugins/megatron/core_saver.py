"""Save a Megatron Core checkpoint, ``torch_dist`` or per rank, at any parallel layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click

from ckptx.errors import SchemaError
from ckptx.model.pipeline_parallel import describe, stage_ranks
from ckptx.model.spec import ModelSpec
from ckptx.plugins.megatron import llava, per_rank, torch_dist
from ckptx.plugins.megatron.directory import SIDECARS
from ckptx.plugins.megatron.options import (
    CAPABILITIES,
    iteration_option,
    parallel_options,
    tokenizer_model_option,
    transformer_impl_option,
    vocabulary_multiple_option,
    vocabulary_options,
)
from ckptx.plugins.megatron.target_parallelism import (
    TargetParallelism,
    check_tensor_parallel,
    choose_parallelism,
    parallel_sizes,
    repad,
)
from ckptx.protocol.contracts import SavePlan, Saver
from ckptx.protocol.hookspecs import hookimpl
from ckptx.protocol.messages import Message
from ckptx.protocol.model import Model, check_messages, collect
from ckptx.registry.families import family_named
from ckptx.schemas.conventions.mcore import Style
from ckptx.schemas.megatron_settings.args import launch_flags, unsupported_by_megatron
from ckptx.schemas.megatron_settings.args import notes as remarks
from ckptx.storage.file_plan import literal_files


class CoreSaver:
    """Writes what Megatron Core loads with ``--use-checkpoint-args``."""

    name = "core"
    capabilities = CAPABILITIES

    def options(self) -> list[click.Option]:
        """Return the options for format, parallel layout and vocabulary."""
        return [
            click.Option(
                ["--ckpt-format"],
                type=click.Choice(["torch_dist", "torch"]),
                default="torch_dist",
                show_default=True,
                help="Distributed and loadable at any layout, or one file per rank.",
            ),
            *parallel_options(),
            *vocabulary_options(),
            vocabulary_multiple_option(),
            tokenizer_model_option(),
            transformer_impl_option("saver"),
            click.Option(
                ["--moe-grouped-gemm/--no-moe-grouped-gemm"],
                default=None,
                help="Per rank: all local experts in one module, or one each.  "
                "[default: the source's, else one each]",
            ),
            iteration_option(),
            click.Option(
                ["--no-iteration-directory", "iteration_directory"],
                is_flag=True,
                flag_value=False,
                default=True,
                help="Write the files to DST itself, without tracker: verl's "
                "dist_checkpointing_path.",
            ),
        ]

    def plan(self, messages: Iterator[Message], options: Mapping[str, Any]) -> SavePlan:
        """Return the plan of one iteration directory below the target root."""
        model = collect(messages)
        spec = model.spec
        style = _style(model, options)
        ckpt_format = options.get("ckpt_format") or "torch_dist"
        # torch_dist has one spelling, but a family may refuse the local spec altogether.
        layout = family_named(model.family).layout(style.convention)
        megatron = family_named(spec.family).megatron
        tp, pipeline = parallel_sizes(model, options)
        seeing = model.family == llava.FAMILY
        unused, remarked = llava.prepare(model, tp, pipeline) if seeing else ((), ())
        check_messages(model, layout)
        _widen_biases(model)
        notes = [
            *check_tensor_parallel(spec, tp),
            *_check_expressible(spec, style.local),
            *remarked,
        ]
        chosen = choose_parallelism(model, options)
        dropped = (*unused, *repad(model, chosen))
        chunks = chosen.chunks(spec)
        stored = stage_ranks if ckpt_format == "torch_dist" else per_rank.stored_ranks
        stage = stored(tp, chosen.ep, chosen.etp)
        args = chosen.args(
            *(model, options, stage),
            transformer_impl=options.get("saver_transformer_impl") or "transformer_engine",
            ckpt_format=ckpt_format,
        )
        args |= _grouping(spec, style, options)
        if seeing:
            args = llava.args_of_parts(model.parts, args, model.begin.training.get("args"))
        target = torch_dist.Target(layout, layout.extra_states, stage, chunks, args, chosen.number)
        files = (
            torch_dist.plan(model, target)
            if ckpt_format == "torch_dist"
            else per_rank.plan(model, target, pipeline.pp)
        )
        rooted = options.get("iteration_directory", True)
        return SavePlan(
            [*files, *literal_files(model.begin.sidecars, SIDECARS)],
            directory=chosen.directory if rooted else "",
            pointers=chosen.pointers if rooted else {},
            dropped=dropped,
            notes=tuple(notes),
            stages=llava.describe(chunks) if seeing else describe(chunks),
            load_hint=" ".join(
                [
                    llava.SCRIPT if seeing else megatron.script,
                    "--load {target} --use-checkpoint-args",
                    f"--ckpt-format {ckpt_format} --tensor-model-parallel-size {tp}",
                    *pipeline.flags(),
                    *_expert_flags(spec, chosen),
                    *launch_flags(spec),
                    *megatron.launch_flags(spec, style.local),
                    *(llava.launch_flags(args) if seeing else ()),
                ]
            )
            if rooted
            else 'megatron.core.dist_checkpointing.load(sharded_state_dict, "{target}")',
            details={"ckpt_format": ckpt_format, **chosen.details()},
        )


def _widen_biases(model: Model) -> None:
    """Make the biases that choose experts float32, as Megatron's router holds them."""
    key = "router expert bias"
    for name, tensors in model.messages.items():
        if key in tensors:
            model.messages[name] = {**tensors, key: tensors[key].cast("float32")}


def _style(model: Model, options: Mapping[str, Any]) -> Style:
    """Return the spelling to write; the source's own grouping of experts unless it is chosen."""
    local = options.get("saver_transformer_impl") == "local"
    if (options.get("ckpt_format") or "torch_dist") == "torch_dist":
        return Style(local, distributed=True)
    args = model.begin.training.get("args") or {}
    grouped = options.get("moe_grouped_gemm")
    if grouped is None:
        grouped = bool(args.get("moe_grouped_gemm"))
    return Style(local, bool(grouped))


def _grouping(spec: ModelSpec, style: Style, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of ``args`` for grouped experts, where there is a choice."""
    chosen = options.get("moe_grouped_gemm") if style.distributed else style.grouped
    return {"moe_grouped_gemm": chosen} if spec.num_experts and chosen is not None else {}


def _expert_flags(spec: ModelSpec, chosen: TargetParallelism) -> list[str]:
    """Return the options that tell Megatron the sizes; mixtures train over TP as sequences only."""
    if not spec.num_experts:
        return []
    return [
        f"--expert-model-parallel-size {chosen.ep}",
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
    return remarks(spec)


@hookimpl
def register_savers(register: Callable[[Saver], None]) -> None:
    """Register the saver."""
    register(CoreSaver())
