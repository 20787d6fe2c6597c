"""Keys in the dictionaries of a rotary embedding that nothing reads."""

import json

import pytest

import ckptx
from ckptx.testing.models import tiny, write_hf


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "said",
    [
        {"rope_type": "default", "rope_tehta": 500000.0},
        {"rope_type": "linear", "factor": 2.0, "facter": 4.0},
    ],
)
def test_an_unknown_rotary_key_is_refused_towards_megatron(place, said, tmp_path):
    source = write_hf(tmp_path / "source", tiny("llama"))
    file = source / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), place: said}))
    with pytest.raises(ckptx.SchemaError, match=r"rope_tehta|facter"):
        ckptx.convert(source, tmp_path / "core", to="core")
    assert ckptx.convert(source, tmp_path / "dcp", to="dcp").target  # its names say nothing of it


def test_known_keys_are_not_refused(tmp_path):
    source = write_hf(tmp_path / "source", tiny("llama"))
    file = source / "config.json"
    said = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0}
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_parameters": said}))
    assert ckptx.convert(source, tmp_path / "core", to="core").target
