"""What transformers 5 calls tensors in memory, where files have other names.

A state dict saved as it is (FSDP, verl, DeepSpeed, ``torch.save``) has the names of memory;
``save_pretrained`` and whoever reads a model directory have those of files. `in_files` and
`in_memory` go from one to the other; names that are right already stay, so each may be applied to
either. Experts are one tensor of all of them in memory, and mostly one each in files.

`PREFIXES` is by architecture, `PARTS` by the ``model_type`` of a config or of its text model.

Source: huggingface/transformers src/transformers/{conversion_mapping,core_model_loading}.py
@ v5.23.0; the tests hold the tables against it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ckptx.errors import SchemaError
from ckptx.tensors.joins import concat, stack, unstacked
from ckptx.tensors.lazy import LazyTensor


class Names(NamedTuple):
    """The beginning or the end of a name, in memory and in files."""

    memory: str
    files: str


@dataclass(frozen=True, slots=True)
class Experts:
    """Experts called ``memory`` and ``gate_up_proj`` or ``down_proj``, in files one by one."""

    memory: str = ".mlp.experts."
    files: str = ".mlp.experts."
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True, slots=True)
class Parts:
    """How the modules in the layers of a kind of model are called."""

    experts: Experts | None = None
    ends: tuple[Names, ...] = ()


_TOWERS = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model")
"""Vision towers that have ``vision_model.`` before their names in files, and no more in memory."""

_LANGUAGE = (
    Names("lm_head.", "language_model.lm_head."),
    Names("model.language_model.", "language_model.model."),
)


def _composed(*modules: str) -> tuple[Names, ...]:
    return (*_LANGUAGE, *(Names(f"model.{module}", module) for module in modules))


_LLAVA = _composed("vision_tower.", "multi_modal_projector.")
_QWEN_VL = (Names("model.visual.", "visual."), Names("model.language_model.", "model."))
_CONDITIONAL: Mapping[str, tuple[Names, ...]] = {
    "Llava VipLlava PaliGemma Gemma3 AyaVision InternVL Mistral3 GotOcr2": _LLAVA,
    "LlavaNext LlavaNextVideo LlavaOnevision": (
        *_LLAVA,
        Names("model.image_newline", "image_newline"),
    ),
    "VideoLlava": _composed("image_tower.", "video_tower.", "multi_modal_projector."),
    "Mllama": _composed("vision_model.", "multi_modal_projector."),
    "Qwen2Audio Voxtral VoxtralRealtime GlmAsr": _composed(
        "audio_tower.", "multi_modal_projector."
    ),
    "GraniteSpeech GraniteSpeechPlus": _composed("encoder.", "projector."),
    "Qwen2VL Qwen2_5_VL": _QWEN_VL,
    "Qwen2_5OmniThinker Qwen3OmniMoeThinker": (
        Names("model.audio_tower.", "audio_tower."),
        *_QWEN_VL,
    ),
}
"""By the first words of classes that end in ``ForConditionalGeneration``."""
PREFIXES: Mapping[str, tuple[Names, ...]] = {
    **{
        f"{word}ForConditionalGeneration": names
        for words, names in _CONDITIONAL.items()
        for word in words.split()
    },
    "FuyuForCausalLM": _composed("vision_embed_tokens."),
    "GPTNeoXForCausalLM": (Names("lm_head.", "embed_out."),),
}


def _in_mlp(memory: str, files: str, place: str = ".mlp.") -> Names:
    return Names(f".mlp.{memory}", place + files)


def _mixtral(*pairs: tuple[str, str]) -> Parts:
    place = ".block_sparse_moe."
    experts = Experts(files=f"{place}experts.", gate="w1", up="w3", down="w2")
    return Parts(experts, tuple(_in_mlp(*pair, place) for pair in pairs))


_GATE, _BIAS = ("gate.weight", "gate.weight"), "e_score_correction_bias"
_FEED_FORWARD = (".feed_forward.experts.", ".feed_forward.experts.")
_GRANITE = (
    ("experts.gate_up_proj", "input_linear"),
    ("experts.down_proj", "output_linear"),
    ("router.weight", "router.layer"),
)
_SHARED = (
    _in_mlp(f"shared_experts.{part}.weight", f"shared_mlp.{part}.weight")
    for part in ("gate_proj", "up_proj", "down_proj")
)
_KINDS: Mapping[str, Parts] = {
    """
    qwen2_moe qwen3_moe qwen3_next qwen3_5_moe qwen3_5_moe_text qwen3_omni_moe_thinker
    qwen3_omni_moe_text olmoe flex_olmo deepseek_v2 deepseek_v3 deepseek_v32 dots1 longcat_flash
    glm4_moe glm4_moe_lite glm4v_moe glm4v_moe_text glm_moe_dsa afmoe cohere2_moe hunyuan_v1_moe
    mellum solar_open qwen4_exp qwen4_exp_text
    """: Parts(Experts()),
    "mixtral minimax": _mixtral(_GATE),
    "minimax_m2": _mixtral(_GATE, (_BIAS, _BIAS)),
    "phimoe": _mixtral(("router.weight", "gate.weight")),
    "granitemoe granitemoeshared granitemoehybrid": Parts(
        ends=tuple(
            Names(f".block_sparse_moe.{memory}", f".block_sparse_moe.{files}.weight")
            for memory, files in _GRANITE
        )
    ),
    "jamba": Parts(Experts(*_FEED_FORWARD)),
    "lfm2_moe": Parts(Experts(*_FEED_FORWARD, "w1", "w3", "w2")),
    "ernie4_5_moe": Parts(
        Experts(), (_in_mlp(f"gate.moe_statics.{_BIAS}", f"moe_statics.{_BIAS}"),)
    ),
    "exaone_moe": Parts(Experts(), (_in_mlp(f"gate.{_BIAS}", _BIAS),)),
    "hy_v3": Parts(
        Experts(),
        (_in_mlp(_BIAS, "expert_bias"), _in_mlp("gate.weight", "router.gate.weight"), *_SHARED),
    ),
    "mimo_v2_flash": Parts(
        Experts(), (Names(".self_attn.sinks", ".self_attn.attention_sink_bias"),)
    ),
}
PARTS = {kind: parts for kinds, parts in _KINDS.items() for kind in kinds.split()}

_OTHERS = """
    aria aria_text axk1 axk2 bailing_hybrid cohere2_vision cosmos3_edge cosmos3_omni deepseek_ocr2
    deepseek_v4 deepseek_vl deepseek_vl_hybrid dots3_note dots3_note_text emu3 ernie4_5_vl_moe
    flint gemma3n gemma4_unified glm5_next hrm_text hunyuan_vl hy_v4 hyperclovax_vision_v2 inkling2
    inkling2_text inkling_mm_model kimi_k25 kimi_linear kolibri1 kyutai_speech_to_text laguna
    lfm2_vl lfm3_vl minimax_m3_vl mistral_large4 molmo2 nemo_speechlm nemotron_h nemotron_h_omni
    olmo_hybrid paddleocr_vl pi0 qianfan_ocr qwen2_5_omni qwen3_omni_moe step3p7 t5gemma2
    unlimited_ocr vibevoice_asr vision-encoder-decoder
