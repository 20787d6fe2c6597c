from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

from ckptx.errors import FormatError, PluginError
from ckptx.protocol.contracts import Loader, Saver
from ckptx.registry import registry

ROOT = Path(registry.__file__).resolve().parents[2]

PLUGIN = """
from ckptx.protocol.hookspecs import hookimpl

class Loader:
    name = {name!r}
    capabilities = {{"formats": [{name!r}]}}
    def options(self): return []
    def detect(self, source): return source.name == {name!r}
    def load(self, source, options, context): yield

@hookimpl
def register_loaders(register):
    register(Loader())
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that installs a distribution with entry points and modules."""
    monkeypatch.delenv(registry.PIN, raising=False)
    caches = (registry.entries, registry._registered, registry._hooks, registry.families)
    before = set(sys.modules)

    def install(distribution: str, points: dict[str, str], **modules: str) -> Path:
        site = tmp_path / distribution
        info = site / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n"
        )
        lines = [f"{name} = {value}" for name, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[ckptx]", *lines]))
        for name, text in modules.items():
            (site / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(str(site))
        for cache in caches:
            cache.cache_clear()
        return site

    for cache in caches:
        cache.cache_clear()
    yield install
    for cache in caches:
        cache.cache_clear()
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(
            sys.modules[name].__file__
        ):
            del sys.modules[name]


def test_built_ins_are_found_like_any_other(install):
    entry = registry.entries()["loader_hf"]
    assert (entry.distribution, entry.kind, entry.name) == ("ckptx", "loader", "hf")
    assert isinstance(registry.loader("hf"), Loader)
    assert isinstance(registry.saver("hf"), Saver)


def test_third_party_plugin_is_found_and_used(install):
    install("ckptx-npz", {"loader_npz": "npz_plugin"}, npz_plugin=PLUGIN.format(name="npz"))
    assert registry.entries()["loader_npz"].version == "1.2"
    assert "npz_plugin" not in sys.modules
    assert registry.loader("npz").name == "npz"
    assert registry.versions(("loader", "npz"), ("saver", "hf")).keys() == {"ckptx-npz", "ckptx"}


def test_listing_imports_no_plugin_and_nothing_heavy(tmp_path):
    code = (
        "import sys; from ckptx.registry import registry; assert registry.names('loader');"
        "print([m for m in sys.modules if m.startswith(('ckptx.schemas', 'torch', 'numpy', 'rich',"
        " 'pluggy', 'ckptx.tensors')) or m.startswith('ckptx.plugins.') and m.count('.') > 2])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


def test_two_distributions_with_one_name_are_an_error_that_names_both(install):
    for distribution in ("first-npz", "second-npz"):
        install(distribution, {"loader_npz": "npz_plugin"}, npz_plugin=PLUGIN.format(name="npz"))
    with pytest.raises(PluginError, match=r"several distributions: .*first-npz") as caught:
        registry.loader("npz")
    assert "second-npz" in str(caught.value)
    assert registry.loader("hf").name == "hf"
    (status,) = [s for s in registry.statuses() if s.entry.name == "npz"]
    assert "several distributions" in status.error


def test_pinning_a_distribution_settles_a_duplicate(install, monkeypatch):
    for distribution in ("first-npz", "second-npz"):
        install(distribution, {"loader_npz": "npz_plugin"}, npz_plugin=PLUGIN.format(name="npz"))
    monkeypatch.setenv(registry.PIN, "First_NPZ, saver_hf")
    registry.entries.cache_clear()
    assert set(registry.entries()) == {"loader_npz", "saver_hf"}
    assert registry.loader("npz").name == "npz"


def test_pinning_what_is_not_there_is_an_error(install, monkeypatch):
    monkeypatch.setenv(registry.PIN, "loader_hf,loader_nothing")
    with pytest.raises(PluginError, match="CKPTX_PLUGINS names 'loader_nothing'"):
        registry.entries()


def test_empty_pin_hides_everything(install, monkeypatch):
    monkeypatch.setenv(registry.PIN, "")
    assert not registry.entries()
    with pytest.raises(PluginError, match="unknown loader 'hf'; known loaders: none"):
        registry.loader("hf")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("x = 1", "registers nothing, expected 'npz'"),
        (PLUGIN.format(name="other"), "registers 'other', expected 'npz'"),
        (PLUGIN.format(name="npz").replace("register_loaders", "register_readers"), "unknown hook"),
    ],
)
def test_broken_plugin_is_reported_and_breaks_nothing_else(install, text, message):
    install("ckptx-npz", {"loader_npz": "npz_plugin"}, npz_plugin=text)
    with pytest.raises(PluginError, match="loader_npz of ckptx-npz") as caught:
        registry.loader("npz")
    assert message in str(caught.value)
    statuses = {s.entry.entry_name: s for s in registry.statuses()}
    assert message in statuses["loader_npz"].error
    assert not statuses["loader_hf"].error


def test_unknown_plugin_lists_the_known_ones(install):
    with pytest.raises(PluginError, match=r"'hff' \(did you mean 'hf'\?\); known savers: .*hf"):
        registry.saver("hff")


@pytest.mark.parametrize("name", ["nemo", "gguf", "fsdp_dtensor"])
def test_recognised_format_without_plugin_says_so(install, name):
    with pytest.raises(PluginError, match=f"'{name}': ckptx knows of this format .* no loader"):
        registry.loader(name)


def test_aliases_of_megatron(install):
    assert registry.canonical("mcore") == "core"
    assert registry.canonical("megatron") == "legacy"
    assert registry.canonical("zero") == "deepspeed"
    assert registry.canonical("lora") == "peft"
    assert registry.canonical("hf") == "hf"


def test_detection_needs_exactly_one_match(install, tmp_path):
    first, second = tmp_path / "one", tmp_path / "two"
    first.mkdir()
    second.mkdir()
    install("ckptx-one", {"loader_one": "one_plugin"}, one_plugin=PLUGIN.format(name="one"))
    assert registry.detect(first) == "one"
    with pytest.raises(PluginError, match=r"not a checkpoint .*: the directory is empty"):
        registry.detect(second)
    install(
        "ckptx-uno",
        {"loader_uno": "uno_plugin"},
        uno_plugin=PLUGIN.format(name="one")
        .replace('name = "one"', "")
        .replace("name = 'one'", "name = 'uno'"),
    )
    with pytest.raises(PluginError, match="looks like one and uno; say which with --from"):
        registry.detect(first)
    with pytest.raises(PluginError, match="no such file or directory"):
        registry.detect(tmp_path / "nothing")


DECLARED = """
from ckptx.protocol.declarations import Format

FORMATS = (
    Format("npz", "NumPy archives", loader="npz_plugin:Loader", saver="npz_plugin:Saver",
           aliases=("numpy",), files=("*.npz",), containers=("npz",), layouts=("hf",)),
)
"""


def test_a_declared_format_is_listed_by_what_it_declares(install):
    module = PLUGIN.format(name="npz") + "class Saver(Loader):\n    pass\n"
    points = {"formats_npz": "npz_formats:FORMATS", "loader_npz": "npz_plugin"}
    install("ckptx-npz", points, npz_formats=DECLARED, npz_plugin=module)
    (loader, saver) = [s for s in registry.statuses() if s.entry.name == "npz"]
    assert (loader.entry.kind, saver.entry.kind) == ("loader", "saver")
    assert saver.capabilities == {"formats": ["npz"], "layouts": ["hf"], "lossless": True}
    assert loader.error == ""
    assert "npz_plugin" not in sys.modules
    assert registry.loader("numpy").name == registry.saver("npz").name == "npz"
    assert registry.versions(("loader", "numpy")) == {"ckptx-npz": "1.2"}


def test_a_loader_is_imported_where_its_files_are(install, tmp_path):
    module = PLUGIN.format(name="npz").replace("source.name == 'npz'", "True")
    points = {"formats_npz": "npz_formats:FORMATS"}
    install("ckptx-npz", points, npz_formats=DECLARED, npz_plugin=module)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "weights.npy").touch()
    with pytest.raises(PluginError, match="not a checkpoint"):
        registry.detect(tmp_path / "other")
    assert "npz_plugin" not in sys.modules
    (tmp_path / "other" / "weights.npz").touch()
    assert registry.detect(tmp_path / "other") == "npz"
    assert registry.detect(tmp_path / "other" / "weights.npz") == "npz"


