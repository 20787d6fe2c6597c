"""What ``--dtype`` changes on the way from a loader to a saver, and what not."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ckptx
from ckptx.conversion.casting import cast_messages
from ckptx.errors import PlanError
from ckptx.protocol.messages import PASSTHROUGH, End, Tensors
from ckptx.storage.gather import read
from ckptx.tensors.lazy import Computed, stored


def test_balancing_biases_are_not_rounded(tmp_path):
    """Megatron holds them in float32; cast to bfloat16 and widened again they would be others."""
    values = np.array([1 + 2.0**-20, -1e-9, 3.14159265], "f4")
    (tmp_path / "file").write_bytes(values.tobytes())
    bias = stored(0, 0, "float32", (3,))
    for message in ("transformer layer 3", "mtp layer 0"):
        tensors = {"router expert bias": bias, "input norm weight": bias}
        (cast,) = cast_messages([Tensors(message, tensors)], "bf16")
        found = read(cast.tensors["router expert bias"], [str(tmp_path / "file")])
        assert found.dtype == np.float32
        assert found.tobytes() == values.tobytes()
        assert cast.tensors["input norm weight"].dtype == "bfloat16"


def test_indices_and_flags_stay_as_they_are():
    tensors = {dtype: stored(0, 0, dtype, (2,)) for dtype in ("int64", "bool", "uint8")}
    (cast,) = cast_messages([Tensors("transformer layer 0", tensors)], "float16")
    assert cast.tensors == tensors


def test_values_that_become_infinite_are_told(tmp_path, write_llama, run):
    source = write_llama(tmp_path / "llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][:4] = 65519, 65520, -1e6, 3e38  # the first is rounded down
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    said = "elements are infinite after the cast"
    for dtype, format, count in (("fp16", "hf", 3), ("bf16", "hf", 0), ("fp16", "core", 3)):
        target = tmp_path / f"{dtype}-{format}"
        code, out, err = run("convert", source, target, "--to", format, "--dtype", dtype, "--json")
        assert code == 0, err
        notes = [note for note in json.loads(out)["notes"] if said in note]
        assert [note.partition(" ")[0] for note in notes] == [str(count)] * bool(count)
        assert all("norm.weight" in note or "layernorm.weight" in note for note in notes)


def test_infinite_elements_of_exact_tensors_are_nobody_s_fault(tmp_path, write_llama, run):
    source = write_llama(tmp_path / "llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][0] = np.inf
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    code, out, _ = run("convert", source, tmp_path / "out", "--to", "hf", "--json")
    assert code == 0
    assert "elements are infinite" not in out


def dtypes_of(place):
    """Return the dtype of every tensor in a file of safetensors, as its header says."""
    data = (place / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}


NORMS = ("--dtype", "bf16", "--dtype", "*norm*=fp32")


def test_parts_have_a_dtype_of_their_own(tmp_path, write_llama, run):
    source = write_llama(tmp_path / "llama")
    before = load_file(source / "model.safetensors")
    for made, options in (("straight", ()), ("core", ("--to", "core", "--tp", 2))):
        place = source
        if options:  # Hugging Face's names count whatever the source's are
            place = tmp_path / "megatron"
            assert run("convert", source, place, *options, "--quiet")[0] == 0
        target = tmp_path / made
        code, out, err = run("convert", place, target, "--to", "hf", *NORMS, "--verify", "--json")
        assert (code, err) == (0, "")
        for name, dtype in dtypes_of(target).items():
            assert dtype == ("F32" if "norm" in name else "BF16")
        report = json.loads(out)
        (note,) = (note for note in report["notes"] if note.startswith("--dtype"))
        assert note.startswith("--dtype *norm*=float32: 9 tensors: model.")
        assert not [name for name in report["inexact"]["float32 -> bfloat16"] if "norm" in name]
        assert json.loads((target / "config.json").read_text())["torch_dtype"] == "bfloat16"
        after = load_file(target / "model.safetensors")
        norm = "model.layers.3.input_layernorm.weight"
        assert after[norm].tobytes() == before[norm].tobytes()
        manifest = json.loads((target / "ckptx-manifest.json").read_text())
        (file,) = (one for one in manifest["files"].values() if one["tensors"])
        assert {one["name"]: one["dtype"] for one in file["tensors"]}[norm] == "float32"


def test_plain_dtype_is_the_config_s_also_where_parts_are_larger(tmp_path, write_llama, run):
    source = write_llama(tmp_path / "llama")
    parts = ("--dtype", "model.*=fp32", "--dtype", "lm_head.weight=bfloat16", "--dtype", "bf16")
    assert run("convert", source, tmp_path / "out", "--to", "hf", *parts, "--quiet")[0] == 0
    assert set(dtypes_of(tmp_path / "out").values()) == {"BF16", "F32"}
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_last_pattern_counts_and_the_rest_stays(tmp_path, write_llama, run):
    source = write_llama(tmp_path / "llama")
    parts = ("--dtype", "*norm*=bf16", "--dtype", "model.norm.weight=fp16")
    assert run("convert", source, tmp_path / "out", "--to", "hf", *parts, "--quiet")[0] == 0
    found = dtypes_of(tmp_path / "out")
    assert found.pop("model.norm.weight") == "F16"
    assert {dtype for name, dtype in found.items() if "norm" in name} == {"BF16"}
    assert {dtype for name, dtype in found.items() if "norm" not in name} == {"F32"}


def test_parts_of_what_cannot_have_two_dtypes_are_refused_by_name(tmp_path, write_llama, run):
    source = write_llama(tmp_path / "llama")
    wrong = {
        ("hf", "*q_proj*=fp32"): "'model.layers.0.self_attn.k_proj.weight'",
        ("hf", "*router*=fp32"): "matches no tensor; there are 'model.embed_tokens.weight'",
        ("hf", "*input_layer_norm*=fp32"): "there are 'model.layers.*.input_layernorm.weight'",
        ("core", "*gate_proj*=fp32"): "linear_fc1.weight, of mlp l0 weight W float32 [24, 16]",
        ("core", "model.layers.0.*norm*=fp32"): "'decoder.layers.self_attention.linear_qkv.layer_",
    }
    for (to, part), said in wrong.items():
        given = ("--to", to, "--dtype", "bf16", "--dtype", part)
        code, out, err = run("convert", source, tmp_path / "out", *given)
        assert (code, out) == (1, "")
        assert said in err
        assert "--dtype" in err
        assert not (tmp_path / "out").exists()
    # Files of ranks have a tensor for each layer.
    given = ("--to", "core", "--ckpt-format", "torch", "--dtype", "bf16")
    part = ("--dtype", "model.layers.0.*norm*=fp32")
    assert run("convert", source, tmp_path / "out", *given, *part, "--quiet")[0] == 0


def test_values_that_were_rounded_on_the_way_are_not_widened():
    computed = Computed("bfloat16", (2, 2), "lora", (stored(0, 0, "bfloat16", (2, 2)),) * 4)
    narrowed = stored(0, 0, "float32", (2, 2)).cast("float16")
    exact = stored(0, 0, "float16", (2, 2)).cast("float32")
    for tensor, refused in ((computed, True), (narrowed, True), (exact, False)):
        messages = [Tensors(PASSTHROUGH, {"a": tensor}), End()]
        if refused:
            with pytest.raises(PlanError, match=r"'a' is rounded to b?float16 on"):
                list(cast_messages(messages, None, [("a", "float32")]))
        else:
            found, _ = cast_messages(messages, None, [("a", "float32")])
            assert found == messages[0]


def test_a_pattern_of_tensors_that_keep_their_dtype_is_refused():
    bias = stored(0, 0, "float32", (3,))
    messages = [Tensors("transformer layer 3", {"router expert bias": bias}), End()]
    with pytest.raises(PlanError, match="'transformer layer 3: router expert bias' keep their"):
        list(cast_messages(messages, None, [("*bias", "bfloat16")]))


def test_python_takes_words_and_mappings(tmp_path, write_llama):
    source = write_llama(tmp_path / "llama")
    given = {"list": ["bf16", "*norm*=fp32"], "mapping": {"*norm*": "bf16"}, "word": "bf16"}
    found = {}
    for name, dtype in given.items():
        ckptx.convert(source, tmp_path / name, to="hf", dtype=dtype)
        found[name] = dtypes_of(tmp_path / name)["model.norm.weight"]
    assert found == {"list": "F32", "mapping": "BF16", "word": "BF16"}
