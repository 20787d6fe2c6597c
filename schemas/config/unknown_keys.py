"""Keys of a ``config.json`` that neither its family nor any `PreTrainedConfig` has, and defaults.

A fork's own key may change what the weights compute, and so may a misspelt one; transformers' own
class passes over both. What is listed here is known to be harmless, and nothing else is.

Source: huggingface/transformers src/transformers/configuration_utils.py @ v4.57.1 and @ v5.23.0;
the models' configuration_*.py @ v5.23.0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ckptx.schemas.config import rotary
from ckptx.schemas.config.traits import LLAMA_DEFAULTS, ConfigTable

_PRETRAINED = """
    _attn_implementation _commit_hash _experts_implementation _flash_attn_2_enabled
    _name_or_path add_cross_attention architectures attn_implementation auto_map bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing head_dim id2label is_decoder
    is_encoder_decoder label2id length_penalty max_length min_length model_type
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    pruned_heads quantization_config remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
"""
_MODELS = """
    aux_loss_alpha cache_implementation classifier_dropout embd_pdrop embedding_dropout ep_size
    hidden_dropout initializer_range mtp_loss_weight n_ctx output_router_logits pretraining_tp
    qk_head_dim resid_pdrop residual_dropout router_aux_loss_coef router_jitter_noise seq_aux
    summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj unsloth_fixed unsloth_version
"""
"""Training, caches, heads that have tensors of their own, and what trainers leave behind."""
_HARMLESS = frozenset(_PRETRAINED.split() + _MODELS.split())
_ROTARY = {"rope_scaling", "rope_parameters"}
_WINDOWS = {"sliding_window", "layer_types", "use_sliding_window", "max_window_layers"}
ALIASED = ("hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings")
"""Llama's words that every config class understands, whatever its own are."""
_ASSUMED = (
    *("hidden_act", "max_position_embeddings", "rms_norm_eps", "num_attention_heads"),
    *("num_experts_per_tok", "routed_scaling_factor"),
)
"""Llama's and the mixtures' keys that no weight tells."""


def unknown_among(config: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Return the keys of a config, with their values, of which nothing is known; null says nothing.

    ``known`` are those that something reads.
    """
    return {
        key: value
        for key, value in config.items()
        if key not in known and key not in _HARMLESS and value is not None
    }


def unknown_keys(config: Mapping[str, Any], table: ConfigTable) -> dict[str, Any]:
    """Return the keys of a decoder's config of which nothing is known.

    Examples:
        >>> unknown_keys({"residual_multiplier": 0.5, "use_cache": True}, ConfigTable("Llama"))
        {'residual_multiplier': 0.5}
    """
    experts = table.experts
    of_experts = (
        {experts.count, experts.ffn, *experts.spellings, *experts.defaults, *experts.only}
        if experts
        else set()
    )
    # Where a family has no key for one of Llama's, the shapes of weights contradict another value.
    own = {table.names.get(name) or name for name in LLAMA_DEFAULTS}
    renamed = {name for name, key in table.names.items() if key}
    known = {
        *own,
        *ALIASED,
        *(table.defaults.keys() - renamed),
        *table.bias_keys,
        *table.dropouts,
        *table.passthrough_keys,
        *(key for key, _ in table.fields),
        *((*_ROTARY, *table.rotary_keys) if table.position_embedding_type == "rope" else ()),
        *(_WINDOWS if table.windows != "none" else ()),
        *of_experts,
    }
    found = unknown_among(config, known)
    return {key: value for key, value in found.items() if value != table.harmless.get(key)}


def assumed_values(config: Mapping[str, Any], table: ConfigTable) -> dict[str, Any]:
    """Return the values that a config leaves to the defaults of its class and no weight tells."""
    defaults = {**table.defaults, **(table.experts.defaults if table.experts else {})}
    keys = [key for name in _ASSUMED if (key := table.key(name)) is not None]
    found = {key: defaults.get(key) for key in keys if config.get(key) is None}
    found |= rotary.assumed(config, table)
    said = {key: value for key, value in found.items() if value is not None}
    return {key: f"{v:g}" if isinstance(v, float) else v for key, v in said.items()}
