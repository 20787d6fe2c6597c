from pathlib import Path

import pytest
from ckptx_granite import FAMILY

from ckptx.errors import SchemaError
from ckptx.registry import registry
from ckptx.testing.conversion import convert
from ckptx.testing.families import SchemaTests
from ckptx.testing.models import read_safetensors

NEUTRAL = {
    "model_type": "granite",
    "architectures": ["GraniteForCausalLM"],
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "attention_multiplier": 0.25,  # heads of 16: their square root, inverted
}
GRANITE_3 = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.015625,
}


class TestGranite(SchemaTests):
    families = (FAMILY,)
    configs = (
        NEUTRAL,
        {**NEUTRAL, "tie_word_embeddings": True, "num_key_value_heads": 1},
        {**NEUTRAL, "attention_bias": True, "mlp_bias": True},
        {**NEUTRAL, "rope_theta": 10000000.0, **GRANITE_3},
    )


@pytest.mark.parametrize("factor", GRANITE_3)
def test_a_factor_is_refused_by_name(factor, tmp_path):
    source = TestGranite().write(tmp_path / "source", {**NEUTRAL, factor: GRANITE_3[factor]})
    with pytest.raises(SchemaError, match=f"GraniteForCausalLM with {factor}="):
        convert(registry.loader("hf"), source, registry.saver("core"), tmp_path / "core")


@pytest.mark.parametrize("name", ["hf", "dcp", "pytorch"])
def test_other_formats_take_any_factor(name, tmp_path):
    source = TestGranite().write(tmp_path / "source", {**NEUTRAL, **GRANITE_3})
    hf = registry.loader("hf"), registry.saver("hf")
    other = convert(hf[0], source, registry.saver(name), tmp_path / name)
    back = convert(registry.loader(name), Path(other), hf[1], tmp_path / "back")
    assert read_safetensors(back) == read_safetensors(source)
