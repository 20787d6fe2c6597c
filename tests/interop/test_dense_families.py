"""Dense families that are not Llama's relatives: real Megatron Core agrees with transformers."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptx.errors import SchemaError
from tests.oracles import hf, mcore
from tests.oracles.mcore import Layout

from .conversion import (
    CLOSE,
    IMPLEMENTATIONS,
    Source,
    convert,
    difference,
    meaning,
    sizes,
    strict_logits,
)

FAMILIES = {
    "gpt2": (hf.gpt2, {}),
    "gpt2-untied-exact": (hf.gpt2, {"tie_word_embeddings": False, "activation_function": "gelu"}),
    "gpt_neox": (hf.gpt_neox, {}),
    "phi3": (hf.phi3, {}),
    "phi3-window": (hf.phi3, {"sliding_window": 5}),
    "gemma": (hf.gemma, {}),
    "gemma-mqa": (hf.gemma, {"num_key_value_heads": 1}),
    "starcoder2": (hf.starcoder2, {}),
    "starcoder2-window": (hf.starcoder2, {"sliding_window": 5, "tie_word_embeddings": False}),
    "glm": (hf.glm, {}),
}
APART = {"gemma2": hf.gemma2, "glm4": hf.glm4, "olmo2": hf.olmo2}
"""What Megatron Core cannot be; converts between formats that keep Hugging Face's names."""
LAYOUTS = {
    "tp1": Layout(),
    "tp2-pp2": Layout(tp=2, pp=2),
    "tp4": Layout(tp=4),
    "pp2-vpp2": Layout(pp=2, vpp=2),
    "pp2-first1": Layout(pp=2, first=1),
}
FULL = pytest.mark.full
FORMATS = ("torch_dist", "torch")
# One for each family, so that every layout, format and spec is met by someone.
SAMPLE = {
    ("gpt2", "tp2-pp2", "torch_dist", "te"),
    ("gpt_neox", "tp2-pp2", "torch", "local"),
    ("phi3", "tp1", "torch_dist", "te"),
    ("gemma", "tp2-pp2", "torch_dist", "te"),
    ("starcoder2", "tp2-pp2", "torch", "local"),
    ("glm", "tp1", "torch", "local"),
}
# Gemma's norms and the masks of windows: Megatron's local spec cannot, or needs a GPU.
ENGINE_ONLY = ("gemma", "gemma-mqa", "phi3-window", "starcoder2-window")


GRID = [
    pytest.param(*case, marks=[] if case in SAMPLE else [FULL])
    for case in itertools.product(FAMILIES, LAYOUTS, FORMATS, IMPLEMENTATIONS)
    if not (case[0] in ENGINE_ONLY and case[3] == "local")
]


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """The model of a family, written once."""
    found = {}

    def make(name):
        if name not in found:
            directory = tmp_path_factory.mktemp(name) / "hf"
            write, overrides = FAMILIES[name] if name in FAMILIES else (APART[name], {})
            found[name] = Source(name, directory, write(directory, **overrides))
        return found[name]

    return make


@pytest.mark.parametrize(("family", "layout", "format", "spec"), GRID)
def test_to_megatron_and_back(family, layout, format, spec, written, tmp_path, record_property):
    source, layout = written(family), LAYOUTS[layout]
    options = {"ckpt_format": format, "saver_transformer_impl": IMPLEMENTATIONS[spec]}
    convert(source.directory, tmp_path / "core", "core", **options, **sizes(layout))
    model = source.megatron(spec, layout)
    found = mcore.read(model, layout, tmp_path / "core", source.tokens, format=format)
    distance = difference(found[..., : source.config.vocab_size], source.logits)
    record_property("distance", distance)
    assert distance <= CLOSE
    convert(tmp_path / "core", tmp_path / "back", "hf")
    before, after = (hf.weights(place) for place in (source.directory, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("family", "layout", "format", "spec"), GRID)
def test_from_megatron(family, layout, format, spec, written, tmp_path, record_property):
    source, layout = written(family), LAYOUTS[layout]
    expected = mcore.write(
        source.megatron(spec, layout),
        layout,
        tmp_path / "core",
        source.tokens,
        format=format,
        args={"vocab_size": source.config.vocab_size},
    )
    # Megatron has no word for Gemma: its config says which model it is. The others' args do.
    base = source.directory if family.startswith("gemma") else None
    convert(tmp_path / "core", tmp_path / "hf", "hf", hf_base=base)
    found = strict_logits(tmp_path / "hf", source.tokens)
    distance = difference(found, expected[..., : source.config.vocab_size])
    record_property("distance", distance)
    assert distance <= CLOSE


@pytest.mark.parametrize(
    "family",
    ["gpt2", "glm", *(pytest.param(n, marks=FULL) for n in ("gpt_neox", "phi3", "starcoder2"))],
)
def test_checkpoint_alone_says_which_model_it_is(family, written, tmp_path):
    source, layout = written(family), Layout(tp=2, pp=2)
    convert(source.directory, tmp_path / "core", "core", **sizes(layout))
    found = mcore.read(None, layout, tmp_path / "core", source.tokens)
    assert difference(found[..., : source.config.vocab_size], source.logits) <= CLOSE


@pytest.mark.parametrize(
    "family", ["olmo2", *(pytest.param(n, marks=FULL) for n in ("gemma2", "glm4"))]
)
def test_between_formats_of_one_naming(family, written, tmp_path):
    source = written(family)
    convert(source.directory, tmp_path / "pt", "pytorch")
    convert(tmp_path / "pt", tmp_path / "hf", "hf")
    found = strict_logits(tmp_path / "hf", source.tokens)
    assert difference(found, source.logits) == 0


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma2", "has no norm of what attention and MLP return, and no soft cap"),
        ("glm4", "has no norm of what attention and MLP return"),
        ("olmo2", "norms query and key head by head only"),
    ],
)
def test_megatron_cannot_be_it(family, reason, written, tmp_path):
    for saver, options in (("core", {}), ("pytorch", {"layout": "core"})):
        with pytest.raises(SchemaError, match=reason):
            convert(written(family).directory, tmp_path / "core", saver, **options)
    assert not (tmp_path / "core").exists()