def test_a_loader_that_nobody_declares_is_asked_last(install, tmp_path):
    one = DECLARED.replace("npz", "zero_z").replace("*.zero_z", "here")
    module = PLUGIN.format(name="zero_z").replace("source.name == 'zero_z'", "True")
    install("one", {"formats_z": "one:FORMATS"}, one=one, zero_z_plugin=module)
    other = PLUGIN.format(name="any").replace("source.name == 'any'", "True")
    install("two", {"loader_any": "any_plugin"}, any_plugin=other)
    (tmp_path / "here").touch()
    with pytest.raises(PluginError, match="looks like zero_z and any; say which"):
        registry.detect(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("FORMATS = ('npz',)", "npz_formats:FORMATS is not a tuple of Format"),
        (DECLARED, "no module named 'npz_plugin'"),
    ],
)
def test_broken_declarations_are_reported_and_break_nothing_else(install, text, message):
    install("ckptx-npz", {"formats_npz": "npz_formats:FORMATS"}, npz_formats=text)
    errors = {s.entry.name: s.error for s in registry.statuses() if s.error}
    assert message in errors["npz"]
    assert registry.loader("hf").name == "hf"


def test_loaders_of_a_folder_are_pinned_one_by_one(install, monkeypatch):
    monkeypatch.setenv(registry.PIN, "loader_hf,formats_meta")
    registry.entries.cache_clear()
    assert list(registry.entries()) == ["loader_hf", "loader_meta", "saver_meta"]


def test_of_several_formats_of_one_alias_the_source_says_which(install, tmp_path):
    assert registry.canonical("fsdp") == registry.saver("fsdp").name == "dcp"
    with pytest.raises(FormatError, match="is neither dcp nor verl, what 'fsdp' stands for"):
        registry.loader("fsdp", source=tmp_path)
    (tmp_path / "model_world_size_1_rank_0.pt").touch()
    assert registry.loader("fsdp", source=tmp_path).name == "verl"


def test_entries_with_a_strange_name_are_ignored(install, caplog):
    install("ckptx-npz", {"reader_npz": "npz_plugin"})
    assert not any("npz" in name for name in registry.entries())
    assert "reader_npz" in caplog.text


def test_options_are_click_options():
    for kind in ("loader", "saver"):
        for status in registry.statuses():
            if status.entry.kind == kind and not status.error:
                plugin = getattr(registry, kind)(status.entry.name)
                assert all(isinstance(option, click.Option) for option in plugin.options())
