"""Megatron Core's GPT model: names of parameters, and of the states its modules keep besides.

Several spellings exist. With Transformer Engine the norms before attention and MLP are part of the
linear layer that follows; the ``local`` spec has them as modules. Experts are modules of their own
or one grouped module, and ``torch_dist`` has a single tensor of all of them. Loaders accept every
spelling, a saver writes the one of its `Style`. Rules stand in the order in which Megatron
registers parameters.

Source: NVIDIA/Megatron-LM megatron/core/models/gpt/gpt_layer_specs.py,
megatron/core/transformer/{attention,mlp,transformer_layer}.py,
megatron/core/transformer/moe/{router,experts,shared_experts}.py @ core_v0.16.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from ckptx.model.layout import (
    ExtraState,
    LayerPredicate,
    Layout,
    Predicate,
    Rule,
    Section,
    always,
    rule,
)
from ckptx.model.spec import ModelSpec
from ckptx.model.transforms import (
    EXPERT_GLU,
    GLU,
    GROUPED_FC1,
    GROUPED_FC2,
    IDENTITY,
    Transform,
    per_expert,
)
from ckptx.schemas.conventions.blocks import (
    dense_bias,
    gated,
    layer_norm_bias,
    mlp_bias,
    norm,
    qk_norm,
    qkv_bias,
    ungated,
    untied,
)

LAYER = "decoder.layers.{layer}."
MTP = "mtp.layers.{layer}."
# The module was renamed in core 0.17; torch_dist keeps the first name.
MTP_MODEL = (f"{MTP}transformer_layer.", f"{MTP}mtp_model_layer.")
ATTENTION = LAYER + "self_attention."
MLP = LAYER + "mlp."
EXPERTS = MLP + "experts."
SHARED = MLP + "shared_experts."


@dataclass(frozen=True, slots=True)
class Style:
    """Which of Megatron's spellings a saver writes.

    ``local`` is the spec without Transformer Engine, ``grouped`` the one with all local experts in
    one module, ``distributed`` the names of ``torch_dist``, which are those of Transformer Engine
    and know no grouping; ``local`` then matters for the norm of a mixture alone.
    """

    local: bool = False
    grouped: bool = False
    distributed: bool = False

    @property
    def name(self) -> str:
        """The layout's name: ``"mcore/gpt"`` for ``torch_dist``."""
        if self.distributed:
            return f"mcore/gpt{'-local-mixture' * self.local}"
        return f"mcore/gpt-{'local' if self.local else 'te'}{'-grouped' * self.grouped}"

    @property
    def convention(self) -> str:
        """The key of the layout among those of a family: ``"mcore"`` for ``torch_dist``."""
        return self.name.replace("/gpt", "")

    @property
    def as_stored(self) -> Style:
        """The style whose modules are stored: ``torch_dist`` has those of Transformer Engine."""
        return Style(distributed=True) if self.distributed else self


def learned_positions(spec: ModelSpec) -> bool:
    """Whether positions have an embedding table."""
    return spec.position_embedding_type == "learned_absolute"


def shared_experts(spec: ModelSpec) -> bool:
    """Whether mixtures have an expert that every token goes through."""
    return bool(spec.moe_shared_expert_intermediate_size)


def shared_gate(spec: ModelSpec) -> bool:
    """Whether the shared expert has a gate."""
    return spec.moe_shared_expert_gate


def expert_bias(spec: ModelSpec) -> bool:
    """Whether the router balances experts by a bias."""
    return spec.moe_router_enable_expert_bias


def moe(spec: ModelSpec, layer: int) -> bool:
    """Whether a layer is a mixture of experts."""
    return spec.is_moe(layer)


def not_moe(spec: ModelSpec, layer: int) -> bool:
    """Whether a layer has one MLP."""
    return not spec.is_moe(layer)


def latent(spec: ModelSpec) -> bool:
    """Whether attention goes through latent vectors."""
    return spec.multi_latent_attention


def plain(spec: ModelSpec) -> bool:
    """Whether query, key and value are projected from the hidden state."""
    return not spec.multi_latent_attention


def latent_query(spec: ModelSpec) -> bool:
    """Whether the query too goes through a latent vector."""
    return spec.multi_latent_attention and spec.q_lora_rank is not None


def direct_query(spec: ModelSpec) -> bool:
    """Whether the query of latent attention is projected from the hidden state."""
    return spec.multi_latent_attention and spec.q_lora_rank is None