def test_parallel_residual_is_refused_by_name(tmp_path):
    source = tmp_path / "hf"
    hf.gpt_neox(source, use_parallel_residual=True)
    with pytest.raises(
        SchemaError, match="use_parallel_residual=true: Megatron's TransformerLayer"
    ):
        convert(source, tmp_path / "core", "core")
    convert(source, tmp_path / "pt", "pytorch")
    convert(tmp_path / "pt", tmp_path / "back", "hf")
    expected = hf.logits(source, torch.arange(16)[None])
    assert torch.equal(strict_logits(tmp_path / "back", torch.arange(16)[None]), expected)


def test_zero_centred_norms_have_no_local_spec(written, tmp_path):
    with pytest.raises(SchemaError, match="local spec are not zero-centred"):
        convert(
            written("gemma").directory, tmp_path / "core", "core", saver_transformer_impl="local"
        )


def test_what_megatron_must_be_told_about_gemma(written, tmp_path):
    facts = convert(written("gemma").directory, tmp_path / "core", "core")
    notes = " ".join(facts.notes)
    assert "multiplies embeddings by the square root of hidden_size, 8" in notes
    assert "gated_linear_unit=True, bias_activation_fusion=True" in notes


@pytest.mark.parametrize("family", ["gpt2", pytest.param("gpt_neox", marks=FULL)])
def test_old_files_hold_masks_and_names_without_prefix(family, written, tmp_path):
    source = written(family)
    old = tmp_path / "old"
    old.mkdir()
    (file,) = source.directory.glob("*.safetensors")
    tensors = load_file(file)
    attention = "h.{}.attn" if family == "gpt2" else "gpt_neox.layers.{}.attention"
    for layer in range(4):
        tensors[f"{attention.format(layer)}.bias"] = torch.ones(1, 1, 64, 64).bool().tril()
        tensors[f"{attention.format(layer)}.masked_bias"] = torch.tensor(-1e4)
    named = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(named, old / "model.safetensors")
    (old / "config.json").write_bytes((source.directory / "config.json").read_bytes())
    layout = Layout(tp=2)
    facts = convert(old, tmp_path / "core", "core", **sizes(layout))
    assert len([one for one in facts.dropped if "masked_bias" in one["name"]]) == 4
    model = source.megatron("te", layout)
    found = mcore.read(model, layout, tmp_path / "core", source.tokens)
    assert difference(found[..., : source.config.vocab_size], source.logits) <= CLOSE


def test_long_rope_is_named_and_comes_back(tmp_path):
    source = tmp_path / "hf"
    factors = [1.0 + n for n in range(4)]
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    rope |= {"short_factor": factors, "long_factor": [2 * f for f in factors]}
    hf.phi3(source, rope_parameters=rope, original_max_position_embeddings=32)
    facts = convert(source, tmp_path / "core", "core")
    assert "Megatron has no argument for longrope scaling" in " ".join(facts.notes)
    convert(tmp_path / "core", tmp_path / "back", "hf")
    assert meaning(tmp_path / "back") == meaning(source)
    tokens = torch.arange(48)[None]
    assert torch.equal(strict_logits(tmp_path / "back", tokens), hf.logits(source, tokens))
