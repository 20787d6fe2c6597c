"""Which family is asked first where nothing names one, and what a note says of its package."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from ckptx.errors import SchemaError
from ckptx.registry import families, registry
from ckptx.schemas.megatron_settings.args import spec_from_args
from ckptx.testing.models import tiny
from tests.schemas.megatron import args_of

LLAMA, GENERAL = tiny().spec, tiny("gpt").spec


@pytest.fixture
def installed(monkeypatch):
    """Families of other packages that claim whatever they are asked about."""

    def install(**packages):
        known = dict(registry._owned_families())
        for name, (package, order) in packages.items():
            claims = SimpleNamespace(unsupported=lambda spec: [])
            family = replace(known["olmo2"][0], name=name, recognition=order, config=claims)
            entry = replace(known["olmo2"][1], distribution=package, version="1.2")
            known[name] = (family, entry)
        monkeypatch.setattr(registry, "_owned_families", lambda: known)
        monkeypatch.setattr(registry, "families", lambda: {n: f for n, (f, _) in known.items()})

    return install


def test_ours_are_asked_before_any_other(installed):
    installed(greedy=("ckptx-greedy", 0))
    assert families.recognised_family(LLAMA).name == "llama"


def test_a_family_that_is_not_to_be_asked_changes_nothing(installed):
    installed(silent=("ckptx-silent", None))
    assert families.recognised_family(GENERAL).name == "gpt"


def test_others_are_asked_before_the_general_model(installed):
    installed(second=("ckptx-b", 2), first=("ckptx-a", 1))
    assert families.recognised_family(GENERAL).name == "first"


def test_a_tie_is_refused_with_both_packages(installed):
    installed(one=("ckptx-a", 1), two=("ckptx-b", 1))
    with pytest.raises(SchemaError, match=r"one of ckptx-a or of two of ckptx-b.*--hf-base"):
        families.recognised_family(GENERAL)


def test_a_note_names_the_package_of_a_foreign_family_alone(installed):
    installed(one=("ckptx-a", None))
    foreign = families.family_named("one")
    assert families.note_of(foreign) == {
        "family": "one",
        "distribution": "ckptx-a",
        "version": "1.2",
    }
    assert families.note_of(families.family_named("llama")) == {"family": "llama"}
    assert families.note_of(families.family_named("gpt")) == {}


@pytest.mark.parametrize(
    ("note", "said"),
    [
        ({"family": "one"}, "upgrade ckptx"),
        ({"family": "one", "distribution": "ckptx-a", "version": "1.2"}, "pip install ckptx-a"),
    ],
)
def test_a_family_that_is_not_here_is_an_error(note, said):
    with pytest.raises(SchemaError, match=said):
        spec_from_args({**args_of(LLAMA), "ckptx": note})


def test_a_setting_that_could_not_be_read_back_is_refused():
    spec = replace(LLAMA, extra={"factors": [{1.5}]})
    with pytest.raises(SchemaError, match=r"extra\.factors of the model is a set"):
        args_of(spec)