def both(*predicates: Predicate) -> Predicate:
    """Return the predicate that all of these hold."""
    return lambda spec: all(predicate(spec) for predicate in predicates)


def _norm(
    key: str,
    names: tuple[str, ...],
    layers: LayerPredicate | None = None,
    when: Predicate = always,
) -> tuple[Rule, Rule]:
    """Return the rules of a norm that goes by the first of several names, or by another."""
    name, *others = names

    def one(kind: str, when: Predicate) -> Rule:
        also = [other + kind for other in others]
        return rule(f"{key} {kind}", name + kind, when=when, layers=layers, also=also)

    return one("weight", when), one("bias", both(layer_norm_bias, when))


def _fc1(kind: str, when: Predicate) -> tuple[Rule, Rule]:
    name = f"{MLP}linear_fc1.{kind}"
    halves: list[tuple[list[str], Transform]] = [([f"{name}_w", f"{name}_v"], IDENTITY)]
    keys = [f"mlp l0 {kind} W", f"mlp l0 {kind} V"]
    gate = both(gated, when)
    plain = both(ungated, when)
    return (
        # The halves are what singleton_local_shards writes.
        rule(keys, name, GLU, tp=0, when=gate, layers=not_moe, also=halves),
        rule(f"mlp l0 {kind}", name, tp=0, when=plain, layers=not_moe),
    )


def _experts(style: Style) -> tuple[Rule, Rule]:
    """Return the rules of the experts' weights, [experts, rows, columns] in canonical space."""
    single = EXPERTS + "experts.{expert}.linear_fc"
    fc1: dict[Style, tuple[str | list[str], Transform]] = {
        Style(distributed=True): (f"{EXPERTS}experts.linear_fc1.weight", EXPERT_GLU),
        Style(grouped=True): (EXPERTS + "linear_fc1.weight{expert}", per_expert(GLU)),
        Style(): (EXPERTS + "local_experts.{expert}.linear_fc1.weight", per_expert(GLU)),
        Style(local=True, grouped=True): (f"{EXPERTS}weight1", GROUPED_FC1),
    }
    fc2: dict[Style, tuple[str | list[str], Transform]] = {
        Style(distributed=True): (f"{EXPERTS}experts.linear_fc2.weight", IDENTITY),
        Style(grouped=True): (EXPERTS + "linear_fc2.weight{expert}", per_expert()),
        Style(): (EXPERTS + "local_experts.{expert}.linear_fc2.weight", per_expert()),
        Style(local=True, grouped=True): (f"{EXPERTS}weight2", GROUPED_FC2),
    }
    halves = ([f"{single}1.weight_w", f"{single}1.weight_v"], per_expert(width=2))
    own = replace(style, local=style.local and style.grouped and not style.distributed)
    keys = ["mlp l0 weight W", "mlp l0 weight V"]
    others1 = [names for other, names in fc1.items() if other != own]
    others2 = [names for other, names in fc2.items() if other != own]
    return (
        rule(keys, *fc1[own], ep=0, tp=1, layers=moe, also=[*others1, halves]),
        rule(
            "mlp l1 weight",
            *fc2[own],
            ep=0,
            tp=2,
            layers=moe,
            also=[*others2, ([f"{single}2.weight"], per_expert())],
        ),
    )


def _mixture(style: Style) -> tuple[Rule, ...]:
    shared = ["shared mlp l0 weight W", "shared mlp l0 weight V"]
    halves: list[tuple[list[str], Transform]] = [
        ([f"{SHARED}linear_fc1.weight_w", f"{SHARED}linear_fc1.weight_v"], IDENTITY)
    ]
    return (
        rule("router weight", f"{MLP}router.weight", layers=moe),
        rule("router expert bias", f"{MLP}router.expert_bias", layers=moe, when=expert_bias),
        *_experts(style),
        rule("shared gate weight", f"{SHARED}gate_weight", layers=moe, when=shared_gate),
        rule(
            shared,
            f"{SHARED}linear_fc1.weight",
            GLU,
            tp=0,
            layers=moe,
            when=shared_experts,
            also=halves,
        ),
        rule(
            "shared mlp l1 weight",
            f"{SHARED}linear_fc2.weight",
            tp=1,
            layers=moe,
            when=shared_experts,
        ),
    )


