"""What ``--dtype`` changes on the way from a loader to a saver, and what not."""

from __future__ import annotations

import numpy as np

from ckptx.casting import cast_messages
from ckptx.lazy import stored
from ckptx.protocol import Tensors
from ckptx.reader import read


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
