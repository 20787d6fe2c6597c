"""Configs of DeepSeek's families, transformers' own classes on the other side."""

from __future__ import annotations

import pytest
import transformers

from ckptx.errors import SchemaError
from ckptx.schemas.megatron_settings.args import spec_from_args

from .latent import CONFIGS
from .megatron import args_of
from .named import config_from_spec, differences, merge_config, spec_from_config

CLASSES = {
    "deepseek_v2": transformers.DeepseekV2Config,
    "deepseek_v3": transformers.DeepseekV3Config,
}
YARN = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_left_out_is_what_transformers_takes(name):
    family, values = CONFIGS[name]
    said = spec_from_config(values, family)
    whole = CLASSES[family](**values).to_dict()
    assert spec_from_config(whole, family) == said
    assert differences(whole | {"architectures": [said.architecture]}, said) == []


def test_defaults_are_those_of_the_classes():
    for family, config in CLASSES.items():
        own = {"num_experts_per_tok": 6}
        found = spec_from_config(own, family)
        assert found == spec_from_config(config(**own).to_dict(), family)


@pytest.mark.parametrize("scaling", [None, YARN, {"type": "linear", "factor": 2.0}], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_configs_and_args_come_back(name, scaling):
    family, values = CONFIGS[name]
    spec = spec_from_config({**values, "rope_scaling": scaling}, family)
    assert spec_from_config(config_from_spec(spec), family) == spec
    assert spec_from_args(args_of(spec)) == spec


def test_published_keys_of_the_code_beside_the_weights():
    """DeepSeek's own modeling file reads keys that transformers does not know."""
    family, values = CONFIGS["deepseek_v3"]
    written = config_from_spec(spec_from_config(values, family))
    expected = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
    assert expected.items() <= written.items()


def test_megatron_wins_over_a_config():
    family, values = CONFIGS["deepseek_v3"]
    spec = spec_from_config(values, family)
    config = config_from_spec(spec) | {"n_group": 2, "routed_scaling_factor": 1.0}
    assert sorted(differences(config, spec)) == [
        "n_group: config 2, source args 4",
        "routed_scaling_factor: config 1, source args 2.5",
    ]
    assert spec_from_config(merge_config(config, spec), family) == spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 of n_routed_experts 8"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False"),
    ],
)
def test_what_is_not_known_is_refused(changes, message):
    family, values = CONFIGS["deepseek_v3"]
    with pytest.raises(SchemaError, match=message):
        spec_from_config(values | changes, family)
