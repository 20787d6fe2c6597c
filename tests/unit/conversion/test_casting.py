"""What ``--dtype`` changes on the way from a loader to a saver, and what not."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import load_file, save_file

from ckptx.conversion.casting import cast_messages
from ckptx.protocol.messages import Tensors
from ckptx.storage.gather import read
from ckptx.tensors.lazy import stored


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
