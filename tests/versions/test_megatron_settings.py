"""The table of Megatron's settings, and what its script takes from sources."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from ckptx.schemas.megatron_settings.settings import TABLE, changing, known, unknown
from tests.versions import megatron_settings
from tests.versions.megatron_settings import UNCLASSIFIED, read, settings_of, write

ROWS = read()
CLASSES = {"harmless", "family", "function", "batch", "structure"}


def test_every_name_of_every_version_is_classified():
    assert not [name for name, row in ROWS.items() if row["class"] == UNCLASSIFIED]
    assert {row["class"] for row in ROWS.values()} == CLASSES
    assert all(row["versions"] for row in ROWS.values())


def test_what_changes_a_model_has_plain_values_and_a_reason():
    for name, row in ROWS.items():
        if row["class"] in ("function", "structure"):
            assert row["reason"], name
            plain = [ast.literal_eval(value) for value in row["plain"].split(" | ")]
            said = [ast.literal_eval(value) for value in row["defaults"].split(" | ") if value]
            # HybridConfig alone says that it is one.
            assert set(map(repr, said)) <= {*map(repr, plain), "None", "''"} or (
                name == "is_hybrid_model"
            ), name
        else:
            assert not row["plain"], name


def test_the_table_holds_what_the_installed_release_has():
    places = getattr(find_spec("megatron"), "submodule_search_locations", None)
    if not places:
        pytest.skip("megatron-core is not installed")
    found = settings_of(Path(next(iter(places))).parent)
    assert "softmax_scale" in found
    assert found.keys() <= known().keys()


SOURCE = '''
import torch
from dataclasses import dataclass, field

@dataclass
class ModelParallelConfig:
    """Docs."""
    size: int = 1

@dataclass
class TransformerConfig(ModelParallelConfig):
    new_switch: bool = False
    act: object = torch.nn.functional.gelu
    hidden: int = field(default=0, metadata={"argparse_meta": {"arg_names": ["--hid-den"]}})

@dataclass
class Own(TransformerConfig):
    own_scale: float = 2.0
'''
PARSER = """
def add(parser):
    group = parser.add_argument_group("x")
    group.add_argument("--log-what", action="store_true")
    group.add_argument("--no-fusion", action="store_false", dest="fusion")
    group.add_argument("--scale", type=float, default=0.5)

def validate(args):
    args.computed = args.scale * 2
    setattr(args, "set_by_name", 1)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "sources" / "9.9.9"
    (root / "megatron" / "core").mkdir(parents=True)
    (root / "megatron" / "training").mkdir()
    (root / "megatron" / "core" / "config.py").write_text(SOURCE)
    (root / "megatron" / "training" / "arguments.py").write_text(PARSER)
    return root


def test_fields_arguments_and_computed_names_are_found(tree):
    found = {name: (one.kinds, list(one.defaults)) for name, one in settings_of(tree).items()}
    assert found == {
        "size": ({"config"}, ["1"]),
        "new_switch": ({"config"}, ["False"]),
        "act": ({"config"}, []),
        "hidden": ({"config"}, ["0"]),
        "hid_den": ({"argument"}, []),
        "own_scale": ({"config"}, ["2.0"]),
        "log_what": ({"argument"}, ["False"]),
        "fusion": ({"argument"}, ["True"]),
        "scale": ({"argument"}, ["0.5"]),
        "computed": ({"set"}, []),
        "set_by_name": ({"set"}, []),
    }


def test_a_new_name_is_unclassified_until_somebody_judges(tree, tmp_path):
    table = tmp_path / "table.tsv"
    write(tree.parent, table)
    assert read(table)["new_switch"]["class"] == UNCLASSIFIED
    assert read(table)["new_switch"]["versions"] == "9.9.9"
    table.write_text(table.read_text().replace(f"new_switch\t{UNCLASSIFIED}", "new_switch\tfamily"))
    write(tree.parent, table)
    assert read(table)["new_switch"]["class"] == "family"


def test_the_table_is_the_one_that_is_shipped():
    assert TABLE.read_text() == megatron_settings.TABLE.read_text()


def test_a_setting_changes_the_function_only_where_it_is_not_plain():
    assert changing({"moe_apply_probs_on_input": True, "moe_router_topk_limited_devices": 2}) == {
        "moe_apply_probs_on_input": True,
        "moe_router_topk_limited_devices": 2,
    }
    assert changing({"softmax_type": "vanilla", "softmax_scale": None, "mup_width_mult": 1.0}) == {}


def test_names_of_no_release_are_unknown():
    assert unknown({"my_scale": 2.0, "my_switch": False, "lr": 1.0}) == ["my_scale"]
