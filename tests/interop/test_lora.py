"""LoRA: what ckptx merges on the way is, bit for bit, what peft merges in memory."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlavaConfig,
    Qwen2_5_VLConfig,
)

from ckptx.cli.main import main
from ckptx.errors import CkptxError
from ckptx.registry import registry
from ckptx.tensors.dtypes import dtype_name
from tests.formats import zero_by_hand
from tests.oracles import hf

from .adapted import SMALL
from .conversion import CLOSE, TOKENS, contents, convert, difference, strict_logits
from .test_quantised import quantise

adapters = pytest.importorskip("tests.oracles.adapters", reason="peft is not installed")

ATTENTION = ["q_proj", "v_proj", "o_proj"]
EVERY = [*ATTENTION, "k_proj", "gate_proj", "up_proj", "down_proj"]


def sampled(variants, rest):
    """Return the names of variants; the rest is for the full grid."""
    return [pytest.param(one, marks=[pytest.mark.full] * (one in rest)) for one in variants]


VARIANTS = {
    "plain": ("llama", {"target_modules": EVERY, "r": 8, "lora_alpha": 16}),
    "bf16": ("llama-bf16", {"target_modules": EVERY, "r": 8, "lora_alpha": 12}),
    "fp16": ("llama-fp16", {"target_modules": EVERY, "r": 3, "lora_alpha": 7}),
    "rslora": ("llama", {"target_modules": ATTENTION, "r": 6, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": EVERY,
            "r": 4,
            "rank_pattern": {"q_proj": 2, r"model.layers.1.mlp.up_proj": 5},
            "alpha_pattern": {"layers.0.self_attn.v_proj": 3, r".*down_proj": 32},
        },
    ),
    "lora_bias": ("llama-bf16", {"target_modules": ATTENTION, "r": 4, "lora_bias": True}),
    "bias-all": ("llama", {"target_modules": ["q_proj"], "r": 4, "bias": "all"}),
    "bias-lora": ("qwen2", {"target_modules": ["q_proj"], "r": 4, "bias": "lora_only"}),
    "embedding": ("llama-bf16", {"target_modules": ["embed_tokens", "lm_head"], "r": 4}),
    "saved": (
        "llama-bf16",
        {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "saved-norm": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "tokens": (
        "llama-bf16",
        {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3, 130]},
    ),
    "tokens-dict": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [0, 1]}},
    ),
    "tokens-tied": (
        "qwen2-tied",
        {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3]},
    ),
    "gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "unknown-family": ("unknown", {"target_modules": EVERY, "r": 4}),
    "parameter": (
        "llama-bf16",
        {"target_modules": [], "target_parameters": ["q_proj.weight"], "r": 4},
    ),
    "experts": (
        "qwen3_moe",
        {
            "target_modules": ATTENTION,
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "r": 2,
            "rank_pattern": {"experts.down_proj": 3},
        },
    ),
    "experts-one": (
        "mixtral",
        {"target_modules": ["gate"], "target_parameters": ["experts.down_proj"], "r": 2},
    ),
}


RARE = ("fp16", "gaussian", "bias-lora", "saved-norm", "tokens-dict", "rslora", "tokens-tied")


@pytest.mark.parametrize("variant", sampled(VARIANTS, RARE))
def test_every_bit_is_that_of_peft(variant, base_of, tmp_path):
    name, config = VARIANTS[variant]
    base, adapter = base_of(name), tmp_path / "adapter"
    adapters.make(base, adapter, **config)
    expected = adapters.merged(base, [adapter], tmp_path / "peft")
    assert registry.detect(adapter) == "peft"
    facts = convert(adapter, tmp_path / "hf", "hf", hf_base=base)
    found = hf.weights(tmp_path / "hf")
    assert sorted(found) == sorted(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key
    before = hf.weights(base)
    changed = {key for key in found if not torch.equal(found[key], before[key])}
    reported = {key for step, keys in facts.inexact.items() if "LoRA" in step for key in keys}
    dropped = " ".join(one["name"] for one in facts.dropped)
    assert changed  # the adapter does something
    assert changed <= reported | {key for key in changed if key in dropped}
    assert not (tmp_path / "hf" / "adapter_config.json").exists()
    strict_logits(tmp_path / "hf", TOKENS)


def seeing_base(kind, directory):
    """Save a model of text and images, whose files have other names than its modules."""
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {"hidden_size": 32, "intermediate_size": 48}
    if kind == "llava":
        vision |= {"num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28}
        vision |= {"model_type": "clip_vision_model", "patch_size": 14, "projection_dim": 32}
        text |= {"model_type": "llama"}
        config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=63)
    else:
        text |= {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
        vision |= {"depth": 1, "num_heads": 4, "out_hidden_size": 32}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    torch.manual_seed(2)
    AutoModelForImageTextToText.from_config(config).save_pretrained(directory)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_names_of_memory_find_the_weights_of_files(kind, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    seeing_base(kind, base)
    towers = {"llava": ["fc1"], "qwen2_5_vl": ["attn.qkv"]}[kind]
    saved = ["embed_tokens", "lm_head"]
    adapters.make(base, adapter, target_modules=[*ATTENTION, *towers], modules_to_save=saved)
    adapters.merged(base, [adapter], tmp_path / "peft")
    assert not any(name.startswith("model.language_model.") for name in hf.weights(base))
    convert(adapter, tmp_path / "hf", "hf", hf_base=base)
    found, expected = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / name).state_dict()
        for name in ("hf", "peft")
    )
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


DORA = {
    "linear": ("llama", {"target_modules": EVERY, "r": 8, "lora_alpha": 16}),
    "bf16": ("llama-bf16", {"target_modules": EVERY, "r": 4}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens"], "r": 4, "use_rslora": True}),
}


@pytest.mark.parametrize("variant", sampled(DORA, ("embedding", "linear")))
def test_dora_differs_by_the_order_of_a_sum(variant, base_of, tmp_path):
    """torch takes norms in its processor's order: some units in the last place of float32."""
    name, config = DORA[variant]
    base, adapter = base_of(name), tmp_path / "adapter"
    adapters.make(base, adapter, use_dora=True, **config)
    expected = adapters.merged(base, [adapter], tmp_path / "peft")
    facts = convert(adapter, tmp_path / "hf", "hf", hf_base=base)
    found = hf.weights(tmp_path / "hf")
    assert sorted(found) == sorted(expected)
    reported = {key for step, keys in facts.inexact.items() if "DoRA" in step for key in keys}
    for key, tensor in expected.items():
        if key not in reported:
            assert torch.equal(found[key], tensor), key
            continue
        places = 4 * torch.finfo(torch.float32).eps
        unit = torch.finfo(tensor.dtype).eps if tensor.dtype != torch.float32 else places
        assert (found[key] - tensor).abs().le(unit * tensor.abs()).all(), key
        if tensor.dtype != torch.float32:
            assert found[key].ne(tensor).float().mean() < 1e-3
    assert reported
    said = adapters.logits(base, adapter, TOKENS)
    if name != "llama-bf16":
        assert difference(strict_logits(tmp_path / "hf", TOKENS), said) <= CLOSE


