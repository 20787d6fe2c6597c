from __future__ import annotations

import os

import ml_dtypes
import numpy as np
import pytest

from ckptx.errors import PluginError
from ckptx.storage.gather import read
from ckptx.storage.spool import Spool, SpoolFile


@pytest.mark.parametrize("nameless", [True, False])
def test_spool_returns_what_was_put_and_leaves_no_name(tmp_path, monkeypatch, nameless):
    if not nameless:
        monkeypatch.delattr(os, "O_TMPFILE")
    arrays = [
        np.arange(7, dtype=np.float32),
        np.ones((3, 5), ml_dtypes.bfloat16),
        np.arange(12, dtype=np.int64).reshape(3, 4).T,
        np.array(2.5, np.float16),
        np.zeros((0, 4), np.float32),
    ]
    with SpoolFile(tmp_path / "not" / "there" / "yet") as file:
        spool = Spool(file.path)
        extents = [spool.put(array, array.dtype.name, array.shape) for array in arrays]
        spool.close()
        assert not list(tmp_path.iterdir())
        for array, extent in zip(arrays, extents, strict=True):
            assert extent.offset % 64 == 0
            found = read(extent, [file.path])
            assert found.dtype == array.dtype
            assert np.array_equal(found, array)
        assert file.nbytes == 258  # the scalar ends it, the empty tensor adds nothing


def test_spool_takes_plain_buffers_and_counts_files(tmp_path):
    with SpoolFile(tmp_path) as file:
        spool = Spool(file.path)
        extent = spool.put(b"abcd", "uint8", (4,), file=3)
        assert extent.file == 3
        assert read(extent, ["", "", "", file.path]).tobytes() == b"abcd"
        spool.close()


def test_spool_refuses_bytes_that_are_not_the_tensor(tmp_path):
    with SpoolFile(tmp_path) as file:
        spool = Spool(file.path)
        with pytest.raises(PluginError, match=r"float32 \[3\] takes 12 bytes, got 8"):
            spool.put(np.zeros(2, np.float32), "float32", (3,))
        spool.close()
