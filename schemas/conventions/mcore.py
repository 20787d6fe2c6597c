"""Megatron Core's GPT model: names of parameters, and of the states its modules keep besides.

Several spellings exist. With Transformer Engine the norms before attention and MLP are part of the
linear layer that follows; the ``local`` spec has them as modules. Experts are modules of their own
or one grouped module, and ``torch_dist`` has a single tensor of all of them. Loaders accept every
spelling, a saver writes the one of its `Style`. Rules stand in the order in which Megatron
registers parameters.

Source: NVIDIA/Megatron-LM megatron/core/models/gpt/gpt_layer_specs.py,
megatron/core/transformer/{attention,mlp,transformer_layer}.py,
megatron/core/transformer/moe/{router,experts,blocks.shared_experts}.py @ core_v0.16.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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
from ckptx.schemas.conventions import blocks
from ckptx.schemas.conventions.blocks import both, linear, moe, norm, not_moe, qk_norm

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


def latent(spec: ModelSpec) -> bool:
    """Whether attention goes through latent vectors."""
    return spec.multi_latent_attention


def plain(spec: ModelSpec) -> bool:
    """Whether query, key and value are projected from the hidden state."""
    return not spec.multi_latent_attention


_heads_normed = both(plain, qk_norm)


def _norm(
    key: str, names: tuple[str, ...], layers: LayerPredicate | None = None, when: Predicate = always
) -> tuple[Rule, Rule]:
    """Return the rules of a norm that goes by the first of several names, or by another."""
    name, *others = names

    def one(kind: str, when: Predicate) -> Rule:
        also = [other + kind for other in others]
        return rule(f"{key} {kind}", name + kind, when=when, layers=layers, also=also)

    return one("weight", when), one("bias", both(blocks.layer_norm_bias, when))


def _experts(style: Style) -> Iterator[Rule]:
    """Yield the rules of the experts' weights, [experts, rows, columns] in canonical space."""
    known: dict[Style, tuple[str, tuple[Transform, Transform]]] = {
        Style(distributed=True): ("experts.linear_fc#.weight", (EXPERT_GLU, IDENTITY)),
        Style(grouped=True): ("linear_fc#.weight{expert}", (per_expert(GLU), per_expert())),
        Style(): ("local_experts.{expert}.linear_fc#.weight", (per_expert(GLU), per_expert())),
        Style(local=True, grouped=True): ("weight#", (GROUPED_FC1, GROUPED_FC2)),
    }
    own = replace(style, local=style.local and style.grouped and not style.distributed)
    ordered = [known.pop(own), *known.values()]
    for number, keys, ends in ((1, blocks.GATE_UP, ("_w", "_v")), (2, ("mlp l1 weight",), ("",))):
        first, *others = (
            (EXPERTS + name.replace("#", str(number)), transforms[number - 1])
            for name, transforms in ordered
        )
        # Those of singleton_local_shards.
        single = [f"{EXPERTS}experts.{{expert}}.linear_fc{number}.weight{end}" for end in ends]
        also = [*others, (single, per_expert(width=len(ends)))]
        yield rule(keys, *first, ep=0, tp=number, layers=moe, also=also)


def _mixture(style: Style) -> tuple[Rule, ...]:
    gate_up = [f"shared {key}" for key in blocks.GATE_UP]
    fc1, fc2 = f"{SHARED}linear_fc1.weight", f"{SHARED}linear_fc2.weight"
    halves: list[tuple[list[str], Transform]] = [([f"{fc1}_w", f"{fc1}_v"], IDENTITY)]
    own = (
        rule("router weight", f"{MLP}router.weight"),
        rule("router expert bias", f"{MLP}router.expert_bias", when=blocks.expert_bias),
        *_experts(style),
        rule("shared gate weight", f"{SHARED}gate_weight", when=blocks.shared_gate),
        rule(gate_up, fc1, GLU, tp=0, when=blocks.shared_experts, also=halves),
        rule("shared mlp l1 weight", fc2, tp=1, when=blocks.shared_experts),
    )
    return tuple(entry.only_in(moe) for entry in own)


