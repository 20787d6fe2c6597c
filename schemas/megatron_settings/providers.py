"""Models as Megatron-Bridge and NeMo 2 describe them, and Megatron's ``args``, in both directions.

They dump a *provider*: a TransformerConfig with what GPTModel takes besides. Most of its fields
have the names of args. What is no plain value is a dictionary whose ``_target_`` names a class or
a function; here that is text, and nothing is imported.

Source: NVIDIA-NeMo/Megatron-Bridge src/megatron/bridge/models/gpt_provider.py,
models/*/*_provider.py, training/model_load_save.py @ v0.3.1; NVIDIA-NeMo/NeMo
nemo/collections/llm/gpt/model/*.py @ v2.4.0; NVIDIA/Megatron-LM megatron/core/transformer/
{mlp,transformer_config}.py @ core_v0.16.1.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ckptx.errors import SchemaError, listing
from ckptx.model.family import Family
from ckptx.registry.families import family_named, note_of
from ckptx.schemas.megatron_settings import activations
from ckptx.schemas.megatron_settings.activations import FUSION, GATED
from ckptx.schemas.megatron_settings.rope_scaling import LLAMA3_CONSTANTS
from ckptx.schemas.megatron_settings.settings import known

RENAMED = {
    "num_moe_experts": "num_experts",
    "seq_length": "max_position_embeddings",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
}
"""Arguments by the field that says the same."""
_HARMLESS = {
    *("_target_", "bias_dropout_add_fusion", "data_step_fn", "forward_step_fn"),
    *("generation_config", "hf_model_id", "scale_factor"),
    *("hf_model_revision", "logit_dtype", "mtp_enabled", "parallel_output"),
    *("scatter_embedding_sequence_parallel", "share_embeddings_and_output_weights"),
    *("should_pad_vocab", "transformer_layer_spec", "use_arbitrary_attention_mask"),
}
"""Fields of a GPTModel's provider that are read here, or change nothing."""
_LLAMA3 = {
    "low_freq_factor": LLAMA3_CONSTANTS["low_freq_factor"],
    "high_freq_factor": LLAMA3_CONSTANTS["high_freq_factor"],
    "old_context_len": LLAMA3_CONSTANTS["original_max_position_embeddings"],
}
"""What NeMo's Llama 3.1 has as fields, besides its ``scale_factor``, and Megatron has fixed."""
_CLASS = re.compile(r"(\w+?)(?:Model)?(?:Provider|Config)\w*")
_MODELS = re.compile(
    r"GPT|MLA|(Code)?Llama(2|3|31|32)?|Mistral(NeMo)?|Mixtral|Qwen(2|25|3)(MoE)?|Phi3|GLM45|OlMoE|"
    r"DeepSeek(V2|V2Lite|V3)?|Moonlight|Kimi(K2)?|Starcoder2?|Nemotron[34]?"
)
"""How the classes begin that make the GPT model which their fields say, and nothing more."""
_SCALING = {"Gemma": "gemma", "CodeGemma": "gemma"}
"""How the classes begin that scale the embedding, and the family that does so."""
_SPECS = re.compile(
    r"(default|transformer_engine|local|olmoe)_layer_spec|"
    r"get_gpt_(decoder_block|layer_with_transformer_engine|layer_local)_spec"
)
"""Functions that make the layers which the fields say."""
_BRIDGE = "megatron.bridge.models."
_GPT = f"{_BRIDGE}gpt_provider.GPTModelProvider"
_SPEC = {
    "_target_": "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec",
    "_partial_": True,
    "use_transformer_engine": True,
}
_SAID = (
    *("attention_dropout", "hidden_dropout", "position_embedding_type", "rotary_base"),
    *("rotary_percent", "rope_scaling_factor", "make_vocab_size_divisible_by"),
    *("moe_grouped_gemm", "moe_token_dispatcher_type", "tensor_model_parallel_size"),
    *("pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"),
    *("pipeline_model_parallel_layout", "expert_model_parallel_size"),
    *("expert_tensor_parallel_size", "context_parallel_size"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
)
"""Arguments that a provider has by the same name, besides those that say the architecture."""


def from_provider(fields: Mapping[str, Any], accepted: Collection[str] = ()) -> dict[str, Any]:
    """Return a provider's fields as Megatron's ``args``; ``accepted`` are read as if not there.

    Raises:
        SchemaError: the class, its layers, its activation or a field is of unknown effect.

    Examples:
        >>> args = from_provider({"_target_": "x.GPTModelProvider", "num_moe_experts": 4})
        >>> args["num_experts"], args["untie_embeddings_and_output_weights"]
        (4, False)
    """
    said = {name: value for name, value in fields.items() if name not in accepted}
    _check(said)
    args = {
        name: value
        for name, value in said.items()
        if name in known() and not (isinstance(value, Mapping) and known()[name].is_harmless)
    }
    args |= {name: fields[name] for name in accepted if name in fields}
    # Up to core 0.13 the field is what YaRN stretches, and nothing says the model's own.
    args.setdefault("original_max_position_embeddings", said.get("max_position_embeddings"))
    args |= {name: said[field] for field, name in RENAMED.items() if field in said}
    if factor := said.get("scale_factor"):
        args |= {"use_rope_scaling": True, "rope_scaling_factor": factor}
    groups, heads = said.get("num_query_groups"), said.get("num_attention_heads")
    layout = said.get("pipeline_model_parallel_layout")
    args |= {
        "untie_embeddings_and_output_weights": not said.get(
            "share_embeddings_and_output_weights", True
        ),
        "group_query_attention": groups not in (None, heads),
        "params_dtype": _target(said.get("params_dtype")) or "float32",
        "pipeline_model_parallel_layout": layout if isinstance(layout, str) else None,
        **_activation(said),
    }
    args.pop("activation_func", None)
    if family := _SCALING.get(_stem(said)):
        args["ckptx"] = note_of(family_named(family))
    return args


def to_provider(args: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return ``args`` as the fields of the class of Bridge that makes a family's model.

    Raises:
        SchemaError: none does.
    """
    if family.composition or not family.megatron.decoder:
        raise SchemaError(f"no class of Megatron-Bridge is known to make a {family.name} model")
    dtype = str(getattr(args["params_dtype"], "name", args["params_dtype"]))
    target = _GPT
    if family.name in _SCALING.values():
        target = f"{_BRIDGE}gemma.gemma_provider.GemmaModelProvider"
    elif args.get("multi_latent_attention"):
        target = f"{_BRIDGE}mla_provider.MLAModelProvider"
    of_model = [
        name
        for name, value in args.items()
        if name in known() and known()[name].is_field and not known()[name].is_harmless
    ]
    fields = {name: args.get(name) for name in (*of_model, *_SAID)}
    fields |= {field: args.get(name) for field, name in RENAMED.items()}
    for name in (FUSION, "max_position_embeddings"):
        fields.pop(name, None)
    return {
        "_target_": target,
        **{name: value for name, value in fields.items() if value is not None},
        **_function_of(activations.from_args(args)),
        "share_embeddings_and_output_weights": not args["untie_embeddings_and_output_weights"],
        "vocab_size": args["vocab_size"] or args["padded_vocab_size"],
        "should_pad_vocab": args["vocab_size"] is not None,
        "sequence_parallel": bool(args.get("num_experts"))
        and args["tensor_model_parallel_size"] > 1,
        "params_dtype": _callable(f"torch.{dtype.removeprefix('torch.')}"),
        **({"transformer_layer_spec": _SPEC} if args.get("num_experts") else {}),
    }


def _check(fields: Mapping[str, Any]) -> None:
    """Raise unless a GPT model is all that a provider makes of its fields."""
    stem = _stem(fields)
    if not _MODELS.fullmatch(stem) and stem not in _SCALING:
        raise SchemaError(
            f"the model is made by {fields.get('_target_')!r}, and what that class computes "
            "besides is not known; if it is a plain GPT model, give --accept-arg _target_"
        )
    layers = fields.get("transformer_layer_spec")
    if layers is not None and not _SPECS.fullmatch(_target(layers).rpartition(".")[2]):
        raise SchemaError(
            f"the layers are made by {_target(layers) or layers!r} (transformer_layer_spec), and "
            "what they compute is not known; if they are those of a plain GPT model, give "
            "--accept-arg transformer_layer_spec"
        )
    ours = _HARMLESS | RENAMED.keys() | known().keys()
    said = {name for name, value in fields.items() if value and _LLAMA3.get(name) != value}
    if unknown := sorted(said - ours):
        raise SchemaError(
            f"{fields.get('_target_')} has {listing(unknown)}, which no release of Megatron has: "
            "whether the weights compute the same without is not known; --accept-arg NAME reads "
            "the checkpoint as if it were not there"
        )


def _stem(fields: Mapping[str, Any]) -> str:
    if "_target_" not in fields:
        return "GPT"
    match = _CLASS.fullmatch(str(fields["_target_"]).rpartition(".")[2])
    return match[1] if match else ""


def _target(value: Any) -> str:
    """Return the name of a class or a function, empty for anything else."""
    named = value.get("_target_") if isinstance(value, Mapping) else value
    return named if isinstance(named, str) else ""


def _callable(target: str) -> dict[str, Any]:
    return {"_target_": target, "_call_": False}


def _activation(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the switches of ``args`` for a function and what surrounds it.

    Raises:
        SchemaError: Megatron's args cannot say them.
    """
    function = fields.get("activation_func")
    name, gated = _target(function).rpartition(".")[2] or "gelu", bool(fields.get(GATED))
    given = {*function} - {"_target_", "_call_", "_partial_", "_args_"} if function else set()
    tanh = isinstance(function, Mapping) and function.get("approximate") == "tanh"
    switches = {("silu", True): "swiglu", ("quick_gelu", True): "quick_geglu"}
    switch = {**switches, ("squared_relu", False): "squared_relu"}.get((name, gated))
    if given - {"approximate"} or not (switch or name in ("gelu", "fast_gelu", "openai_gelu")):
        raise SchemaError(
            f"activation_func {_target(function) or function!r}, {GATED} {gated}: Megatron's args "
            "cannot say it; --accept-arg activation_func takes it for gelu"
        )
    fused = bool(fields.get("bias_activation_fusion"))
    return {
        GATED: gated,
        **({switch: True} if switch else {FUSION: fused or tanh or name != "gelu"}),
    }


def _function_of(activation: str) -> dict[str, Any]:
    """Return the fields for an activation."""
    core = "megatron.core.activations."
    functions = {
        "swiglu": "torch.nn.functional.silu",
        "squared_relu": f"{core}squared_relu",
        "quick_geglu": f"{core}quick_gelu",
    }
    tanh = activation.endswith("_tanh")
    target = functions.get(activation, f"{core}fast_gelu" if tanh else "torch.nn.functional.gelu")
    return {"activation_func": _callable(target), GATED: "glu" in activation}