"""
OTHERS = frozenset(_OTHERS.split())
"""Other ``model_type`` values whose names differ; they are not mapped."""


def in_files(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """Return the tensors under the names that files have; those that have them stay.

    Raises:
        SchemaError: two tensors have one name then, or a fused tensor has no two halves.
    """
    name_in_files, (_, experts, _) = renamer(config), _facts(config)
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        for own, part in _apart(name_in_files(name), tensor, experts):
            _put(found, own, part, name)
    return found


def renamer(config: Mapping[str, Any]) -> Callable[[str], str]:
    """Return what gives the name in files of one tensor; experts that are together stay so.

    Examples:
        >>> config = {"architectures": ["Qwen2VLForConditionalGeneration"]}
        >>> renamer(config)("model.language_model.norm.weight")
        'model.norm.weight'
    """
    prefixes, _, ends = _facts(config)

    def name_in_files(name: str) -> str:
        return _replaced_end(_replaced_start(name, prefixes), ends)

    return name_in_files


def in_memory(
    tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]
) -> dict[str, LazyTensor]:
    """Return the tensors under the names that a model of transformers 5 has for them.

    Raises:
        SchemaError: two tensors have one name then, or some experts of a layer are missing.
    """
    prefixes, experts, ends = _facts(config)
    known = tuple(names.memory for names in prefixes)
    # The longest name of files says most; of several in memory the last is today's.
    starts = [(n.files, n.memory) for n in reversed(prefixes)]
    starts.sort(key=lambda pair: -len(pair[0]))
    found: dict[str, LazyTensor] = {}
    for name, tensor in _together(tensors, experts).items():
        plain = _replaced_end(name, [(n.files, n.memory) for n in ends])
        if not plain.startswith(known):
            plain = _replaced_start(plain, starts)
        _put(found, plain, tensor, name)
    return found


def differs(config: Mapping[str, Any]) -> bool:
    """Return whether transformers 5 has other names in memory that no table here knows."""
    return any(kind in OTHERS for kind in _kinds(config))


def remarks(
    memory: Mapping[str, LazyTensor],
    files: Mapping[str, LazyTensor],
    config: Mapping[str, Any],
    *,
    changed: str,
    kept: str,
) -> tuple[str, ...]:
    """Return what a user should know of two sets of names that came from one another.

    ``changed`` and ``kept`` say what became of names that have two forms, and of those of models
    that may have another one in memory which no table here knows.
    """
    others = [name for name in memory if name not in files]
    if others:
        return (
            f"{len(others)} tensors have the names of transformers 5 in memory, as "
            f"{others[0]!r}; {changed}",
        )
    if differs(config):
        return (
            f"{config.get('model_type')}: transformers may have other names in memory than in "
            f"files; {kept}",
        )
    return ()


def _facts(config: Mapping[str, Any]) -> tuple[list[Names], list[Experts], list[Names]]:
    prefixes: list[Names] = []
    for architecture in (config.get("architectures") or [])[:1]:
        for names in PREFIXES.get(architecture, ()):
            if names.files.endswith("_tower.") and _tower(config) in _TOWERS:
                longer = f"{names.files}vision_model."
                # Before 5.0 they had it in memory, too.
                prefixes += (
                    Names(f"{names.memory}vision_model.", longer),
                    Names(names.memory, longer),
                )
            prefixes.append(names)
    parts = [PARTS[kind] for kind in dict.fromkeys(_kinds(config)) if kind in PARTS]
    experts = list(dict.fromkeys(part.experts for part in parts if part.experts))
    return prefixes, experts, list(dict.fromkeys(n for part in parts for n in part.ends))


def _kinds(config: Mapping[str, Any]) -> Iterator[str]:
    text = config.get("text_config")
    for said in (config, text if isinstance(text, Mapping) else {}):
        yield str(said.get("model_type"))


def _tower(config: Mapping[str, Any]) -> Any:
    vision = config.get("vision_config")
    return vision.get("model_type") if isinstance(vision, Mapping) else None


def _replaced_start(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    for old, new in pairs:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _replaced_end(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    for old, new in pairs:
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _put(found: dict[str, LazyTensor], name: str, tensor: LazyTensor, before: str) -> None:
    if name in found:
        raise SchemaError(f"{before!r} and another tensor are both {name!r} in transformers")
    found[name] = tensor


def _apart(name: str, tensor: LazyTensor, kinds: list[Experts]) -> Iterator[tuple[str, LazyTensor]]:
    """Yield a tensor, or those of its experts if it holds all of them."""
    for kind in kinds:
        prefix = name.rpartition(kind.memory)[0] + kind.files
        if name.endswith(f"{kind.memory}down_proj") and len(tensor.shape) == 3:
            for number, own in enumerate(unstacked(tensor)):
                yield f"{prefix}{number}.{kind.down}.weight", own.squeeze()
            return
        if name.endswith(f"{kind.memory}gate_up_proj") and len(tensor.shape) == 3:
            half, odd = divmod(tensor.shape[1], 2)
            if odd:
                raise SchemaError(f"{name!r} has {tensor.shape[1]} rows, gate and up have halves")
            gates = unstacked(tensor.narrow(1, 0, half))
            ups = unstacked(tensor.narrow(1, half, 2 * half))
            for number, (gate, up) in enumerate(zip(gates, ups, strict=True)):
                yield f"{prefix}{number}.{kind.gate}.weight", gate.squeeze()
                yield f"{prefix}{number}.{kind.up}.weight", up.squeeze()
            return
    yield name, tensor


def _together(tensors: Mapping[str, LazyTensor], kinds: list[Experts]) -> dict[str, LazyTensor]:
    """Return the tensors with all experts of a layer in one, where the first of them was."""
    found = dict(tensors)
    for kind in kinds:
        parts = "|".join(map(re.escape, (kind.gate, kind.up, kind.down)))
        own = re.compile(rf"(.+){re.escape(kind.files)}(\d+)\.({parts})\.weight")
        layers: dict[str, dict[str, dict[int, str]]] = {}
        for name in tensors:
            if match := own.fullmatch(name):
                layer, number, part = match.groups()
                layers.setdefault(layer, {}).setdefault(part, {})[int(number)] = name
        fused: dict[str, tuple[str, LazyTensor]] = {}
        for layer, held in layers.items():
            stacked = {part: _stacked(names, tensors) for part, names in held.items()}
            if set(stacked) != {kind.gate, kind.up, kind.down}:
                raise SchemaError(
                    f"the experts of {layer + kind.files!r} lack {kind.gate}, {kind.up} or "
                    f"{kind.down}"
                )
            pair = concat([stacked[kind.gate], stacked[kind.up]], 1)
            first = held[kind.gate][0], held[kind.down][0]
            fused[first[0]] = f"{layer}{kind.memory}gate_up_proj", pair
            fused[first[1]] = f"{layer}{kind.memory}down_proj", stacked[kind.down]
        taken = {n for held in layers.values() for names in held.values() for n in names.values()}
        found = dict(
            fused.get(name, (name, tensor))
            for name, tensor in found.items()
            if name in fused or name not in taken
        )
    return found


def _stacked(names: Mapping[int, str], tensors: Mapping[str, LazyTensor]) -> LazyTensor:
    absent = [number for number in range(max(names) + 1) if number not in names]
    if absent:
        raise SchemaError(f"{names[max(names)]!r} is there, expert {absent[0]} is not")
    return stack([tensors[names[number]] for number in range(len(names))])