def test_adapters_are_merged_one_after_another(base_of, tmp_path):
    base = base_of("llama-bf16")
    places = [tmp_path / "first", tmp_path / "second"]
    for seed, place in enumerate(places):
        adapters.make(base, place, seed=seed, target_modules=ATTENTION[seed:], r=4)
    expected = adapters.merged(base, places, tmp_path / "peft")
    convert(base, tmp_path / "hf", "hf", loader_options={"adapter": tuple(map(str, places))})
    found = hf.weights(tmp_path / "hf")
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    convert(
        places[0], tmp_path / "same", "hf", loader_options={"adapter": places[1:]}, hf_base=base
    )
    assert contents(tmp_path / "same") == contents(tmp_path / "hf")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_merge_is_rounded_once_to_the_dtype_that_is_wanted(dtype, base_of, tmp_path):
    """To float32 it is peft's merge into a base that was loaded as float32."""
    base, adapter, wide = base_of("llama-bf16"), tmp_path / "adapter", tmp_path / "wide"
    adapters.make(base, adapter, target_modules=EVERY, r=4)
    shutil.copytree(base, wide)
    file = wide / "model.safetensors"
    save_file({key: one.float() for key, one in load_file(file).items()}, file, {"format": "pt"})
    said = json.loads((wide / "config.json").read_text()) | {"dtype": "float32"}
    (wide / "config.json").write_text(json.dumps(said))
    expected = adapters.merged(wide, [adapter], tmp_path / "peft")
    convert(adapter, tmp_path / "hf", "hf", hf_base=base, dtype=dtype)
    found = hf.weights(tmp_path / "hf")
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor.to(getattr(torch, dtype))), key


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", sampled(["qwen2-tied", "unknown-tied"], ["unknown-tied"]))
def test_a_tied_model_computes_what_training_saw(family, config, base_of, tmp_path):
    """peft's own merge adds an update of one of the two to both."""
    base, adapter = base_of(family), tmp_path / "adapter"
    adapters.make(base, adapter, r=4, **config)
    facts = convert(adapter, tmp_path / "hf", "hf", hf_base=base)
    said = adapters.logits(base, adapter, TOKENS)
    assert difference(strict_logits(tmp_path / "hf", TOKENS), said) <= CLOSE
    assert any("no longer tied" in note for note in facts.notes)


