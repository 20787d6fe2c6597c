"""BERT's layouts through the kit, and its config."""

from __future__ import annotations

import pytest

from ckptx.errors import SchemaError
from ckptx.registry import registry
from ckptx.testing.families import SchemaTests
from ckptx.testing.models import TinyModel

BERT = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 8,
    "vocab_size": 48,
    "max_position_embeddings": 16,
}
KINDS = ("MegatronBertForPreTraining", "MegatronBertForMaskedLM")


def _bert(**changes):
    family = registry.families()["megatron-bert"]
    return TinyModel("bert", family.from_config({**BERT, **changes}))


class TestBert(SchemaTests):
    families = (registry.families()["megatron-bert"],)
    models = tuple(_bert(architectures=[kind], type_vocab_size=3) for kind in KINDS)


@pytest.mark.parametrize("key", ["is_decoder", "add_cross_attention"])
def test_a_decoder_is_refused(key):
    with pytest.raises(SchemaError, match=key):
        _bert(**{key: True})


def test_config_of_a_spec_is_the_config():
    family = registry.families()["megatron-bert"]
    config = {**BERT, "architectures": [KINDS[1]], "type_vocab_size": 3, "hidden_act": "gelu_new"}
    written = family.to_config(family.from_config(config))
    assert written["model_type"] == "megatron-bert"
    assert {key: written[key] for key in config} == config
