"""Save a Megatron Core checkpoint, ``torch_dist`` or per rank, at any parallel layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click

from ckptx.errors import PlanError, SchemaError
from ckptx.hookspecs import hookimpl
from ckptx.model_directory import family_named
from ckptx.parallel import Pipeline, describe, stage_ranks
from ckptx.plan import SavePlan, literal_files
from ckptx.plugin import Saver
from ckptx.plugins.megatron import distributed, llava, ranks
from ckptx.plugins.megatron.directory import (
    SIDECARS,
    TRACKER,
    Iteration,
    iteration_name,
    parse_iteration,
)
from ckptx.plugins.megatron.options import (
    CAPABILITIES,
    parallel_options,
    tokenizer_model_option,
    transformer_impl_option,
    true_vocab_size,
    vocabulary_multiple_option,
    vocabulary_options,
)
from ckptx.protocol import Dropped, Message
from ckptx.saving import Model, check_messages, collect, resize_vocabulary
from ckptx.schemas.args import args_from_spec, inexpressible, launch_flags
from ckptx.schemas.args import notes as remarks
from ckptx.schemas.core import ExtraState, Style, extra_states
from ckptx.schemas.llava import states as llava_states
from ckptx.spec import ModelSpec

_PIPELINE = {
    "vpp": "target_virtual_pipeline_parallel_size",
    "first": "decoder_first_pipeline_num_layers",
    "last": "decoder_last_pipeline_num_layers",
    "layout": "pipeline_model_parallel_layout",
    "embedding_in_split": "account_for_embedding_in_pipeline_split",
    "loss_in_split": "account_for_loss_in_pipeline_split",
}


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
            click.Option(
                ["--iteration"],
                help="Number, or 'release'.  [default: the source's, 'release' if it has none]",
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
        tp, pipeline = _parallel(model, options)
        seeing = model.family == llava.FAMILY
        unused, remarked = llava.prepare(model, tp, pipeline) if seeing else ((), ())
        check_messages(model, layout)
        _widen_biases(model)
        notes = [*_check_tp(spec, tp), *_check_expressible(spec, style.local), *remarked]
        ep, etp = _expert_parallel(model, options, tp)
        true_rows = true_vocab_size(options, spec.vocab_size)
        multiple = _multiple(model, options)
        padded = _padded_rows(model, true_rows, multiple, tp)
        dropped = (*unused, *_repad(model, true_rows, padded))
        iteration = _iteration(model, options)
        chunks = pipeline.chunks(spec.num_layers, spec.mtp_num_layers)
        args = args_from_spec(
            spec,
            tp=tp,
            pipeline=pipeline,
            padded_vocab_size=padded,
            true_vocab_size=true_rows,
            make_vocab_size_divisible_by=multiple,
            iteration=0 if iteration == "release" else int(iteration),
            transformer_impl=options.get("saver_transformer_impl") or "transformer_engine",
            ckpt_format=ckpt_format,
            source_args=model.begin.training.get("args"),
        )
        if options.get("tokenizer_model"):
            args["tokenizer_model"] = options["tokenizer_model"]
        number = 0 if iteration == "release" else int(iteration)
        args |= _expert_args(spec, ep, etp, style, options)
        stored = stage_ranks if ckpt_format == "torch_dist" else ranks.stored_ranks
        stage = stored(tp, ep, etp)
        args |= {"world_size": len(stage) * pipeline.pp, "data_parallel_size": len(stage) // tp}
        if seeing:
            args = llava.args_of_parts(model.parts, args, model.begin.training.get("args"))
        target = distributed.Target(
            layout, tuple(_states(style, seeing)), stage, chunks, args, number
        )
        files = (
            distributed.plan(model, target)
            if ckpt_format == "torch_dist"
            else ranks.plan(model, target, pipeline.pp)
        )
        name = iteration_name(iteration)
        return SavePlan(
            [*files, *literal_files(model.begin.sidecars, SIDECARS)],
            directory=name,
            pointers={TRACKER: str(iteration).encode()},
            dropped=dropped,
            notes=tuple(notes),
            stages=llava.describe(chunks) if seeing else describe(chunks),
            load_hint=" ".join(
                [
                    llava.SCRIPT if seeing else "pretrain_gpt.py",
                    "--load {target} --use-checkpoint-args",
                    f"--ckpt-format {ckpt_format} --tensor-model-parallel-size {tp}",
                    *pipeline.flags(),
                    *_expert_flags(spec, tp, ep, etp),
                    *launch_flags(spec),
                    *(llava.launch_flags(args) if seeing else ()),
                ]
            ),
            details={
                "ckpt_format": ckpt_format,
                "tensor_parallel_size": tp,
                "pipeline_parallel_size": pipeline.pp,
                "virtual_pipeline_parallel_size": pipeline.vpp,
                "expert_parallel_size": ep,
                "expert_tensor_parallel_size": etp,
                "padded_vocab_size": padded,
                "true_vocab_size": true_rows,
                "iteration": iteration,
            },
        )


def _states(style: Style, seeing: bool) -> Iterator[ExtraState]:
    """Return the modules that keep an extra state."""
    if seeing:
        return llava_states(style)
    # Megatron itself maps the modules of the local spec to those of torch_dist.
    return extra_states(Style(distributed=True) if style.distributed else style)


def _widen_biases(model: Model) -> None:
    """Make the biases that choose experts float32, as Megatron's router holds them."""
    key = "router expert bias"
    for name, tensors in model.messages.items():
        if key in tensors:
            model.messages[name] = {**tensors, key: tensors[key].cast("float32")}


