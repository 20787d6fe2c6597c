"""BERT as Megatron trains it: Megatron Core's, the legacy one, and transformers' MegatronBert.

Its layers are those of a GPT model, norms first, under ``encoder``. Behind them come the head for
masked tokens and, with the binary head, a pooler. transformers' own ``Bert`` normalises after
attention and MLP instead, so no weights of either make the other. Sections stand in the order in
which Megatron's converter sends them.

Source: NVIDIA/Megatron-LM megatron/core/models/bert/{bert_model,bert_lm_head,pooler}.py,
pretrain_bert.py @ core_v0.16.1; megatron/legacy/model/bert_model.py @ core_v0.12.3;
huggingface/transformers src/transformers/models/megatron_bert/*.py @ v5.23.0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckptx.errors import SchemaError
from ckptx.model.family import Family, FamilyConfig, MegatronModel
from ckptx.model.layout import ExtraState, Layout, Rule, rule, sections
from ckptx.model.spec import ModelSpec
from ckptx.model.transforms import QKV, Rearranged
from ckptx.schemas.config.traits import NEW_GELU, NO_HEAD_KEYS, Biases, ConfigTable, llama_defaults
from ckptx.schemas.config.translate import TableConfig
from ckptx.schemas.conventions import legacy
from ckptx.schemas.conventions.blocks import linear, norm, only_for, untied
from ckptx.schemas.conventions.mcore import STYLES, Style, extra_states, mcore_gpt
from ckptx.tensors.lazy import LazyTensor, replicated

NAME = "megatron-bert"
"""The family."""
PRETRAINING, MASKED_LM = "MegatronBertForPreTraining", "MegatronBertForMaskedLM"
"""With the binary head, and without it."""
TYPES = "type_vocab_size"
"""The entry of a spec's ``extra`` for the rows of the token types' embedding; 0 without one."""

_SCRIPT = "pretrain_bert.py"
_ENCODER = ("decoder.", "encoder.")
"""What the names of a GPT model's layers begin with, and those of a BERT."""
_POST_NORM_CLASSES = """
    Model ForPreTraining ForMaskedLM ForNextSentencePrediction ForSequenceClassification
    ForTokenClassification ForQuestionAnswering ForMultipleChoice LMHeadModel
"""


def _recognised(names: Iterable[str]) -> bool:
    """Return whether Megatron's names are those of a BERT, which alone has a head to predict."""
    heads = ("lm_head.dense.weight", "embedding.tokentype_embeddings.weight")
    return any(name.endswith(heads) for name in names)


def token_types(spec: ModelSpec) -> bool:
    """Whether token types have an embedding table."""
    return bool(spec.extra.get(TYPES))


def binary_head(spec: ModelSpec) -> bool:
    """Whether the model tells if two sentences follow each other."""
    return spec.architecture != MASKED_LM


def _launch_flags(spec: ModelSpec, local: bool) -> list[str]:
    return ["--spec local"] * local + ["--bert-no-binary-head"] * (not binary_head(spec))


def _tokentypes(name: str) -> Rule:
    return rule("tokentype embeddings", name, when=token_types)


def _when_binary(name: str) -> tuple[Rule, ...]:
    return only_for(binary_head, *linear("", name))


def _states(style: Style) -> Iterator[ExtraState]:
    """Yield the modules that keep an extra state; ``torch_dist`` has the last, too."""
    for state in extra_states(style):
        if state.message != "output layer" and not state.message.startswith("mtp"):
            yield replace(state, module=state.module.replace(*_ENCODER, 1))
    yield ExtraState("output layer", "output_layer", False)


def mcore_bert(style: Style) -> Layout:
    """Return the layout of a BERT in one of Megatron Core's spellings."""
    gpt = {section.message: section for section in mcore_gpt(style).sections}
    words, output = gpt["embeddings"], gpt["output layer"]
    tokentypes = _tokentypes("embedding.tokentype_embeddings.weight")
    heads = {
        "output layer": (*output.rules, rule("bias", "output_layer.bias", tp=0)),
        "pooler": _when_binary("pooler.dense"),
        "lm head": (*linear("dense", "lm_head.dense"), *norm("norm", "lm_head.layer_norm")),
        "binary head": _when_binary("binary_head"),
    }
    return Layout(
        style.name.replace("gpt", "bert"),
        (
            replace(words, rules=(*words.rules, tokentypes)),
            gpt["transformer layer {layer}"].under(*_ENCODER),
            gpt["final norm"].under(*_ENCODER),
            *sections(heads),
        ),
        ignored=("_extra_state",),
        extra_states=tuple(_states(style.as_stored)),
    )


