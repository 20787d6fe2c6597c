"""Megatron's ``args`` and `ModelSpec`, in both directions.

`FIELDS` are the names that mean the same. A checkpoint's ``args`` is a snapshot of Megatron's
command line; what the command line cannot say of a model goes into one more entry, `NOTE`, which
Megatron does not look at and which brings a converted model back as it was.

Megatron restores only part of it with ``--use-checkpoint-args``; `launch_flags` returns the rest.

Source: NVIDIA/Megatron-LM megatron/training/arguments.py (core_transformer_config_from_args),
megatron/training/checkpointing.py (load_args_from_checkpoint), gpt_builders.py @ core_v0.16.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckptx.containers.pickle_values import Record, TorchDtype
from ckptx.errors import CkptxError, FormatError, SchemaError
from ckptx.model.family import FUNCTION_SETTINGS, MEGATRON_SWITCHES, function_settings
from ckptx.model.pipeline_parallel import Pipeline
from ckptx.model.spec import ModelSpec
from ckptx.registry.families import family_named, family_noted, note_of, recognised_family
from ckptx.schemas.config.traits import Biases
from ckptx.schemas.config.windows import windows_extra
from ckptx.schemas.megatron_settings import (
    activations,
    experts,
    latent_attention,
    rope_scaling,
    settings,
    sliding_windows,
)
from ckptx.schemas.megatron_settings.row_blocks import SIZES
from ckptx.storage.location import Location
from ckptx.tensors.dtypes import dtype_name

_SAME_NAMES = """
    num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels
    max_position_embeddings normalization position_embedding_type rotary_base rotary_percent
    add_bias_linear add_qkv_bias qk_layernorm
"""
FIELDS = _SAME_NAMES.split()
"""Arguments that the spec has under the same names."""

ESSENTIAL = (*FIELDS[:4], "max_position_embeddings")
"""Arguments that no default can stand for."""

# Up to core 0.15 args say norm_epsilon and apply_layernorm_1p; from 0.16 the parser is generated
# from TransformerConfig and they carry its names. Both are written, either is read.
EPSILON = ("layernorm_epsilon", "norm_epsilon")
ZERO_CENTERED = ("layernorm_zero_centered_gamma", "apply_layernorm_1p")

DTYPE_FLAGS = {dtype_name(flag): flag for flag in ("bf16", "fp16")}

NOTE = "ckptx"
"""The entry of ``args`` with what Megatron has no argument for."""

_WRITTEN = """
    add_position_embedding apply_query_key_layer_scaling attention_dropout hidden_dropout
    hybrid_override_pattern hybrid_attention_ratio hybrid_mlp_ratio is_hybrid_model spec num_experts
    moe_layer_freq moe_ffn_hidden_size moe_router_topk moe_token_dispatcher_type
    moe_router_pre_softmax moe_grouped_gemm moe_shared_expert_intermediate_size
    moe_shared_expert_gate moe_router_score_function moe_router_enable_expert_bias
    moe_router_num_groups moe_router_group_topk moe_router_topk_scaling_factor moe_latent_size
    mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads heterogeneous_layers_config_path
    heterogeneous_layers_config_encoded_json multi_latent_attention mtp_num_layers bert_binary_head
    openai_gelu rotary_seq_len_interpolation_factor tokenizer_type tokenizer_model tiktoken_pattern
    vocab_file use_legacy_models sequence_parallel consumed_train_samples skipped_train_samples
    consumed_valid_samples data_parallel_random_init
"""
"""What args hold of a dense decoder where neither the model nor the source says otherwise."""
_NOT_MEGATRONS: Mapping[str, Any] = {
    **dict.fromkeys(("attention_dropout", "hidden_dropout"), 0.0),
    "is_hybrid_model": False,
    "heterogeneous_layers_config_path": None,
    "heterogeneous_layers_config_encoded_json": None,
    "tokenizer_type": "HuggingFaceTokenizer",
    **{f"consumed_{kind}_samples": 0 for kind in ("train", "valid")},
    "skipped_train_samples": 0,
}
"""Those that are not Megatron's own default."""

# There is no state to resume, whatever the source had: Megatron must not look for it.
WEIGHTS_ONLY: Mapping[str, Any] = {
    "no_save_optim": True,
    "no_save_rng": True,
    "use_distributed_optimizer": False,
}