def _parallel(model: Model, options: Mapping[str, Any]) -> tuple[int, Pipeline]:
    """Return the sizes asked for, else the source's, else 1."""
    before = model.begin.parallel.get("pipeline", Pipeline())
    tp = options.get("target_tensor_parallel_size") or model.begin.parallel.get("tp") or 1
    given: dict[str, Any] = {
        field: options[name] for field, name in _PIPELINE.items() if options.get(name)
    }
    pp = options.get("target_pipeline_parallel_size")
    if pp is None and not given:
        return tp, before
    return tp, Pipeline(pp or before.pp, **given)


def _expert_parallel(model: Model, options: Mapping[str, Any], tp: int) -> tuple[int, int]:
    """Return the expert- and expert-tensor-parallel sizes: asked for, the source's, or the least.

    Raises:
        PlanError: they do not divide the experts.
    """
    spec, before = model.spec, model.begin.parallel
    ep = options.get("target_expert_parallel_size") or before.get("ep") or 1
    etp = options.get("target_expert_tensor_parallel_size")
    if etp is None:
        # Megatron's default follows TP, so a source's own choice holds only while TP does.
        etp = (before.get("etp") if tp == before.get("tp") else None) or tp
    if not spec.num_experts:
        if ep > 1 or options.get("target_expert_tensor_parallel_size"):
            raise PlanError("expert-parallel sizes were given, but the model has no experts")
        return 1, tp
    if spec.num_experts % ep:
        raise PlanError(f"expert-parallel size {ep} does not divide {spec.num_experts} experts")
    if (spec.moe_ffn_hidden_size or 0) % etp:
        raise PlanError(
            f"expert-tensor-parallel size {etp} does not divide moe_ffn_hidden_size "
            f"{spec.moe_ffn_hidden_size}"
        )
    return ep, etp


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