LIVE = {
    "plain": ("llama", {"target_modules": ATTENTION, "r": 4, "lora_alpha": 12}),
    "dora": ("llama", {"target_modules": ATTENTION, "r": 4, "use_dora": True}),
    "everything": (
        "llama",
        {
            "target_modules": ["q_proj", "lm_head"],
            "modules_to_save": ["norm"],
            "trainable_token_indices": [5, 2],
            "use_rslora": True,
            "lora_bias": False,
            "bias": "all",
        },
    ),
    "tied": ("qwen2-tied", {"target_modules": ["q_proj", "embed_tokens"], "r": 4}),
    "tied-tokens": (
        "qwen2-tied",
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 2]},
    ),
    "tied-saved": ("qwen2-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "experts": (
        "qwen3_moe",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"], "r": 2},
    ),
}


def live(variant, base_of, directory):
    """Write the state dict of a live model as one file; return it, the adapter and its base."""
    name, config = LIVE[variant]
    base, adapter = base_of(name), directory / "lora_adapter"
    model = adapters.make(base, adapter, **config)
    torch.save({"model": model.state_dict()}, directory / "model.pt")
    shutil.copy(base / "config.json", directory)
    return directory / "model.pt", adapter, base


@pytest.mark.parametrize(
    "variant", sampled([one for one in LIVE if one != "experts"], ("tied-saved", "plain"))
)
def test_an_adapter_inside_a_checkpoint_is_the_one_of_the_files(variant, base_of, tmp_path):
    source, adapter, base = live(variant, base_of, tmp_path)
    convert(adapter, tmp_path / "files", "hf", hf_base=base)
    convert(source, tmp_path / "live", "hf")
    expected, found = hf.weights(tmp_path / "files"), hf.weights(tmp_path / "live")
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    configs = [
        json.loads((tmp_path / one / "config.json").read_text()) for one in ("live", "files")
    ]
    assert configs[0] == configs[1]
    assert difference(strict_logits(tmp_path / "live", TOKENS), hf.logits(base, TOKENS)) > CLOSE