def _latent_attention() -> tuple[Rule, ...]:
    """Return the rules of multi-latent attention, in the names of Transformer Engine's spec.

    Its projections to latent vectors lie whole in every rank; the local spec cuts them along their
    rows, and has the norms of latent vectors as modules.

    Source: megatron/core/transformer/multi_latent_attention.py @ core_v0.16.1.
    """

    def down(key: str, rows: Callable[[ModelSpec], int], when: Predicate) -> Rule:
        name = f"{ATTENTION}linear_{key}_down_proj.weight"
        return rule(f"{key} down weight", name, when=when, rows=rows)

    def up(key: str, when: Predicate) -> tuple[Rule, Rule]:
        linear = f"{ATTENTION}linear_{key}_up_proj."
        own = f"{ATTENTION}{key}_layernorm.weight"
        normed = both(when, qk_norm)
        return (
            rule(f"{key} down norm weight", f"{linear}layer_norm_weight", when=normed, also=[own]),
            rule(f"{key} up weight", f"{linear}weight", tp=0, when=when),
        )

    def query(spec: ModelSpec) -> int:
        return spec.q_lora_rank or 0

    def key_value(spec: ModelSpec) -> int:
        return spec.kv_lora_rank + spec.qk_pos_emb_head_dim

    direct = f"{ATTENTION}linear_q_proj.weight"
    return (
        rule("q projection weight", direct, tp=0, when=blocks.direct_query),
        down("q", query, blocks.latent_query),
        *up("q", blocks.latent_query),
        down("kv", key_value, latent),
        *up("kv", latent),
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
    fused, module = f"{ATTENTION}linear_qkv.layer_norm_", f"{LAYER}input_layernorm."
    input_norm = _norm("input norm", _ordered(style, fused, module), when=plain)
    dense = linear("dense", f"{ATTENTION}linear_proj", tp=1, bias=blocks.dense_bias)
    layer = (
        *_norm("input norm", (module,), when=latent),
        *((*input_norm, *dense) if _as_modules(style) else (*dense, *input_norm)),
        *linear("qkv", f"{ATTENTION}linear_qkv", tp=0, when=plain, bias=blocks.qkv_bias),
        *(
            rule(f"{part} norm weight", f"{ATTENTION}{part}_layernorm.weight", when=_heads_normed)
            for part in "qk"
        ),
        *_latent_attention(),
        *_post_norm(style),
        # The halves are what singleton_local_shards writes.
        *blocks.megatron_fc1(f"{MLP}linear_fc1", ("_w", "_v")),
        *linear("mlp l1", f"{MLP}linear_fc2", tp=1, bias=blocks.mlp_bias, layers=not_moe),
        *_mixture(style),
    )
    output = rule("weight", "output_layer.weight", tp=0, when=blocks.untied)
    return Layout(
        style.name,
        (
            Section("embeddings", blocks.embedding_tables("embedding.")),
            Section("transformer layer {layer}", layer),
            Section("final norm", norm("", "decoder.final_layernorm")),
            Section("mtp layer {layer}", _mtp_rules(layer)),
            Section("output layer", (output,)),
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


def with_cores(states: Iterable[ExtraState]) -> Iterator[ExtraState]:
    """Yield states and those of the cores of attention, which releases up to 0.14 look for.

    Later ones neither save them nor look for them in ``torch_dist``, and refuse them at
    ``--dist-ckpt-strictness raise_all``.

    Source: NVIDIA/Megatron-LM megatron/core/extensions/transformer_engine.py
    (TEDotProductAttention.sharded_state_dict) @ core_v0.14.0 and core_v0.15.3.
    """
    states = tuple(states)
    for state in states:
        yield state
        module = state.module.replace("attention.linear_proj", "attention.core_attention")
        if state.engine and module not in {one.module for one in states}:
            yield replace(state, module=module)


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
    yield state(f"{ATTENTION}linear_q_proj", blocks.direct_query)
    for part in ("linear_q_down_proj", "linear_q_up_proj"):
        yield state(ATTENTION + part, blocks.latent_query)
    for part in ("linear_kv_down_proj", "linear_kv_up_proj"):
        yield state(ATTENTION + part, latent)
    if not style.local:
        yield state(f"{LAYER}input_layernorm", latent)
        yield state(f"{ATTENTION}q_layernorm", _heads_normed)
        yield state(f"{ATTENTION}k_layernorm", _heads_normed)
        yield state(f"{LAYER}pre_mlp_layernorm", layers=moe)
    for part in ("linear_fc1", "linear_fc2"):
        yield state(MLP + part, layers=not_moe)
        if style.distributed:
            yield state(f"{EXPERTS}experts.{part}", layers=moe, sharded=True)
        elif not style.grouped:
            yield state(EXPERTS + "local_experts.{expert}." + part, layers=moe)
        elif not style.local:
            yield state(EXPERTS + part, layers=moe)
        yield state(SHARED + part, blocks.shared_experts, moe)


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
TIED_COPY = "output_layer.weight"
"""The copy of tied embeddings on the last stage of a per-rank checkpoint with several stages."""


def not_in_megatron(reason: str) -> Mapping[str, str]:
    """Return the reason for which a family has no Megatron layout, by convention."""
    return dict.fromkeys((*MCORE, "legacy"), f"Megatron Core 0.16 has no {reason}")


def not_local(reason: str) -> Mapping[str, str]:
    """Return the reason for which a family has no layout of the spec without Transformer Engine."""
    local = (style.convention for style in STYLES if style.local)
    return dict.fromkeys(local, f"{reason}; write Transformer Engine's names")