def _latent_attention() -> tuple[Rule, ...]:
    """Return the rules of multi-latent attention, in the names of Transformer Engine's spec.

    Its projections to latent vectors lie whole in every rank; the local spec cuts them along their
    rows, and has the norms of latent vectors as modules.

    Source: megatron/core/transformer/multi_latent_attention.py @ core_v0.16.1.
    """

    def down(key: str, name: str, rows: Callable[[ModelSpec], int], when: Predicate) -> Rule:
        return rule(f"{key} down weight", f"{ATTENTION}linear_{name}.weight", when=when, rows=rows)

    def up(key: str, name: str, module: str, when: Predicate) -> tuple[Rule, Rule]:
        linear = f"{ATTENTION}linear_{name}."
        own = f"{ATTENTION}{module}.weight"
        normed = both(when, qk_norm)
        return (
            rule(f"{key} down norm weight", f"{linear}layer_norm_weight", when=normed, also=[own]),
            rule(f"{key} up weight", f"{linear}weight", tp=0, when=when),
        )

    return (
        rule("q projection weight", f"{ATTENTION}linear_q_proj.weight", tp=0, when=direct_query),
        down("q", "q_down_proj", lambda spec: spec.q_lora_rank or 0, latent_query),
        *up("q", "q_up_proj", "q_layernorm", latent_query),
        down(
            "kv",
            "kv_down_proj",
            lambda spec: spec.kv_lora_rank + spec.qk_pos_emb_head_dim,
            latent,
        ),
        *up("kv", "kv_up_proj", "kv_layernorm", latent),
    )