@pytest.mark.parametrize("variant", sampled(LIVE, ("tied", "tied-saved", "plain")))
def test_an_exported_adapter_is_the_one_that_peft_saves(variant, base_of, tmp_path):
    source, adapter, base = live(variant, base_of, tmp_path)
    facts = convert(source, tmp_path / "peft", "peft")
    assert any(one["name"] == "the base model" for one in facts.dropped)
    expected = load_file(adapter / "adapter_model.safetensors")
    found = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    # peft adds copies of embeddings that it was not asked to train.
    copies = {key for key in expected if key.endswith("base_layer.weight")}
    duplicates = {key for key in found if "lm_head.token_adapter" in key}
    assert set(found) - duplicates == set(expected) - copies
    assert all(torch.equal(found[key], expected[key]) for key in set(found) - duplicates)
    logits = [adapters.logits(base, place, TOKENS) for place in (tmp_path / "peft", adapter)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("variant", sampled(["plain", "dora", "tied-saved"], ["plain"]))
def test_an_exported_adapter_whose_alpha_the_user_knows(variant, base_of, tmp_path):
    source, adapter, base = live(variant, base_of, tmp_path)
    alpha = json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"]
    adapter.rename(tmp_path / "elsewhere")
    convert(source, tmp_path / "peft", "peft", loader_options={"lora_alpha": alpha})
    places = (tmp_path / "peft", tmp_path / "elsewhere")
    assert torch.equal(*[adapters.logits(base, place, TOKENS) for place in places])
    convert(source, tmp_path / "hf", "hf", loader_options={"lora_alpha": alpha})
    said = adapters.logits(base, tmp_path / "elsewhere", TOKENS)
    assert difference(strict_logits(tmp_path / "hf", TOKENS), said) <= CLOSE


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_sharded_checkpoints(base_of, tmp_path):
    """FSDP 2 over two ranks, as DCP and as verl; DeepSpeed's pieces; all hold one model."""
    name, config = LIVE["plain"]
    base, adapter = base_of(name), tmp_path / "adapter"
    model = adapters.make(base, adapter, **config)
    expected = adapters.merged(base, [adapter], tmp_path / "peft")
    adapters.save_sharded(base, tmp_path / "run", 2, config)
    state = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    zero = zero_by_hand.write(tmp_path / "run" / "zero", state, 2, 2)
    for loader, source in (
        ("dcp", tmp_path / "run" / "dcp"),
        ("verl", tmp_path / "run" / "actor"),
        ("deepspeed", zero),
    ):
        assert registry.detect(source) == loader
        with pytest.raises(CkptxError, match="give --lora-alpha"):
            convert(source, tmp_path / "refused", "hf")
        convert(source, tmp_path / loader, "hf", loader_options={"lora_alpha": 12})
        found = hf.weights(tmp_path / loader)
        assert sorted(found) == sorted(expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected), loader
        convert(source, tmp_path / f"{loader}-peft", "peft", loader_options={"lora_alpha": 12})
        exported = load_file(tmp_path / f"{loader}-peft" / "adapter_model.safetensors")
        mine = load_file(adapter / "adapter_model.safetensors")
        assert {k: v.tolist() for k, v in exported.items()} == {
            k: v.tolist() for k, v in mine.items()
        }


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_verl_says_of_its_adapters_is_taken(base_of, tmp_path):
    name, config = LIVE["plain"]
    base, adapter = base_of(name), tmp_path / "adapter"
    adapters.make(base, adapter, **config)
    expected = adapters.merged(base, [adapter], tmp_path / "peft")
    adapters.save_sharded(base, tmp_path / "run", 2, config)
    source = tmp_path / "run" / "actor"
    said = json.loads((adapter / "adapter_config.json").read_text())
    meta = {key: said[key] for key in ("r", "lora_alpha")} | {"task_type": "CAUSAL_LM"}
    (source / "lora_train_meta.json").write_text(json.dumps(meta))
    convert(source, tmp_path / "hf", "hf")
    found = hf.weights(tmp_path / "hf")
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not (tmp_path / "hf" / "lora_train_meta.json").exists()
    for damaged, reason in (({"lora_alpha": 0}, "lora_alpha is 0"), ({"r": 3}, "says rank 3")):
        (source / "lora_train_meta.json").write_text(json.dumps(meta | damaged))
        with pytest.raises(CkptxError, match=reason):
            convert(source, tmp_path / "refused", "hf")


def test_ranks_cut_what_is_merged(base_of, tmp_path):
    """Megatron's tensors are cut and joined before they are computed; none may notice."""
    base, adapter = base_of("qwen2"), tmp_path / "adapter"
    adapters.make(base, adapter, target_modules=EVERY, r=4)
    convert(adapter, tmp_path / "hf", "hf", hf_base=base)
    sizes = {"target_tensor_parallel_size": 2, "target_pipeline_parallel_size": 2}
    convert(adapter, tmp_path / "core", "core", hf_base=base, **sizes)
    convert(tmp_path / "core", tmp_path / "back", "hf")
    assert hf.weights(tmp_path / "back").keys() == hf.weights(tmp_path / "hf").keys()
    for key, tensor in hf.weights(tmp_path / "hf").items():
        assert torch.equal(hf.weights(tmp_path / "back")[key], tensor), key


@pytest.mark.parametrize(
    ("name", "dtype", "targets"),
    [
        ("qwen2", "bf16", ["q_proj", "v_proj", "gate_proj", "embed_tokens"]),
        ("qwen2-bf16", "fp16", ["k_proj", "up_proj"]),
        ("qwen2-bf16", "fp32", ["k_proj", "up_proj"]),
    ],
)
def test_a_fused_weight_of_which_a_part_is_merged_is_cast_whole(
    name, dtype, targets, base_of, tmp_path
):
    """Megatron's linear_qkv and linear_fc1 have rows of weights that no adapter changes."""
    base, adapter = base_of(name), tmp_path / "adapter"
    adapters.make(base, adapter, target_modules=targets, r=4)
    wide = tmp_path / "wide"
    convert(base, wide, "hf", dtype="float32")
    wanted = getattr(torch, dtype_name(dtype))
    expected = adapters.merged(wide, [adapter], tmp_path / "peft")
    sizes = {"target_tensor_parallel_size": 2}
    convert(adapter, tmp_path / "core", "core", hf_base=base, dtype=dtype, **sizes)
    convert(tmp_path / "core", tmp_path / "back", "hf")
    found = hf.weights(tmp_path / "back")
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor.to(wanted)), key


