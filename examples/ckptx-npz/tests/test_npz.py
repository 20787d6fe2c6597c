"""The plugin through ckptx's conformance kit, and against numpy."""

import numpy as np
import pytest
from ckptx_npz import WEIGHTS
from ckptx_npz.npz import Npz

from ckptx.plugin_api import FormatError
from ckptx.testing.contracts import Checkpoint, LoaderTests, SaverTests
from ckptx.testing.conversion import save
from ckptx.testing.models import MODELS, messages, write_config
from ckptx.testing.tagged import bits


def as_numpy_stores_it(arrays):
    known = {name: array for name, array in arrays.items() if array.dtype.isbuiltin == 1}
    other = {f"{n}:{a.dtype.name}": bits(a) for n, a in arrays.items() if n not in known}
    return {**known, **other}


class TestNpz(LoaderTests, SaverTests):
    loader = saver = Npz()

    def write(self, directory, model):
        write_config(directory, model)
        np.savez(directory / WEIGHTS, **as_numpy_stores_it(model.hf()))
        return Checkpoint(directory, model.canonical())


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_numpy_reads_what_was_saved(model, tmp_path):
    target = save(Npz(), messages(model, tmp_path / "source"), tmp_path / "target", {})
    with np.load(target / WEIGHTS) as found:
        expected = as_numpy_stores_it(model.hf())
        assert sorted(found.files) == sorted(expected)
        for name, array in expected.items():
            assert found[name].dtype == array.dtype
            assert found[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("save_as", [np.savez_compressed, np.savez])
def test_what_cannot_be_referred_to_is_refused(save_as, tmp_path):
    values = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    save_as(tmp_path / WEIGHTS, values=values)
    with pytest.raises(FormatError):
        list(Npz().load(tmp_path, {}))