def _mtp_rules(layer: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Return the rules of a layer for multi-token prediction, given those of a decoder layer.

    Source: megatron/core/transformer/multi_token_prediction.py @ core_v0.16.1 and core_v0.17.0.
    """
    inner = (entry.under(LAYER, *MTP_MODEL) for entry in layer)
    return (
        *norm("embedding norm", f"{MTP}enorm"),
        *norm("hidden norm", f"{MTP}hnorm"),
        rule("projection weight", f"{MTP}eh_proj.weight", tp=0),
        *inner,
        *norm("final norm", f"{MTP}final_layernorm"),
    )


def _as_modules(style: Style) -> bool:
    """Return whether a layer's norms are modules of their own, not part of a linear layer."""
    return style.local and not style.distributed


def _ordered(style: Style, fused: str, module: str) -> tuple[str, str]:
    """Return both spellings of a norm, the one that is written first."""
    return (module, fused) if _as_modules(style) else (fused, module)


def _post_norm(style: Style) -> tuple[Rule, ...]:
    """Return the rules of the norm before the MLP, dense or a mixture."""
    fused, module = f"{MLP}linear_fc1.layer_norm_", f"{LAYER}pre_mlp_layernorm."
    mixture = (module, fused)
    if style.local and style.distributed:
        # Megatron maps it there, as it does with a dense layer's, and its TE spec does not look.
        mixture = (fused, module)
    return (
        *_norm("post norm", _ordered(style, fused, module), not_moe),
        *_norm("post norm", mixture, moe),
    )


def mcore_gpt(style: Style) -> Layout:
    """Return the layout of a GPT model in one of Megatron's spellings."""
    modules = _as_modules(style)
    input_norm = _norm(
        "input norm",
        _ordered(style, f"{ATTENTION}linear_qkv.layer_norm_", f"{LAYER}input_layernorm."),
        when=plain,
    )
    latent_norm = _norm("input norm", (f"{LAYER}input_layernorm.",), when=latent)
    dense = (
        rule("dense weight", f"{ATTENTION}linear_proj.weight", tp=1),
        rule("dense bias", f"{ATTENTION}linear_proj.bias", when=dense_bias),
    )
    qkv = (
        rule("qkv weight", f"{ATTENTION}linear_qkv.weight", tp=0, when=plain),
        rule("qkv bias", f"{ATTENTION}linear_qkv.bias", tp=0, when=both(plain, qkv_bias)),
    )
    qk_norms = (
        rule("q norm weight", f"{ATTENTION}q_layernorm.weight", when=both(plain, qk_norm)),
        rule("k norm weight", f"{ATTENTION}k_layernorm.weight", when=both(plain, qk_norm)),
        *_latent_attention(),
    )
    mlp = (
        *_fc1("weight", always),
        *_fc1("bias", mlp_bias),
        rule("mlp l1 weight", f"{MLP}linear_fc2.weight", tp=1, layers=not_moe),
        rule("mlp l1 bias", f"{MLP}linear_fc2.bias", when=mlp_bias, layers=not_moe),
        *_mixture(style),
    )
    attention = (*input_norm, *dense) if modules else (*dense, *input_norm)
    layer = (*latent_norm, *attention, *qkv, *qk_norms, *_post_norm(style), *mlp)
    return Layout(
        style.name,
        (
            Section(
                "embeddings",
                (
                    rule("word embeddings", "embedding.word_embeddings.weight", tp=0),
                    rule(
                        "position embeddings",
                        "embedding.position_embeddings.weight",
                        when=learned_positions,
                    ),
                ),
            ),
            Section("transformer layer {layer}", layer),
            Section(
                "final norm",
                (
                    rule("weight", "decoder.final_layernorm.weight"),
                    rule("bias", "decoder.final_layernorm.bias", when=layer_norm_bias),
                ),
            ),
            Section("mtp layer {layer}", _mtp_rules(layer)),
            Section("output layer", (rule("weight", "output_layer.weight", tp=0, when=untied),)),
        ),
        ignored=("_extra_state",),
        extra_states=tuple(extra_states(style.as_stored)),
    )


def extra_states(style: Style) -> Iterator[ExtraState]:
    """Yield the modules of a GPT model that keep an extra state."""
    yield from _layer_states(style)
    if not style.local:
        yield ExtraState("final norm", "decoder.final_layernorm", True)
    for state in _further_states(style):
        yield replace(state, message="mtp layer {layer}")
    if not style.distributed:
        yield ExtraState("output layer", "output_layer", False)


def _layer_states(style: Style, *, further: bool = False) -> Iterator[ExtraState]:
    """Yield those of a decoder layer; ``torch_dist`` keeps one more in ``further`` layers."""

    def state(
        module: str,
        when: Predicate = always,
        layers: LayerPredicate | None = None,
        *,
        sharded: bool = False,
    ) -> ExtraState:
        message = "transformer layer {layer}"
        return ExtraState(message, module, not style.local, when, layers, sharded)

    if not style.local and (further or not style.distributed):
        yield state(f"{ATTENTION}core_attention")
    yield state(f"{ATTENTION}linear_proj")
    yield state(f"{ATTENTION}linear_qkv", plain)
    yield state(f"{ATTENTION}linear_q_proj", direct_query)
    for part in ("linear_q_down_proj", "linear_q_up_proj"):
        yield state(ATTENTION + part, latent_query)
    for part in ("linear_kv_down_proj", "linear_kv_up_proj"):
        yield state(ATTENTION + part, latent)
    if not style.local:
        yield state(f"{LAYER}input_layernorm", latent)
        yield state(f"{ATTENTION}q_layernorm", both(plain, qk_norm))
        yield state(f"{ATTENTION}k_layernorm", both(plain, qk_norm))
        yield state(f"{LAYER}pre_mlp_layernorm", layers=moe)
    for part in ("linear_fc1", "linear_fc2"):
        yield state(MLP + part, layers=not_moe)
        if style.distributed:
            yield state(f"{EXPERTS}experts.{part}", layers=moe, sharded=True)
        elif not style.grouped:
            yield state(EXPERTS + "local_experts.{expert}." + part, layers=moe)
        elif not style.local:
            yield state(EXPERTS + part, layers=moe)
        yield state(SHARED + part, shared_experts, moe)


def _further_states(style: Style) -> Iterator[ExtraState]:
    for state in _layer_states(style, further=True):
        yield replace(state, module=MTP_MODEL[0] + state.module.removeprefix(LAYER))
    yield ExtraState("", f"{MTP}eh_proj", not style.local)
    if not style.local:
        for part in ("enorm", "hnorm", "final_layernorm"):
            yield ExtraState("", MTP + part, True)


STYLES = (
    Style(distributed=True),
    Style(distributed=True, local=True),
    Style(),
    Style(grouped=True),
    Style(local=True),
    Style(local=True, grouped=True),
)
MCORE = {style.convention: mcore_gpt(style) for style in STYLES}
"""Megatron's layouts by convention: ``"mcore"`` is that of ``torch_dist``."""
MCORE_LOCAL = tuple(style.convention for style in STYLES if style.local)
"""The conventions of the spec without Transformer Engine, that of its ``torch_dist`` among them."""
TIED_COPY = "output_layer.weight"
"""The copy of tied embeddings on the last stage of a per-rank checkpoint with several stages."""


def not_in_megatron(reason: str) -> Mapping[str, str]:
    """Return the reason for which a family has no Megatron layout, by convention."""
    return dict.fromkeys((*MCORE, "legacy"), f"Megatron Core 0.16 has no {reason}")