MCORE = {style.convention: mcore_bert(style) for style in STYLES}
_LEGACY_HEADS = {
    "output layer": (rule("bias", "lm_head.bias", tp=0),),
    "pooler": _when_binary("language_model.pooler.dense"),
    "lm head": (*linear("dense", "lm_head.dense"), *norm("norm", "lm_head.norm")),
    "binary head": _when_binary("binary_head"),
}
_LEGACY_TOKENTYPES = _tokentypes("language_model.embedding.tokentype_embeddings.weight")
LEGACY = Layout(
    "legacy/bert",
    (legacy.embeddings(_LEGACY_TOKENTYPES), *legacy.transformer(), *sections(_LEGACY_HEADS)),
    ignored=("_extra_state",),
)
"""As version 2 and later have it; embeddings are always tied."""


class _Twice(Rearranged):
    """One tensor under two names; both are read, and compared."""

    apart = "a tensor under two names does not lie in one place"

    def pack(self, canonical: Sequence[LazyTensor], spec: ModelSpec, tp: int) -> list[LazyTensor]:
        return [*canonical, *canonical]

    def unpack(self, packed: Sequence[LazyTensor], spec: ModelSpec, tp: int) -> list[LazyTensor]:
        return [replicated(packed)]


# The layer of transformers has a bias and a parameter to tie it to; untied, both are there.
_TWICE = _Twice()


def _tied(spec: ModelSpec) -> bool:
    return spec.tied


_HF_LAYER = "bert.encoder.layer.{layer}."
_HF_SELF = [f"{_HF_LAYER}attention.self.{part}" for part in ("query", "key", "value")]
_HEAD = "cls.predictions."
_HF_RULES = {
    "embeddings": (
        rule("word embeddings", "bert.embeddings.word_embeddings.weight"),
        rule("position embeddings", "bert.embeddings.position_embeddings.weight"),
        _tokentypes("bert.embeddings.token_type_embeddings.weight"),
    ),
    "transformer layer {layer}": (
        *norm("input norm", f"{_HF_LAYER}attention.ln"),
        *linear("qkv", _HF_SELF, QKV),
        *linear("dense", f"{_HF_LAYER}attention.output.dense"),
        *norm("post norm", f"{_HF_LAYER}ln"),
        *linear("mlp l0", f"{_HF_LAYER}intermediate.dense"),
        *linear("mlp l1", f"{_HF_LAYER}output.dense"),
    ),
    "final norm": norm("", "bert.encoder.ln"),
    "output layer": (
        rule("bias", f"{_HEAD}bias", when=_tied, also=[f"{_HEAD}decoder.bias"]),
        rule("bias", [f"{_HEAD}decoder.bias", f"{_HEAD}bias"], _TWICE, when=untied),
        rule("weight", f"{_HEAD}decoder.weight", when=untied),
    ),
    "pooler": _when_binary("bert.pooler.dense"),
    "lm head": (
        *linear("dense", f"{_HEAD}transform.dense"),
        *norm("norm", f"{_HEAD}transform.LayerNorm"),
    ),
    "binary head": _when_binary("cls.seq_relationship"),
}
HF = Layout(
    "hf/megatron-bert",
    sections(_HF_RULES),
    # What transformers before 4.31 saved of positions that are 0, 1, 2, ...
    ignored=("embeddings.position_ids",),
    repeated=(("output layer", "bias", f"{_HEAD}decoder.bias"),),
)


def _from_args(spec: ModelSpec, args: Mapping[str, Any]) -> ModelSpec:
    binary = args.get("bert_binary_head", True)
    # Megatron makes both or neither; `_with_types` finds a model that has the types alone.
    extra = {TYPES: 2 if binary else 0, **spec.extra}
    return replace(spec, architecture=PRETRAINING if binary else MASKED_LM, extra=extra)