FIRST = "model.layers.0.self_attn.q_proj.weight"


def test_layers_that_were_not_trained_need_no_matrices(base_of, tmp_path):
    """As peft makes them of layers_to_transform; and where the user has taken them out."""
    base = base_of("llama")
    how = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}
    adapters.make(base, tmp_path / "one", **how)
    expected = adapters.merged(base, [tmp_path / "one"], tmp_path / "peft")
    convert(tmp_path / "one", tmp_path / "merged", "hf", hf_base=base)
    found = hf.weights(tmp_path / "merged")
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    second = FIRST.replace("0", "1")
    assert not torch.equal(found[second], hf.weights(base)[second])
    assert torch.equal(found[FIRST], hf.weights(base)[FIRST])
    adapter = shutil.copytree(tmp_path / "one", tmp_path / "excluded")
    place = adapter / "adapter_config.json"
    rest = {"layers_to_transform": None, "exclude_modules": ["0.self_attn.q_proj"]}
    place.write_text(json.dumps(json.loads(place.read_text()) | rest))
    with pytest.raises(CkptxError, match=r"names 'model\.layers\.0\.self_attn\.v_proj', and the"):
        convert(adapter, tmp_path / "refused", "hf", hf_base=base)


def test_an_adapter_beside_whole_weights_is_left_there(base_of, tmp_path):
    """What torchtune saves: the merged model, and the adapter that is in it."""
    base, both = base_of("qwen2"), tmp_path / "epoch_0"
    adapters.make(base, tmp_path / "adapter", target_modules=["q_proj"])
    adapters.merged(base, [tmp_path / "adapter"], both)
    expected = hf.weights(both)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / file, both)
    report = convert(both, tmp_path / "hf", "hf")
    assert any(note.startswith("adapter_config.json is not carried") for note in report.notes)
    assert not (tmp_path / "hf" / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert all(torch.equal(model.state_dict()[key], one) for key, one in expected.items())
    convert(both, tmp_path / "core", "core")
    convert(tmp_path / "core", tmp_path / "back", "hf")
    assert not (tmp_path / "back" / "adapter_config.json").exists()


def test_a_residual_base_lies_beside_its_matrices(base_of, tmp_path):
    """PiSSA changes the base in memory: a checkpoint has both, an adapter's file one."""
    base, adapter = base_of("qwen2"), tmp_path / "lora_adapter"
    how = {"target_modules": ["q_proj"], "init_lora_weights": "pissa", "r": 4}
    model = adapters.make(base, adapter, **how)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    shutil.copy(base / "config.json", tmp_path)
    convert(tmp_path / "model.pt", tmp_path / "hf", "hf")
    with torch.no_grad():
        said = model(TOKENS).logits
    assert difference(strict_logits(tmp_path / "hf", TOKENS), said) <= CLOSE
    for saver, source in (("hf", adapter), ("peft", tmp_path / "model.pt")):
        with pytest.raises(CkptxError, match="belongs to the residual of its base model"):
            convert(source, tmp_path / "refused", saver, hf_base=base)


def test_a_finished_model_may_hold_matrices_of_its_own(base_of, tmp_path):
    """As Phi-4-multimodal does, whose own code computes with them: they pass by name."""
    base = tmp_path / "base"
    shutil.copytree(base_of("unknown"), base)
    file = base / "model.safetensors"
    path = "model.layers.0.self_attn.q_proj"
    own = {f"{path}.lora_{one}.speech.weight": torch.ones(2, 2) for one in "AB"}
    save_file({**load_file(file), **own}, file, {"format": "pt"})
    convert(base, tmp_path / "hf", "hf")
    assert own.keys() <= hf.weights(tmp_path / "hf").keys()


def test_a_quantised_base_is_dequantised_first(tmp_path):
    hf.qwen3(tmp_path / "quantised", **SMALL)
    quantise(tmp_path / "quantised")
    convert(tmp_path / "quantised", tmp_path / "base", "hf")
    adapter = tmp_path / "adapter"
    adapters.make(tmp_path / "base", adapter, target_modules=EVERY, r=4)
    convert(adapter, tmp_path / "expected", "hf", hf_base=tmp_path / "base")
    convert(adapter, tmp_path / "found", "hf", hf_base=tmp_path / "quantised")
    assert contents(tmp_path / "found") == contents(tmp_path / "expected")
    expected = adapters.merged(tmp_path / "base", [adapter], tmp_path / "peft")
    found = hf.weights(tmp_path / "found")
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("merge", [True, pytest.param(False, marks=pytest.mark.full)])
def test_rlinf_makes_its_adapters_with_an_alpha_of_their_rank(merge, base_of, tmp_path):
    base = base_of("llama")
    rlinf = {"r": 4, "lora_alpha": 4, "target_modules": EVERY, "init_lora_weights": "gaussian"}
    model = adapters.make(base, tmp_path / "adapter", **rlinf)
    torch.save(model.state_dict(), tmp_path / "full_weights.pt")
    content = {
        "convertor": {
            "ckpt_path": str(tmp_path / "full_weights.pt"),
            "save_path": str(tmp_path / "out"),
            "merge_lora_weighs": merge,
        },
        "model": {"model_path": str(base), "is_lora": True, "lora_rank": 4, "lora_path": None},
    }
    (tmp_path / "convertor.yaml").write_text(json.dumps(content))
    with pytest.raises(SystemExit) as stopped:
        main(["from-config", str(tmp_path / "convertor.yaml"), "--quiet"])
    assert stopped.value.code == 0
    if merge:
        expected = adapters.merged(base, [tmp_path / "adapter"], tmp_path / "merged")
        found = hf.weights(tmp_path / "out")
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        return
    places = (tmp_path / "out" / "lora_adapter", tmp_path / "adapter")
    assert torch.equal(*[adapters.logits(base, place, TOKENS) for place in places])
