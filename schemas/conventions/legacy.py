"""Megatron's legacy models, those before Megatron Core: names, their spellings, what args mean.

A rank's ``model`` is a tree of dictionaries, flat below some of its modules. Here a tensor's name
is the path to it, joined by dots; `flattened` and `nested` go from one to the other. Names changed
over the years, and Megatron renames what it finds as it loads: so does `flattened`.

The order of the rows of query, key and value is that of the ``checkpoint_version``; see `ordered`.

Source: NVIDIA/Megatron-LM megatron/legacy/model/{gpt_model,language_model,transformer}.py,
megatron/training/checkpointing.py (fix_query_key_value_ordering) @ core_v0.12.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ckptx.errors import SchemaError
from ckptx.model.family import FUNCTION_SETTINGS
from ckptx.model.layout import Layout, Rule, Section, Spelling, rule
from ckptx.model.spec import ModelSpec
from ckptx.model.transforms import FUSED_QKV, GLU, IDENTITY, INNERMOST_QKV, Transform, per_expert
from ckptx.registry.families import family_named
from ckptx.schemas.config.windows import windowed_layers
from ckptx.schemas.conventions import blocks
from ckptx.schemas.conventions.blocks import GATE_UP, linear, moe, norm, not_moe
from ckptx.schemas.megatron_settings.activations import FUSION

VERSION = 3.0
"""The ``checkpoint_version`` that is written."""
TIED_COPY = "word_embeddings_for_head.weight"
"""The copy of tied embeddings on the last of several pipeline stages."""
ROTARY_BASE = 10000.0
"""The only one: the model builds its rotary embedding without ``args.rotary_base``."""

_MODEL = "language_model."
_EMBEDDING = f"{_MODEL}embedding."
_ENCODER = f"{_MODEL}encoder."
_LAYER = _ENCODER + "layers.{layer}."
_ATTENTION = f"{_LAYER}self_attention."
_MLP = f"{_LAYER}mlp."
_EXPERT = _MLP + "local_experts.{expert}."
_TABLES = ("word_embeddings", "position_embeddings", "tokentype_embeddings")
_ENCODERS = ("encoder", "transformer")
_HEADS = ("lm_head", "binary_head", "word_embeddings_for_head")
_MODULES = (
    *(f"{_EMBEDDING}{table}" for table in _TABLES),
    *(f"{_MODEL}{part}" for part in ("encoder", "output_layer", "pooler")),
    *_HEADS,
)
"""The modules whose dictionary is flat: the tree above them is nested."""

Tree = Mapping[str, Any]


ORDERS: Mapping[float, Transform] = {0: FUSED_QKV, 1: INNERMOST_QKV, 2: IDENTITY, 3: IDENTITY}
"""How a shard holds query, key and value, by version: [3, heads, size], [heads, size, 3], or head
by head, [heads, 3, size]."""


def ordered(layout: Layout, version: float, spec: ModelSpec) -> Layout:
    """Return a legacy layout as files of a ``checkpoint_version`` have it.

    Raises:
        SchemaError: there is no such version, or it has no query groups and the model has.
    """
    if not isinstance(version, int | float) or version not in ORDERS:
        raise SchemaError(
            f"checkpoint_version is {version!r}, known are {', '.join(map(str, ORDERS))}; the "
            "order of query, key and value is unknown"
        )
    if version < 2 and spec.num_query_groups != spec.num_attention_heads:
        raise SchemaError(
            f"checkpoint_version {version:g} has as many keys as queries, the args say "
            f"{spec.num_query_groups} query groups for {spec.num_attention_heads} heads; the "
            "version or the args are not of this checkpoint"
        )
    return replace(
        layout,
        sections=tuple(
            replace(section, rules=tuple(_with_order(r, ORDERS[version]) for r in section.rules))
            for section in layout.sections
        ),
    )


def _with_order(entry: Rule, transform: Transform) -> Rule:
    if not entry.keys[0].startswith("qkv "):
        return entry
    return replace(entry, spellings=tuple(Spelling(s.names, transform) for s in entry.spellings))


def transformer() -> tuple[Section, Section]:
    """Return the sections of the layers and of the final norm, in the order of registration."""
    experts = partial(rule, ep=0, layers=moe)
    fc1, fc2 = (f"{_EXPERT}dense_{sizes}.weight" for sizes in ("h_to_4h", "4h_to_h"))
    layer = (
        *norm("input norm", f"{_LAYER}input_norm"),
        *linear("qkv", f"{_ATTENTION}query_key_value", tp=0, bias=blocks.qkv_bias),
        *linear("dense", f"{_ATTENTION}dense", tp=1, bias=blocks.dense_bias),
        *norm("post norm", f"{_LAYER}post_attention_norm"),
        *blocks.megatron_fc1(f"{_MLP}dense_h_to_4h"),
        *linear("mlp l1", f"{_MLP}dense_4h_to_h", tp=1, bias=blocks.mlp_bias, layers=not_moe),
        rule("router weight", f"{_MLP}router.weight", layers=moe),
        experts(GATE_UP, fc1, per_expert(GLU), tp=1),
        experts("mlp l1 weight", fc2, per_expert(), tp=2),
    )
    return (
        Section("transformer layer {layer}", layer),
        Section("final norm", norm("", f"{_ENCODER}final_norm")),
    )


def embeddings(*more: Rule) -> Section:
    """Return the section of the embeddings."""
    return Section("embeddings", (*blocks.embedding_tables(_EMBEDDING), *more))


_OUTPUT = rule("weight", f"{_MODEL}output_layer.weight", tp=0, when=blocks.untied)
LEGACY = Layout(
    "legacy/gpt",
    (embeddings(), *transformer(), Section("output layer", (_OUTPUT,))),
    ignored=("_extra_state",),
)
"""A GPT model, as version 2 and later have it."""


def is_legacy(model: Tree) -> bool:
    """Return whether a rank's ``model`` is one of a legacy model: nested, or named like one."""
    return any(isinstance(entry, Mapping) or names_legacy(name) for name, entry in model.items())


