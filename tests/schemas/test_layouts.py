"""Every registered layout through the kit."""

from __future__ import annotations

from ckptx.registry import registry
from ckptx.testing.families import SchemaTests
from ckptx.testing.models import MIXTURES, MODELS, OLMOE, TinyModel, tiny

from .dense import CONFIGS
from .latent import CONFIGS as LATENT
from .named import spec_from_config


class TestLayouts(SchemaTests):
    # Models of several parts are in test_llava_layouts.py.
    families = tuple(
        family
        for family in registry.families().values()
        if family.layouts and family.name != "megatron-bert" and family.composition is None
    )
    models = (
        *MODELS,
        *MIXTURES,
        OLMOE,
        tiny("gpt"),
        tiny("gpt", num_experts=4, moe_ffn_hidden_size=24, activation="swiglu"),
        tiny("gpt", tied=True, position_embedding_type="rope", activation="swiglu"),
        tiny("gpt", qk_layernorm=True, add_bias_linear=False, add_qkv_bias=True),
        *(
            TinyModel(n, spec_from_config(config, family))
            for n, (family, config) in {**CONFIGS, **LATENT}.items()
        ),
    )