def args_from_spec(
    spec: ModelSpec,
    *,
    tp: int,
    pipeline: Pipeline,
    padded_vocab_size: int,
    true_vocab_size: int | None,
    make_vocab_size_divisible_by: int,
    iteration: int,
    transformer_impl: str,
    ckpt_format: str,
    source_args: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the content of a checkpoint's ``args``.

    What ``source_args`` say stays, except for the model, the parallel sizes, the vocabulary, the
    dtype and the format, which are those of the checkpoint being written. ``iteration`` is 0 for
    ``release``.

    Raises:
        SchemaError: Megatron cannot hold the model; see `unsupported_by_megatron`.
    """
    if problems := unsupported_by_megatron(spec):
        raise SchemaError("; ".join(problems))
    source = dict(source_args or {})
    source.pop("disable_bias_linear", None)  # load_args_from_checkpoint lets it overrule
    return {
        **settings.defaults(_WRITTEN.split(), _NOT_MEGATRONS),
        "seq_length": spec.max_position_embeddings,
        **source,
        **dict.fromkeys(source.keys() & SIZES.keys()),  # what is written has halves, no blocks
        **_model(spec),
        **_parallel(tp, pipeline, spec.num_layers),
        **WEIGHTS_ONLY,
        "padded_vocab_size": padded_vocab_size,
        "vocab_size": true_vocab_size,
        "make_vocab_size_divisible_by": make_vocab_size_divisible_by,
        "params_dtype": TorchDtype(spec.dtype),
        **{flag: spec.dtype == dtype for dtype, flag in DTYPE_FLAGS.items()},
        "transformer_impl": transformer_impl,
        "ckpt_format": ckpt_format,
        "use_dist_ckpt": ckpt_format != "torch",
        "iteration": iteration,
        **family_named(spec.family).megatron.to_args(spec),
    }


def spec_from_args(args: Mapping[str, Any], family: str | None = None) -> ModelSpec:
    """Return the dimensions that a checkpoint's ``args`` say.

    ``family`` is what a config at hand says: Megatron does not know Llama from a Mistral without
    windows. A model that is none of the Hugging Face families is of family ``gpt``, which can be
    resharded.

    Raises:
        SchemaError: arguments are missing, describe a kind of model that is not supported yet, or
            contradict ``family``.
    """
    _check_complete(args)
    _check_types(args)
    try:
        spec, changed = _described(args)
    except CkptxError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise SchemaError(
            "a value of the checkpoint's args is not what Megatron has there "
            f"({type(error).__name__}: {error!s:.200}); copy the checkpoint again"
        ) from error
    if family is not None:
        found = family_named(family)
        _check_config_at_hand(spec, family)
    else:
        found = family_noted(args.get(NOTE) or {}) or recognised_family(spec)
        if changed and found.model_types:
            found = recognised_family(spec)  # with these settings it is not what it was noted as
    if changed and found.model_types:
        raise SchemaError(f"args say {function_settings(spec)}, which no {found.name} has")
    return found.megatron.from_args(found.config.of_family(spec), args)


def _described(args: Mapping[str, Any]) -> tuple[ModelSpec, bool]:
    """Return what args say of a model of any family, and whether a setting changes its function."""
    changed = settings.changing(args)
    values = _with_defaults(args)
    note = args.get(NOTE) or {}
    extra = {
        **note.get("extra", {}),
        **windows_extra(*sliding_windows.from_args(args)),
        **{name: args[name] for name in MEGATRON_SWITCHES if args.get(name)},
        **experts.megatron_only(args),
    }
    if any(args.get(name) for name in ZERO_CENTERED):
        extra[ZERO_CENTERED[0]] = True
    if changed:
        extra[FUNCTION_SETTINGS] = changed
    spec = ModelSpec(
        family="",
        architecture="",
        **(values | experts.from_args(args) | latent_attention.from_args(args)),
        vocab_size=args.get("vocab_size"),
        norm_epsilon=float(_first(args, EPSILON)),
        activation=activations.from_args(args),
        rotary_scaling=note.get("rotary_scaling") or _scaling_from_args(args),
        tied=not args.get("untie_embeddings_and_output_weights"),
        dtype=_dtype_from_args(args),
        extra=extra,
    )
    return spec, bool(changed)


def unsupported_by_megatron(spec: ModelSpec) -> list[str]:
    """Return what Megatron Core has no parameter for: reasons to refuse the conversion."""
    return [
        *_biases_inexpressible(spec),
        *family_named(spec.family).config.unsupported_by_megatron(spec),
        *latent_attention.unsupported_by_megatron(spec),
        *experts.unsupported_by_megatron(spec),
    ]


def _biases_inexpressible(spec: ModelSpec) -> Iterator[str]:
    said = Biases.of(spec)
    if said in (Biases(), Biases(qkv=True), Biases(True, True, True)):
        return
    parts = {"attention_bias": said.out, "mlp_bias": said.mlp}
    keys = " and ".join(f"{key}=true" for key, value in parts.items() if value)
    yield (
        f"{spec.architecture} with {keys} only: Megatron has biases on all linear layers "
        "(--add-bias-linear) or on query, key and value (--add-qkv-bias), and no other choice"
    )


def notes(spec: ModelSpec) -> list[str]:
    """Return what Megatron must be told by hand although all weights are there, one line each."""
    return [
        *sliding_windows.notes(spec),
        *([] if spec.multi_latent_attention else rope_scaling.notes(spec)),
        *latent_attention.notes(spec),
        *activations.notes(spec),
        *_embedding_notes(spec),
        *family_named(spec.family).megatron.notes(spec),
    ]


def _embedding_notes(spec: ModelSpec) -> Iterator[str]:
    if spec.extra.get("scale_embeddings"):
        yield (
            f"{spec.architecture} multiplies embeddings by the square root of hidden_size, "
            f"{spec.hidden_size**0.5:g}: Megatron (to core 0.16) has no setting for it; multiply "
            "the output of GPTModel.embedding in a forward hook, or logits are wrong"
        )


def launch_flags(spec: ModelSpec) -> list[str]:
    """Return the options that a launch needs besides ``--use-checkpoint-args``.

    Examples:
        >>> qwen = family_named("qwen3")
        >>> launch_flags(qwen.from_config({"torch_dtype": "bfloat16"}))
        ['--norm-epsilon', '1e-06', '--qk-layernorm', '--bf16']
    """
    flags = ["--norm-epsilon", str(spec.norm_epsilon)]
    if spec.qk_layernorm:
        flags += ["--qk-layernorm"]
    flags += activations.launch_flags(spec)
    if spec.extra.get(ZERO_CENTERED[0]):
        flags += ["--apply-layernorm-1p"]
    flags += rope_scaling.launch_flags(spec)
    flags += experts.launch_flags(spec)
    flags += latent_attention.launch_flags(spec)
    flags += sliding_windows.launch_flags(spec)
    if spec.dtype in DTYPE_FLAGS:
        flags += [f"--{DTYPE_FLAGS[spec.dtype]}"]
    return flags


def _model(spec: ModelSpec) -> dict[str, Any]:
    """Return the entries that describe the model."""
    zero_centered = bool(spec.extra.get(ZERO_CENTERED[0]))
    return {
        **{name: _plain(getattr(spec, name)) for name in FIELDS},
        "group_query_attention": spec.num_query_groups != spec.num_attention_heads,
        "untie_embeddings_and_output_weights": not spec.tied,
        "use_rotary_position_embeddings": spec.position_embedding_type == "rope",
        "rotary_interleaved": bool(spec.extra.get("rotary_interleaved")),
        **{name: spec.norm_epsilon for name in EPSILON},
        **{name: zero_centered for name in ZERO_CENTERED},
        **activations.to_args(spec),
        **rope_scaling.to_args(spec),
        **experts.to_args(spec),
        **latent_attention.to_args(spec),
        **sliding_windows.to_args(spec),
        NOTE: _note(spec),
    }


def _parallel(tp: int, pipeline: Pipeline, num_layers: int) -> dict[str, Any]:
    """Return the entries for the parallel sizes.

    Megatron computes the virtual size anew from one of two arguments, of which only the first is
    restored from a checkpoint and only the second can say an uneven split; a layout says it itself.
    """
    per_stage = None
    even = pipeline == Pipeline(pipeline.pp, pipeline.vpp)
    if pipeline.vpp and even:
        per_stage = num_layers // pipeline.pp // pipeline.vpp
    uneven = None if even or pipeline.layout else pipeline.vpp
    return {
        **pipeline.to_args(),
        "tensor_model_parallel_size": tp,
        "num_layers_per_virtual_pipeline_stage": per_stage,
        "num_virtual_stages_per_pipeline_rank": uneven,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": tp,
        "context_parallel_size": 1,
        "data_parallel_size": 1,
        "world_size": tp * pipeline.pp,
    }


def _note(spec: ModelSpec) -> dict[str, Any]:
    """Return plain values for what ``args`` cannot say."""
    said_otherwise = {"sliding_window", "layer_types", FUNCTION_SETTINGS, *MEGATRON_SWITCHES}
    extra = {key: value for key, value in spec.extra.items() if key not in said_otherwise}
    _check_plain(spec.extra)
    note: dict[str, Any] = note_of(family_named(spec.family))
    exact = latent_attention.is_exact if spec.multi_latent_attention else rope_scaling.is_exact
    if spec.rotary_scaling is not None and not exact(spec):
        note["rotary_scaling"] = dict(spec.rotary_scaling)
    return note | ({"extra": extra} if extra else {})


def _plain(value: Any) -> Any:
    """Return whole floats as ints: ``--rotary-base`` is an int on Megatron's command line."""
    return int(value) if isinstance(value, float) and value.is_integer() and value > 1 else value


def _first(args: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """Return the value of the first of several names that says something."""
    return next((args[name] for name in names if args.get(name) is not None), None)


def _check_complete(args: Mapping[str, Any]) -> None:
    missing = [name for name in ESSENTIAL if args.get(name) is None]
    if _first(args, EPSILON) is None:
        missing.append(f"{EPSILON[1]} (or {EPSILON[0]})")
    if args.get("group_query_attention") and args.get("num_query_groups") is None:
        missing.append("num_query_groups")
    if missing:
        raise SchemaError(
            f"the checkpoint's args do not say {', '.join(missing)}; give the model's config with "
            "--hf-base"
        )


_TYPES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool, int), "true or false"),
    "str": ((str,), "a word"),
}
"""The types that an argument may have, by that of its attribute in a spec."""