def names_legacy(name: str) -> bool:
    """Return whether a tensor's path is one that only legacy models have.

    Examples:
        >>> names_legacy("language_model.encoder.final_norm.weight")
        True
        >>> names_legacy("language_model.decoder.final_layernorm.weight")  # Megatron Core's LLaVA
        False
    """
    return name.startswith(tuple(f"{_MODEL}{part}." for part in _ENCODERS))


def flattened(model: Tree) -> dict[str, Any]:
    """Return the entries of a rank's ``model`` by path, in today's spelling.

    Raises:
        SchemaError: two entries are one tensor in two spellings.

    Examples:
        >>> tree = {"transformer": {"layers.0.attention.dense.bias": 1, "final_layernorm.bias": 2}}
        >>> list(flattened(tree))  # doctest: +NORMALIZE_WHITESPACE
        ['language_model.encoder.layers.0.self_attention.dense.bias',
         'language_model.encoder.final_norm.bias']
    """
    named: dict[str, Any] = {}
    for path, entry in _leaves(model, ""):
        name = _respelled(path)
        if name in named:
            raise SchemaError(f"{name!r} is there twice, in two spellings; one is {path!r}")
        named[name] = entry
    return named


def _leaves(tree: Tree, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, entry in tree.items():
        if isinstance(entry, Mapping):
            yield from _leaves(entry, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", entry


def _respelled(path: str) -> str:
    """Return the name that Megatron gives, as it loads, to what older versions wrote."""
    module = path.partition(".")[0]
    if module in _HEADS:
        return path.replace("layernorm", "norm")
    rest = path.removeprefix(_MODEL)
    if rest.startswith(_TABLES):
        return _EMBEDDING + rest
    for encoder in (f"{name}." for name in _ENCODERS):
        if rest.startswith(encoder):
            rest = rest.removeprefix(encoder).replace(".attention.", ".self_attention.")
            return _ENCODER + rest.replace("layernorm", "norm")
    return _MODEL + rest


def nested(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return a rank's ``model`` as Megatron writes it.

    Examples:
        >>> nested({"language_model.encoder.final_norm.weight": 1, "lm_head.bias": 2})
        {'language_model': {'encoder': {'final_norm.weight': 1}}, 'lm_head': {'bias': 2}}
    """
    tree: dict[str, Any] = {}
    for name, entry in named.items():
        module = next(module for module in _MODULES if name.startswith(f"{module}."))
        place = tree
        for part in module.split("."):
            place = place.setdefault(part, {})
        place[name.removeprefix(f"{module}.")] = entry
    return tree


_NORMS = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}
"""As Megatron-DeepSpeed spells them; its megatron/arguments.py @ f6e1e62."""


def completed(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the args of a legacy checkpoint as those of Megatron Core that say the same model.

    Old ones lack what was fixed when they were written, and legacy models ignore what only
    Megatron Core has.
    """
    if not args:
        return {}
    hidden = args.get("hidden_size")
    older = {
        "tensor_model_parallel_size": args.get("model_parallel_size"),
        "ffn_hidden_size": None if hidden is None else 4 * hidden,
        "norm_epsilon": args.get("layernorm_epsilon", 1e-5),
    }
    found = {**args}
    found |= {name: value for name, value in older.items() if args.get(name) is None}
    if (norm := str(args.get("normalization"))) in _NORMS:
        found["normalization"] = _NORMS[norm]
    heads, keys = args.get("num_attention_heads"), found.pop("num_key_value_heads", None)
    if keys not in (None, heads):
        raise SchemaError(
            f"args say num_key_value_heads {keys} of {heads} heads: Megatron-DeepSpeed then keeps "
            "query and key_value apart, which is not read; bring the model to Hugging Face's names "
            "with tools/hf2megads_weight_converter.py of Megatron-DeepSpeed"
        )
    if args.get("openai_gelu"):
        found[FUSION] = True
    found |= _standalone_embedding(args)
    found |= {"openai_gelu": False, "use_legacy_models": False, "qk_layernorm": False}
    if args.get("num_experts"):
        # SwitchMLP: the best expert of all, weighted by the sigmoid of its score.
        found |= {
            "moe_ffn_hidden_size": found["ffn_hidden_size"],
            "moe_layer_freq": 1,
            "moe_router_topk": 1,
            "moe_router_score_function": "sigmoid",
            "moe_shared_expert_intermediate_size": None,
            "expert_tensor_parallel_size": None,
        }
    return found


def _standalone_embedding(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the layout of a pipeline whose first stage holds nothing but the embedding.

    Source: NVIDIA/Megatron-LM megatron/training/arguments.py @ core_v0.6.0.
    """
    if not args.get("standalone_embedding_stage"):
        return {}
    stages, layers = args["pipeline_model_parallel_size"] - 1, args["num_layers"]
    if args.get("virtual_pipeline_model_parallel_size") or not stages or layers % stages:
        raise SchemaError(
            f"a stage of its own for the embedding (standalone_embedding_stage), with {layers} "
            f"layers on {stages} others and virtual stages, is not known"
        )
    each_stage = f"t*{layers // stages}"
    return {"pipeline_model_parallel_layout": "|".join(["E", *[each_stage] * stages]) + "L"}


def to_args(spec: ModelSpec) -> dict[str, Any]:
    """Return the arguments that make Megatron build a legacy model of these dimensions."""
    return {
        "use_legacy_models": True,
        # Kernels of bias and gelu compute the tanh form, too, where there is a bias.
        "openai_gelu": spec.activation == "gelu_tanh" and not spec.add_bias_linear,
        "transformer_impl": "local",
        **family_named(spec.family).megatron.legacy_args(spec),
    }


def launch_flags(spec: ModelSpec) -> list[str]:
    """Return the options of a launch that only a legacy model needs."""
    flags = ["--use-legacy-models", "--transformer-impl", "local"]
    return flags + ["--openai-gelu"] * bool(to_args(spec)["openai_gelu"])


_CORE_ONLY = ("qk_l2_norm", "no_rope_freq", "attention_output_gate")


def unsupported_by_legacy(spec: ModelSpec) -> list[str]:
    """Return what a spec says and legacy models do not have."""
    router = (spec.moe_router_topk, spec.moe_router_score_function)
    refused = (
        (spec.qk_layernorm, "norms of query and key heads"),
        (spec.multi_latent_attention, "multi-latent attention"),
        (spec.mtp_num_layers, "multi-token prediction"),
        (spec.gated and spec.activation != "swiglu", f"activation {spec.activation}"),
        (spec.extra.get("rotary_interleaved"), "rotary embeddings of neighbouring rows"),
        (
            spec.normalization == "RMSNorm" and spec.extra.get("layernorm_zero_centered_gamma"),
            "RMSNorm with weights around zero",
        ),
        (
            spec.num_experts and router != (1, "sigmoid"),
            "mixtures other than one expert per token, weighted by a sigmoid",
        ),
        (spec.num_experts and spec.moe_layers, "dense layers among mixtures"),
        (spec.moe_shared_expert_intermediate_size, "shared experts"),
        (spec.moe_router_enable_expert_bias, "routers with a bias per expert"),
    )
    own = (name for name in _CORE_ONLY if spec.extra.get(name))
    return [
        *(what for holds, what in refused if holds),
        *spec.extra.get(FUNCTION_SETTINGS, ()),
        *own,
    ]


def check(spec: ModelSpec) -> None:
    """Raise a SchemaError unless a legacy model can be what a spec says."""
    if problems := unsupported_by_legacy(spec):
        raise SchemaError(
            f"a legacy Megatron model cannot be this {spec.architecture}: it has no "
            f"{', and no '.join(problems)}"
        )


def notes(spec: ModelSpec) -> list[str]:
    """Return what a legacy model computes otherwise although all weights are there."""
    found = []
    if spec.position_embedding_type == "rope" and spec.rotary_base != ROTARY_BASE:
        found.append(
            f"rotary_base {spec.rotary_base:g}: legacy models have {ROTARY_BASE:g} fixed; pass "
            f"rotary_base={spec.rotary_base:g} to RotaryEmbedding in "
            "megatron/legacy/model/language_model.py"
        )
    scaling = spec.rotary_scaling
    if scaling is not None and scaling["rope_type"] == "linear":
        found.append(
            "linear rope_scaling: pass --rotary-seq-len-interpolation-factor "
            f"{scaling['factor']:g}, which no checkpoint brings along"
        )
    elif scaling is not None:
        found.append(
            f"rope_scaling {dict(scaling)}: legacy models have none of this kind; the setting is "
            "kept for the way back"
        )
    if any(windowed_layers(spec)):
        found.append(
            f"sliding_window {spec.extra['sliding_window']}: legacy models attend to everything"
        )
    return found


NOT_LEGACY = {
    "qk_norm": "legacy Megatron models have no norms of query and key heads",
    "experts": "legacy Megatron models have mixtures of one expert per token only, weighted by a "
    "sigmoid",
    "rotary": "legacy Megatron models have no rotary embeddings of neighbouring rows",
    "geglu": "legacy Megatron models have no gated Gelu, and no RMSNorm with weights around zero",
}
"""Reasons for which families have no legacy layout."""
