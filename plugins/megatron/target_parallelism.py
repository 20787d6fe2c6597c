"""What savers of Megatron's checkpoints choose: parallel sizes, padding, the iteration.

What the options do not say stays as the source has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ckptx.errors import PlanError
from ckptx.model.pipeline_parallel import ARGS, Chunk, Pipeline, divisors
from ckptx.model.sharding import Rank
from ckptx.model.spec import ModelSpec
from ckptx.plugins.megatron.directory import Iteration, iteration_name, parse_iteration
from ckptx.plugins.megatron.options import true_vocab_size
from ckptx.plugins.run_directory import TRACKER
from ckptx.protocol.context import Options
from ckptx.protocol.messages import Dropped
from ckptx.protocol.model import Model, resize_vocabulary
from ckptx.schemas.megatron_settings.args import args_from_spec

_PIPELINE = {**ARGS, "vpp": "target_virtual_pipeline_parallel_size"}


@dataclass(frozen=True, slots=True)
class TargetParallelism:
    """What a checkpoint of Megatron is besides its model: sizes, rows of the vocabulary, when."""

    tp: int
    pipeline: Pipeline
    ep: int
    etp: int
    true_rows: int | None
    """Without padding; None where nobody knows."""
    multiple: int
    padded: int
    iteration: Iteration

    @property
    def number(self) -> int:
        """The iteration as Megatron counts it: a release is 0."""
        return 0 if self.iteration == "release" else int(self.iteration)

    @property
    def directory(self) -> str:
        """The directory of the iteration, below the checkpoint's."""
        return iteration_name(self.iteration)

    @property
    def pointers(self) -> dict[str, bytes]:
        """The file that says which iteration is the latest."""
        return {TRACKER: str(self.iteration).encode()}

    def chunks(self, spec: ModelSpec) -> tuple[Chunk, ...]:
        """Return which stage holds which layers."""
        return self.pipeline.chunks(spec.num_layers, spec.mtp_num_layers)

    def args(
        self,
        model: Model,
        options: Options,
        stage: Sequence[Rank],
        *,
        transformer_impl: str,
        ckpt_format: str,
    ) -> dict[str, Any]:
        """Return the content of ``args``; ``stage`` are the ranks of one pipeline stage.

        Raises:
            SchemaError: Megatron cannot hold the model.
        """
        args = args_from_spec(
            model.spec,
            tp=self.tp,
            pipeline=self.pipeline,
            padded_vocab_size=self.padded,
            true_vocab_size=self.true_rows,
            make_vocab_size_divisible_by=self.multiple,
            iteration=self.number,
            transformer_impl=transformer_impl,
            ckpt_format=ckpt_format,
            source_args=model.begin.training.get("args"),
        )
        args["world_size"] = len(stage) * self.pipeline.pp
        args["data_parallel_size"] = len(stage) // self.tp
        if options.get("tokenizer_model"):
            args["tokenizer_model"] = options["tokenizer_model"]
        if model.spec.num_experts:
            args["expert_model_parallel_size"] = self.ep
            args["expert_tensor_parallel_size"] = self.etp
        return args

    def details(self) -> dict[str, Any]:
        """Return the choices for the manifest."""
        return {
            "tensor_parallel_size": self.tp,
            "pipeline_parallel_size": self.pipeline.pp,
            "virtual_pipeline_parallel_size": self.pipeline.vpp,
            "expert_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.etp,
            "padded_vocab_size": self.padded,
            "true_vocab_size": self.true_rows,
            "iteration": self.iteration,
        }


def choose_parallelism(model: Model, options: Options) -> TargetParallelism:
    """Return the choices for a model, whose messages have been checked.

    Raises:
        PlanError: sizes do not fit one another or the model.
    """
    tp, pipeline = parallel_sizes(model, options)
    ep, etp = expert_sizes(model, options, tp)
    true_rows = true_vocab_size(options, model.spec.vocab_size)
    args = model.begin.training.get("args") or {}
    asked = options.get("make_vocab_size_divisible_by")
    multiple = int(asked or args.get("make_vocab_size_divisible_by") or 128)
    padded = _padded_rows(model, true_rows, multiple, tp)
    return TargetParallelism(
        *(tp, pipeline, ep, etp, true_rows, multiple, padded), _chosen_iteration(model, options)
    )


def parallel_sizes(model: Model, options: Options) -> tuple[int, Pipeline]:
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


def expert_sizes(model: Model, options: Options, tp: int) -> tuple[int, int]:
    """Return the expert- and expert-tensor-parallel sizes: asked for, the source's, or the least.

    Raises:
        PlanError: they do not divide the experts.
    """
    spec, before = model.spec, model.begin.parallel
    ep = options.get("target_expert_parallel_size") or before.get("ep") or 1
    if (etp := options.get("target_expert_tensor_parallel_size")) is None:
        # Megatron's default follows TP, so a source's own choice holds only while TP does.
        etp = (before.get("etp") if tp == before.get("tp") else None) or tp
    if not spec.num_experts:
        if ep > 1 or options.get("target_expert_tensor_parallel_size"):
            raise PlanError("expert-parallel sizes were given, but the model has no experts")
        return 1, tp
    if spec.num_experts % ep:
        raise PlanError(
            f"expert-parallel size {ep} does not divide {spec.num_experts} experts: "
            f"{divisors(spec.num_experts)} do"
        )
    if (spec.moe_ffn_hidden_size or 0) % etp:
        raise PlanError(
            f"expert-tensor-parallel size {etp} does not divide moe_ffn_hidden_size "
            f"{spec.moe_ffn_hidden_size}"
        )
    return ep, etp


def check_tensor_parallel(spec: ModelSpec, tp: int) -> list[str]:
    """Refuse a tensor-parallel size that does not divide the model; return remarks."""
    dense = not all(spec.is_moe(layer) for layer in range(spec.num_layers))
    shared = spec.moe_shared_expert_intermediate_size or 0
    for name, size in (
        ("num_attention_heads", spec.num_attention_heads),
        ("ffn_hidden_size", spec.ffn_hidden_size if dense else 0),
        ("moe_shared_expert_intermediate_size", shared),
    ):
        if size % tp:
            raise PlanError(
                f"tensor-parallel size {tp} does not divide {name} {size}: {divisors(size)} do"
            )
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


def repad(model: Model, chosen: TargetParallelism) -> tuple[Dropped, ...]:
    """Bring the vocabulary to the rows chosen; one that has them already stays as it is.

    Else old padding is cut first, so that new rows repeat the last real one and not the last
    random one.
    """
    if model.messages["embeddings"]["word embeddings"].shape[0] == chosen.padded:
        return resize_vocabulary(model, chosen.padded)
    return (*resize_vocabulary(model, chosen.true_rows), *resize_vocabulary(model, chosen.padded))


def _chosen_iteration(model: Model, options: Options) -> Iteration:
    """Return the iteration that was asked for, else the source's, else ``release``."""
    if (chosen := options.get("iteration")) is not None:
        return parse_iteration(str(chosen))
    iteration: Iteration = model.begin.training.get("iteration") or "release"
    return iteration
