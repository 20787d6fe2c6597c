"""The names of memory against transformers: what a state dict holds, what is saved of it."""

from __future__ import annotations

import math

import pytest

from ckptx.errors import SchemaError
from ckptx.schemas.conventions.transformers_memory import (
    OTHERS,
    PARTS,
    PREFIXES,
    differs,
    in_files,
    in_memory,
)
from ckptx.storage.gather import read
from ckptx.storage.open_files import Files
from ckptx.tensors.lazy import stored

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: E402
from transformers.core_model_loading import (  # noqa: E402
    PrefixChange,
    revert_weight_conversion,
)
from transformers.models.auto import modeling_auto  # noqa: E402

SMALL = {"num_hidden_layers": 2, "num_layers": 2, "depth": 2, "encoder_layers": 2}
EXPERTS = (
    *("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
    "zero_expert_num",
)
SETTINGS = {
    "AyaVisionForConditionalGeneration": {"vision_config": {"num_attention_heads": 12}},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 8},
    "Dots1ForCausalLM": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "Lfm2MoeForCausalLM": {
        "layer_types": ["conv", "full_attention"],
        "num_dense_layers": 1,
        "num_hidden_layers": 2,
    },
    "DeepseekV3ForCausalLM": {"first_k_dense_replace": 1},
    "DeepseekV32ForCausalLM": {"first_k_dense_replace": 1},
    "GlmMoeDsaForCausalLM": {"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"]},
}
MODELS = {
    **modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
}
BY_TYPE = {
    kind: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) or MODELS.get(kind)
    for kind in PARTS
}
ARCHITECTURES = sorted({*PREFIXES, *filter(None, BY_TYPE.values())})
EVERY_DAY = {
    *("MixtralForCausalLM", "Qwen3MoeForCausalLM", "GraniteMoeForCausalLM"),
    *("LlavaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
    *("Gemma3ForConditionalGeneration", "Glm4vMoeForConditionalGeneration", "JambaForCausalLM"),
}


def small(config) -> None:
    """Cut a config down to two layers and few experts, and those of its parts."""
    for key, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            small(value)
        elif key in SMALL and isinstance(value, int):
            setattr(config, key, min(value, SMALL[key]))
        elif key in EXPERTS and isinstance(value, int):
            setattr(config, key, min(value, 4))
        elif key in ("layer_types", "mlp_layer_types") and value:
            setattr(config, key, value[:2])


def model_of(architecture: str):
    cls = getattr(transformers, architecture)
    config = cls.config_class(**SETTINGS.get(architecture, {}))
    small(config)
    config.architectures = [architecture]
    with torch.device("meta"):
        return cls(config)


def saved(model, state):
    """What transformers saves of a state dict of a model whose files were published ones."""
    transforms = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [
        one
        for one in transforms
        # A thinker may have been part of a larger model; that says no more than its name.
        if not isinstance(one, PrefixChange)
        or "vision_model" in (one.prefix_to_remove, one.prefix_to_add)
    ] or None
    return revert_weight_conversion(model, dict(state))


def tagged(model):
    """A state dict with the model's names, small shapes, and other numbers in every element."""
    start, state = 0, {}
    for name, tensor in model.state_dict().items():
        shape = (3, 4, 5) if tensor.ndim == 3 and "experts" in name else (2,) * tensor.ndim
        size = math.prod(shape)
        state[name] = torch.arange(start, start + size).reshape(shape)
        start += size
    return state


@pytest.mark.parametrize(
    "architecture",
    [
        name if name in EVERY_DAY else pytest.param(name, marks=pytest.mark.full)
        for name in ARCHITECTURES
    ],
)
def test_files_have_the_names_that_transformers_saves(architecture, tmp_path):
    model = model_of(architecture)
    config = model.config.to_dict()
    state = tagged(model)
    path = tmp_path / "state"
    path.write_bytes(b"".join(tensor.numpy().tobytes() for tensor in state.values()))
    lazy, offset = {}, 0
    for name, tensor in state.items():
        lazy[name] = stored(0, offset, "int64", tensor.shape)
        offset += tensor.nbytes
    expected = saved(model, state)
    assert set(expected) != set(state)
    found = in_files(lazy, config)
    files = Files([str(path)])
    assert same(found, expected, files)
    assert in_files(found, config) == found
    assert same(in_memory(found, config), state, files)
    assert in_memory(lazy, config) == lazy
    files.close()


def same(found, expected, files) -> bool:
    return set(found) == set(expected) and all(
        found[name].shape == tuple(tensor.shape)
        and read(found[name], files).tobytes() == tensor.contiguous().numpy().tobytes()
        for name, tensor in expected.items()
    )


@pytest.mark.full
def test_what_is_not_mapped_is_known():
    known = {*PARTS, *OTHERS}
    unknown = []
    for kind, classes in MODELS.items():
        for architecture in [classes] if isinstance(classes, str) else classes:
            if architecture in PREFIXES or kind in known:
                continue
            try:
                model = model_of(architecture)
            except Exception:  # a default config that builds no model
                continue
            state = tagged(model)
            try:
                if set(saved(model, state)) != set(state):
                    unknown.append(architecture)
            except Exception:  # a shape that the transform cannot take
                unknown.append(architecture)
    assert unknown == []


def test_kinds_that_differ_in_ways_no_table_has_are_told():
    assert differs({"model_type": "deepseek_v4"})
    assert differs({"model_type": "x", "text_config": {"model_type": "nemotron_h"}})
    assert not differs({"model_type": "llama"})
    assert not differs({})


MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}


def test_experts_that_are_missing_are_not_fused():
    names = [
        f"model.layers.0.block_sparse_moe.experts.{e}.w{w}.weight"
        for e in (0, 1)
        for w in (1, 2, 3)
    ]
    whole = {name: stored(0, 8 * n, "int64", (2, 2)) for n, name in enumerate(names)}
    assert len(in_memory(whole, MIXTRAL)) == 2
    with pytest.raises(SchemaError, match=r"experts.1.w1.weight' is there, expert 0 is not"):
        in_memory({name: whole[name] for name in names[1:]}, MIXTRAL)
    with pytest.raises(SchemaError, match="lack w1, w3 or w2"):
        in_memory({name: whole[name] for name in names if ".w2." not in name}, MIXTRAL)


def test_names_that_would_meet_are_refused():
    config = {"architectures": ["LlavaForConditionalGeneration"]}
    pair = ("lm_head.weight", "language_model.lm_head.weight")
    both = {name: stored(0, 0, "int64", (2,)) for name in pair}
    with pytest.raises(SchemaError, match="another tensor are both"):
        in_files(both, config)


def test_a_fused_tensor_has_two_halves():
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(SchemaError, match="has 3 rows"):
        in_files({name: stored(0, 0, "int64", (2, 3, 4))}, MIXTRAL)