def _with_types(spec: ModelSpec, weights: Mapping[str, LazyTensor]) -> ModelSpec:
    """Return the spec with as many token types as the weights have."""
    tables = [t for name, t in weights.items() if name.endswith("tokentype_embeddings.weight")]
    return replace(spec, extra={**spec.extra, TYPES: tables[0].shape[0] if tables else 0})


def _head_notes(spec: ModelSpec) -> list[str]:
    """Return what the head for masked tokens computes otherwise in transformers."""
    if spec.activation != "gelu_tanh":
        return []
    return [
        "tanh form of gelu: BERT's head for masked tokens computes the exact form in Megatron "
        "(legacy models with --openai-gelu the tanh form), in transformers the form of the "
        "layers; logits may differ slightly"
    ]


def _type_notes(spec: ModelSpec) -> list[str]:
    """Return how to build a number of token types that Megatron's script does not build."""
    if spec.extra[TYPES] == (2 if binary_head(spec) else 0):
        return []
    return [
        f"{spec.extra[TYPES]} token types {'with' if binary_head(spec) else 'without'} a binary "
        f"head: {_SCRIPT} builds 2 with, none without; pass num_tokentypes={spec.extra[TYPES]} to "
        "BertModel there"
    ]


class _Config(TableConfig):
    def from_config(self, config: Mapping[str, Any]) -> ModelSpec:
        """Return the dimensions that a config says, token types among them."""
        for key in ("is_decoder", "add_cross_attention"):
            if config.get(key):
                raise SchemaError(
                    f"{key} is true in the config: Megatron's BERT is an encoder alone"
                )
        spec = super().from_config(config)
        return replace(spec, extra={**spec.extra, TYPES: config.get(TYPES, 2)})

    def to_config(self, spec: ModelSpec) -> dict[str, Any]:
        """Return a complete config, token types among it."""
        if not token_types(spec):
            raise SchemaError(
                "the model has no token types: transformers' MegatronBert always adds their "
                "embedding"
            )
        return {**super().to_config(spec), TYPES: spec.extra[TYPES], "pad_token_id": 0}


_DEFAULTS = llama_defaults(
    vocab=29056, hidden=1024, ffn=4096, layers=24, heads=16, positions=512
) | {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "tie_word_embeddings": True, TYPES: 2}
MEGATRON_BERT = Family(
    name=NAME,
    architectures=(PRETRAINING, MASKED_LM),
    model_types=(NAME,),
    layouts={"hf": HF, **MCORE, "legacy": LEGACY},
    config=_Config(
        NAME,
        ConfigTable(
            PRETRAINING,
            _DEFAULTS,
            fixed_biases=Biases(True, True, True),
            names={**NO_HEAD_KEYS, "rms_norm_eps": "layer_norm_eps"},
            normalization="LayerNorm",
            activations=NEW_GELU,
            position_embedding_type="learned_absolute",
            dropouts=("attention_probs_dropout_prob", "hidden_dropout_prob"),
        ),
    ),
    megatron=MegatronModel(
        script=_SCRIPT,
        decoder=False,
        recognised=_recognised,
        from_args=_from_args,
        from_weights=_with_types,
        to_args=lambda spec: {"bert_binary_head": binary_head(spec)},
        # Kernels of bias and gelu compute the tanh form, too, but its head has none of them.
        legacy_args=lambda spec: {"openai_gelu": spec.activation == "gelu_tanh"},
        launch_flags=_launch_flags,
        head_notes=_head_notes,
        model_notes=_type_notes,
    ),
)

_POST_NORM = (
    "normalises after attention and MLP; Megatron's BERT does before, and is transformers' "
    "MegatronBert"
)
BERT = Family(
    name="bert",
    architectures=tuple(f"Bert{kind}" for kind in _POST_NORM_CLASSES.split()),
    model_types=("bert",),
    layouts={},
    config=FamilyConfig(reason=f"Bert {_POST_NORM}"),
    refused=dict.fromkeys(("hf", *MCORE, "legacy"), _POST_NORM),
)
FAMILIES = (MEGATRON_BERT, BERT)