def _expert_args(
    spec: ModelSpec, ep: int, etp: int, style: Style, options: Mapping[str, Any]
) -> dict[str, Any]:
    if not spec.num_experts:
        return {}
    said = {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": etp}
    chosen = options.get("moe_grouped_gemm") if style.distributed else style.grouped
    return said if chosen is None else {**said, "moe_grouped_gemm": chosen}


def _expert_flags(spec: ModelSpec, tp: int, ep: int, etp: int) -> list[str]:
    """Return the options that tell Megatron the sizes; mixtures train over TP as sequences only."""
    if not spec.num_experts:
        return []
    flags = [f"--expert-model-parallel-size {ep}", f"--expert-tensor-parallel-size {etp}"]
    return flags + ["--sequence-parallel"] * (tp > 1)


def _check_tp(spec: ModelSpec, tp: int) -> list[str]:
    """Refuse a tensor-parallel size that does not divide the model; return remarks."""
    dense = not all(spec.is_moe(layer) for layer in range(spec.num_layers))
    shared = spec.moe_shared_expert_intermediate_size or 0
    for name, size in (
        ("num_attention_heads", spec.num_attention_heads),
        ("ffn_hidden_size", spec.ffn_hidden_size if dense else 0),
        ("moe_shared_expert_intermediate_size", shared),
    ):
        if size % tp:
            raise PlanError(f"tensor-parallel size {tp} does not divide {name} {size}")
    if spec.multi_latent_attention:
        return []
    groups = spec.num_query_groups
    if groups % tp and tp % groups:
        raise PlanError(
            f"tensor-parallel size {tp} neither divides {groups} query groups nor is a multiple of "
            "them"
        )
    if spec.qkv_rows % tp:
        raise PlanError(
            f"tensor-parallel size {tp} does not divide the {spec.qkv_rows} rows of the fused "
            f"query, key and value of {groups} query groups"
        )
    if groups % tp:
        return [
            f"tensor-parallel size {tp} is more than {groups} query groups: Megatron Core 0.16 and "
            "later load this, older ones do not"
        ]
    return []


def _check_expressible(spec: ModelSpec, local: bool) -> list[str]:
    """Refuse what Megatron has no weights for; return what it must be told by hand."""
    problems = inexpressible(spec)
    if spec.multi_latent_attention and local:
        problems.append("the local spec, asked for, has no multi-latent attention")
    if problems:
        raise SchemaError(f"Megatron Core cannot hold this model: {'; '.join(problems)}")
    return remarks(spec)


def _multiple(model: Model, options: Mapping[str, Any]) -> int:
    args = model.begin.training.get("args") or {}
    chosen = options.get("make_vocab_size_divisible_by")
    return int(chosen or args.get("make_vocab_size_divisible_by") or 128)


def _padded_rows(model: Model, true_rows: int | None, multiple: int, tp: int) -> int:
    """Return the rows of the vocabulary with padding, by Megatron's rule."""
    found = model.messages["embeddings"]["word embeddings"].shape[0]
    if true_rows is None:
        if found % tp:
            raise PlanError(
                f"the true vocabulary is unknown and its {found} rows do not divide over "
                f"tensor-parallel size {tp}; give --true-vocab-size"
            )
        return found
    if found < true_rows:
        raise PlanError(
            f"the embedding has {found} rows, the true vocabulary is said to be {true_rows}"
        )
    unit = multiple * tp
    return -(-true_rows // unit) * unit


def _repad(model: Model, true_rows: int | None, padded: int) -> tuple[Dropped, ...]:
    """Bring the vocabulary to ``padded`` rows; one that has them already stays as it is.

    Else old padding is cut first, so that new rows repeat the last real one and not the last
    random one.
    """
    if model.messages["embeddings"]["word embeddings"].shape[0] == padded:
        return resize_vocabulary(model, padded)
    return (*resize_vocabulary(model, true_rows), *resize_vocabulary(model, padded))


def _iteration(model: Model, options: Mapping[str, Any]) -> Iteration:
    chosen = options.get("iteration")
    if chosen is not None:
        return parse_iteration(str(chosen))
    iteration: Iteration = model.begin.training.get("iteration") or "release"
    return iteration


@hookimpl
def register_savers(register: Callable[[Saver], None]) -> None:
    """Register the saver."""
    register(CoreSaver())