def _check_types(args: Mapping[str, Any]) -> None:
    """Raise for an argument of another type than its attribute's, and for a negative number."""
    named = {**{name: name for name in (*FIELDS, *experts.FIELDS)}, **dict(latent_attention.ARGS)}
    kinds = {name: ModelSpec.__annotations__[own].split()[0] for name, own in named.items()}
    for name, kind in {**kinds, **dict.fromkeys(EPSILON, "float")}.items():
        value = args.get(name)
        types, expected = _TYPES[kind]
        least = 1 if name in ESSENTIAL else 0
        if value is None or (type(value) in types and (kind == "str" or value >= least)):
            continue
        raise SchemaError(
            f"{name} is {value!r:.60} in the checkpoint's args, expected {expected}"
            f"{f' of at least {least}' * (kind in ('int', 'float'))}; copy the checkpoint again"
        )


def _with_defaults(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `FIELDS` as Megatron would complete them."""
    heads = args["num_attention_heads"]
    old_rope = args.get("use_rotary_position_embeddings")
    defaults = {
        "kv_channels": args["hidden_size"] // heads,
        "normalization": "LayerNorm",
        "position_embedding_type": "rope" if old_rope else "learned_absolute",
        "rotary_base": 10000.0,
        "rotary_percent": 1.0,
        "add_bias_linear": True,
        "add_qkv_bias": False,
        "qk_layernorm": False,
    }
    said = {name: args[name] for name in FIELDS if args.get(name) is not None}
    values = defaults | said
    if not args.get("group_query_attention"):
        values["num_query_groups"] = heads
    if args.get("disable_bias_linear") is not None:
        values["add_bias_linear"] = not args["disable_bias_linear"]
    values["rotary_base"] = float(values["rotary_base"])
    values["rotary_percent"] = float(values["rotary_percent"])
    return values


def _dtype_from_args(args: Mapping[str, Any]) -> str:
    said = args.get("params_dtype")
    if said is not None:
        return str(getattr(said, "name", said)).removeprefix("torch.")
    return next((dtype for dtype, flag in DTYPE_FLAGS.items() if args.get(flag)), "float32")


def _scaling_from_args(args: Mapping[str, Any]) -> dict[str, Any] | None:
    if args.get("multi_latent_attention"):
        return latent_attention.scaling_from_args(args)
    return rope_scaling.from_args(args)


def _check_config_at_hand(spec: ModelSpec, family: str) -> None:
    """Raise a SchemaError unless what args say can be of the family of the config at hand."""
    config = family_named(family).config
    named = config.of_family(spec)
    if reasons := config.unsupported(named):
        raise SchemaError(
            f"the config at hand is of family {family}, the args are not: {named.architecture} "
            f"does not have: {', '.join(reasons)}; give the config of the same model"
        )


def _check_plain(value: Any, place: str = "extra") -> None:
    """Raise a SchemaError for a setting that could not be read back from ``args``."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _check_plain(entry, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for entry in value:
            _check_plain(entry, place)
    elif type(value) not in (str, int, float, bool, type(None)):
        raise SchemaError(
            f"{place} of the model is a {type(value).__name__}, which a checkpoint cannot bring "
            "back; its family must keep plain values there"
        )


def args_of(state: Any, file: Location) -> dict[str, Any]:
    """Return the ``args`` of a checkpoint's common state as a dictionary; empty if it has none.

    Raises:
        FormatError: the state is no dictionary, or its args are no namespace.
    """
    if not isinstance(state, Mapping):
        raise FormatError(f"{file}: expected a dictionary, found {type(state).__name__}")
    args = state.get("args")
    if args is None:
        return {}
    if isinstance(args, Record):  # of a class that a trainer made of its own
        args = args.state
    if not isinstance(args, Mapping) and not hasattr(args, "__dict__"):
        raise FormatError(f"{file}: args are of type {type(args).__name__}, expected a namespace")
    return dict(args if isinstance(args, Mapping) else vars(args))
