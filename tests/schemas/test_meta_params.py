"""``params.json`` and the spec, with numbers that Meta and Mistral have published."""

from __future__ import annotations

from typing import Any

import pytest

from ckptx.errors import SchemaError
from ckptx.schemas.conventions.meta import feed_forward_size, params_from_spec, spec_from_params

from .named import spec_from_config

SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

PUBLISHED: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    # The file, the rows of the embedding, and what the published config.json says.
    "llama-7b": (
        {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06}
        | {"vocab_size": -1},
        32000,
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    ),
    "llama2-13b": (
        {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-05}
        | {"vocab_size": -1},
        32000,
        {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
        | {"num_attention_heads": 40, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    ),
    "llama2-70b": (
        {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64}
        | {"n_kv_heads": 8, "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1},
        32000,
        {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
        | {"num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
        | {"max_position_embeddings": 4096},
    ),
    "llama3-8b": (
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256}
        | {"multiple_of": 1024, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05}
        | {"rope_theta": 500000.0},
        128256,
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
        | {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 8192},
    ),
    "llama3.1-8b": (
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256}
        | {"multiple_of": 1024, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05}
        | {"rope_theta": 500000.0, "use_scaled_rope": True},
        128256,
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
        | {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072}
        | {"rope_scaling": SCALING},
    ),
    "llama3.2-1b": (
        {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256}
        | {"multiple_of": 256, "ffn_dim_multiplier": 1.5, "norm_eps": 1e-05}
        | {"rope_theta": 500000.0, "use_scaled_rope": True},
        128256,
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
        | {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072}
        | {"rope_scaling": SCALING | {"factor": 32.0}},
    ),
    "mistral-7b-v0.1": (
        {"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32}
        | {"n_kv_heads": 8, "norm_eps": 1e-05, "sliding_window": 4096, "vocab_size": 32000},
        32000,
        {"model_type": "mistral", "intermediate_size": 14336, "num_key_value_heads": 8}
        | {"rms_norm_eps": 1e-5, "sliding_window": 4096, "max_position_embeddings": 32768},
    ),
    "mistral-7b-v0.3": (
        {"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32}
        | {"n_kv_heads": 8, "norm_eps": 1e-05, "vocab_size": 32768, "rope_theta": 1000000.0},
        32768,
        {"model_type": "mistral", "intermediate_size": 14336, "num_key_value_heads": 8}
        | {"rms_norm_eps": 1e-5, "sliding_window": None, "max_position_embeddings": 32768}
        | {"vocab_size": 32768, "rope_theta": 1000000.0},
    ),
}


def ffn_of(params: dict[str, Any]) -> int:
    return params.get("hidden_dim") or feed_forward_size(params)


@pytest.mark.parametrize("name", PUBLISHED)
def test_params_say_what_the_published_config_says(name):
    params, rows, config = PUBLISHED[name]
    expected = spec_from_config(config | {"dtype": "bfloat16"}, config.get("model_type", "llama"))
    assert spec_from_params(params, rows=rows, ffn=expected.ffn_hidden_size) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_params_come_back_as_they_were(name):
    params, rows, _ = PUBLISHED[name]
    spec = spec_from_params(params, rows=rows, ffn=ffn_of(params))
    by_width = rows == 32000
    back = params_from_spec(spec, by_width=by_width)
    expected = params | {"vocab_size": rows}
    if name.startswith("mistral"):
        expected.setdefault("rope_theta", 10000.0)
    assert back == expected


@pytest.mark.parametrize("dim", [48, 64, 2048, 4096, 5120])
def test_any_feed_forward_size_is_said(dim):
    for ffn in (16, 17, 100, dim, 2 * dim + 6, 3 * dim, 4 * dim, 5 * dim + 1, 10240, 53248):
        config = {"hidden_size": dim, "intermediate_size": ffn, "num_attention_heads": 8}
        spec = spec_from_config(config | {"vocab_size": 100}, "llama")
        params = params_from_spec(spec, by_width=False)
        # As Meta's FeedForward computes it.
        size = int(2 * (4 * dim) / 3)
        if "ffn_dim_multiplier" in params:
            size = int(params["ffn_dim_multiplier"] * size)
        multiple = params["multiple_of"]
        assert multiple * ((size + multiple - 1) // multiple) == ffn
        assert spec_from_params(params, rows=100, ffn=ffn).ffn_hidden_size == ffn


LLAMA3 = PUBLISHED["llama3-8b"][0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"multiple_of": 4096}, "feed-forward layer of 16384 rows, the shards hold 14336"),
        ({"ffn_dim_multiplier": None}, "feed-forward layer of 11264 rows, the shards hold 14336"),
        ({"vocab_size": 32000}, "vocab_size is 32000, the shards hold 128256 rows"),
        ({"dim": None}, "does not say dim"),
        ({"n_heads": 33}, "dim 4096 does not divide over n_heads 33"),
        ({"head_dim": 64}, "head_dim 64 is not dim / n_heads"),
        ({"n_layers": "32"}, "n_layers is '32', expected a number above 0"),
        ({"n_kv_heads": 0}, "n_kv_heads is 0"),
        ({"norm_eps": "small"}, "norm_eps is 'small'"),
        ({"moe": {"num_experts": 8}}, "'moe', which ckptx does not know"),
        ({"vision_num_cross_attention_layers": 8}, "does not know"),
        ({"quantization_args": {"scheme": "fp8"}}, "does not know"),
        ({"sliding_window": [4096, None]}, "sliding_window is"),
    ],
)
def test_params_that_cannot_be_are_one_line(change, said):
    with pytest.raises(SchemaError, match=said) as error:
        spec_from_params(LLAMA3 | change, rows=128256, ffn=14336)
    assert "\n" not in str(error.value)


def test_keys_that_say_nothing_are_no_matter():
    more = {"max_batch_size": 32, "moe": None, "use_biases": False, "lora_args": {}}
    plain = spec_from_params(LLAMA3, rows=128256, ffn=14336)
    assert spec_from_params(LLAMA3 | more, rows=128256, ffn=14336) == plain


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        ("llama", {"attention_bias": True}, "biases"),
        ("llama", {"head_dim": 64}, "heads of 64 rows"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rotary scaling"),
        ("llama", {"rope_scaling": SCALING | {"low_freq_factor": 2.0}}, "rotary scaling"),
        ("mistral", {"rope_scaling": SCALING}, "rotary scaling"),
        ("qwen3", {}, "norms of query and key"),
    ],
)
def test_what_metas_model_is_not_is_refused(family, config, said):
    with pytest.raises(SchemaError, match=f"Meta's model does not have: .*{said}"):
        params_from_spec(spec_from_config(config, family), by_width=False)
