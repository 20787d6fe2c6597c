from __future__ import annotations

import fcntl
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ckptx.cli import main as cli
from ckptx.cli.examples import EXAMPLES
from ckptx.conversion import supervisor
from ckptx.conversion.request import ConversionRequest
from ckptx.registry import registry

ROOT = Path(registry.__file__).resolve().parents[2]

PLUGIN = """
import click
from ckptx.protocol.hookspecs import hookimpl

def option(*spelling, **more):
    return click.Option(list(spelling), **more)

class Loader:
    name = "one"
    capabilities = {}
    def options(self):
        return [option("--shared", type=int, help="As the loader says."), option("--one-only")]
    def detect(self, source): return source.suffix == ".one"
    def load(self, source, options, context): yield

class Saver:
    name = "two"
    capabilities = {}
    def options(self):
        return [option("--shared", type=int, help="As the saver says."),
                option("--two-size", "--two", type=int, default=1)]
    def plan(self, messages, options, context): ...

class Clash(Saver):
    name = "clash"
    def options(self): return [option("--shared", type=str)]

class Greedy(Saver):
    name = "greedy"
    def options(self): return [option("--overwrite", is_flag=True, default=True)]

@hookimpl
def register_loaders(register):
    register(Loader())

@hookimpl
def register_savers(register):
    for saver in (Saver(), Clash(), Greedy()):
        register(saver)
"""


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    site = tmp_path / "site"
    info = site / "one_two-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: one-two\nVersion: 1.0\n")
    points = ("loader_one", "saver_two", "saver_clash", "saver_greedy")
    (info / "entry_points.txt").write_text(
        "[ckptx]\n" + "".join(f"{point} = one_two_plugins\n" for point in points)
    )
    (site / "one_two_plugins.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(site))
    for cache in (registry.entries, registry._registered, registry._hooks):
        cache.cache_clear()
    yield
    sys.modules.pop("one_two_plugins", None)
    for cache in (registry.entries, registry._registered, registry._hooks):
        cache.cache_clear()


@pytest.fixture
def jobs(monkeypatch):
    """Return the list of jobs that would run."""
    found: list[ConversionRequest] = []

    class Done:
        def to_json(self) -> dict[str, int]:
            return {}

        def render(self, width: int) -> str:
            return "done"

    def convert(job: ConversionRequest, progress: object) -> Done:
        found.append(job)
        return Done()

    monkeypatch.setattr(supervisor, "convert", convert)
    return found


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    weights = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, np.float32)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"architectures": ["RewardModel"], "model_type": "own"}')
    return folder


def test_short_and_long_spelling_make_one_job(plugins, jobs, run, tmp_path):
    source = tmp_path / "x.one"
    source.touch()
    code, out, _ = run("convert", source, tmp_path / "y", "--to", "two", "--two", "3", "--shared=4")
    assert (code, out) == (0, "done\n")
    long = ["--loader", "one", "--saver", "two", "--two-size", "3", "--shared", "4"]
    code, _, _ = run(*long, "--load-dir", source, "--save-dir", tmp_path / "y", entry=cli.convert)
    assert code == 0
    assert jobs[0] == jobs[1]
    assert jobs[0].loader_options == {"shared": 4, "one_only": None}
    assert jobs[0].saver_options == {"shared": 4, "two_size": 3}


def test_options_may_stand_before_the_source(plugins, jobs, run, tmp_path):
    source = tmp_path / "x.one"
    source.touch()
    code, _, err = run(
        "convert", "--to=two", "--one-only", "7", "--dtype", "bf16", source, tmp_path / "y",
        "--max-memory", "1.5GiB", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert jobs[0].loader_options["one_only"] == "7"
    assert (jobs[0].source, jobs[0].dtype) == (source, "bfloat16")
    assert jobs[0].max_memory == 3 << 29


def test_help_of_chosen_plugins_shows_exactly_what_applies(plugins, run):
    _, out, _ = run("--loader", "one", "--saver", "two", "--help", entry=cli.convert)
    for heading in ("Options of loader one:", "Options of saver two:", "Engine:", "Conversion:"):
        assert heading in out
    assert out.count("--shared") == 1
    assert "--two-size, --two" in out
    assert "--max-shard-size" not in out


def test_help_without_plugins_names_the_known_ones(plugins, run):
    code, out, _ = run("--help", entry=cli.convert)
    assert code == 0
    assert "one" in out.partition("Known loaders:")[2]
    assert "--two-size" not in out


@pytest.mark.parametrize(
    ("saver", "message"),
    [
        ("clash", "--shared is declared differently by loader one and by saver clash"),
        ("greedy", "--overwrite is declared differently by ckptx and by saver greedy"),
    ],
)
def test_unequal_declarations_of_one_option_are_an_error(plugins, run, tmp_path, saver, message):
    code, _, err = run("convert", tmp_path, "y", "--from", "one", "--to", saver)
    assert code == 1
    assert message in err


def test_option_of_a_plugin_not_chosen_names_the_plugin(plugins, run, tmp_path):
    code, _, err = run("convert", tmp_path, "y", "--from=one", "--to=two", "--max-shard-size", "1G")
    assert code == 2
    assert "--max-shard-size belongs to saver 'hf' and saver 'hf_llava', which is not" in err
    code, _, err = run("convert", tmp_path, "y", "--from=one", "--to=two", "--nobodys", "1")
    assert code == 2
    assert "No such option" in err
    assert "nobodys" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["convert"], 2, "Missing"),
        (["convert", "nowhere", "y", "--to", "hf"], 1, "nowhere: no such file or directory"),
        (
            ["convert", "nowhere", "y", "--to", "hff"],
            1,
            "unknown saver 'hff' (did you mean 'hf'?); known savers:",
        ),
        (["convert", "a", "b", "--from=hf", "--to=gguf"], 1, "has no saver for it yet"),
        (["convert", "a", "b", "--from=hf", "--to=hf", "--max-memory=much"], 2, "is not a size"),
        (["convert", "a", "b", "--from=hf", "--to=hf", "--dtype=int4"], 2, "is not one of bf16"),
        (["inspect", "nowhere"], 2, "no such file or directory"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_every_error_is_one_line(run, arguments, code, message):
    found, out, err = run(*arguments)
    assert found == code
    assert not out
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert message in err


def test_internal_error_is_one_line_and_verbose_tells_all(jobs, run, monkeypatch, model, tmp_path):
    def broken(job: ConversionRequest, progress: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(supervisor, "convert", broken)
    code, _, err = run("convert", model, tmp_path / "y", "--to", "hf")
    assert (code, len(err.splitlines())) == (1, 1)
    assert err.startswith("error: internal error: KeyError: 'oops'")
    _, _, err = run("convert", model, tmp_path / "y", "--to", "hf", "--verbose")
    assert "Traceback" in err


def test_plan_writes_nothing_and_says_what_would_be(model, run, tmp_path):
    target = tmp_path / "y"
    code, out, err = run("plan", model, target, "--to", "hf", "--dtype", "bf16", "--json")
    assert code == 0, err
    content = json.loads(out)
    assert list(content["inexact"]) == ["float32 -> bfloat16"]
    assert [output["path"] for output in content["outputs"]] == ["config.json", "model.safetensors"]
    assert not target.exists()
    code, out, _ = run("plan", model, target, "--to", "hf")
    assert "model.safetensors" in out
    assert "refused" not in out
    target.mkdir()
    (target / "mine").touch()
    code, out, _ = run("plan", model, target, "--to", "hf", "--json")
    assert code == 0
    assert "exists, and holds 1 file (0 bytes) not written by ckptx" in json.loads(out)["refused"]


def test_inspect_and_verify_answer_and_tell_differences(model, run, tmp_path):
    code, out, err = run("inspect", model, "--json")
    assert code == 0, err
    assert json.loads(out)
    assert run("verify", model, model, "--quiet")[0] == 0
    other = tmp_path / "other"
    other.mkdir()
    save_file(
        {"a": np.zeros((3, 4), np.float32), "b": np.ones(5, np.float32)},
        other / "model.safetensors",
        {"format": "pt"},
    )
    code, out, err = run("verify", model, other)
    assert code == 1
    assert not err
    assert "a" in out


def test_plugins_lists_capabilities_and_errors(plugins, run):
    code, out, _ = run("plugins", "--json")
    rows = {(row["kind"], row["name"]): row for row in json.loads(out)["plugins"]}
    assert code == 0
    assert rows["loader", "hf"]["capabilities"]["formats"]
    assert rows["loader", "one"]["distribution"] == "one-two"
    assert rows["loader", "one"]["version"] == "1.0"
    code, out, _ = run("plugins", "--names")
    assert "one_two_plugins" not in sys.modules or code == 0
    assert out.splitlines().count("savers") == 1
    assert any(line.split() == ["two", "(one-two", "1.0)"] for line in out.splitlines())


@pytest.mark.parametrize("width", [60, 80, 200])
def test_plugins_stand_in_columns(width, plugins, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = run("plugins")[1].splitlines()
    assert max(map(len, lines)) <= width
    column = next(line for line in lines if line.startswith("  llama_mistral")).index("meta or hf")
    for line in lines:
        if line.startswith(" "):
            assert line[column - 2 : column] == "  ", line
            assert line[column] != " ", line


@pytest.mark.parametrize("name", [*EXAMPLES])
def test_help_ends_with_examples_that_parse(name, run, capsys):
    """Every option of an example is one that the command has."""
    if name == "convert.py":
        _, out, _ = run("--help", entry=cli.convert)
    else:
        _, out, _ = run(name, "--help")
    _, examples = out.split("Examples:")
    assert [line.strip() for line in examples.strip().splitlines()] == list(EXAMPLES[name])
    for example in EXAMPLES[name]:
        words = shlex.split(example, comments=True)
        if "--list" in words:  # which is done before the help
            continue
        entry = cli.convert if name == "convert.py" else cli.main
        options = run(*words[2 if name == "convert.py" else 1 :], "--help", entry=entry)[1]
        for word in words:
            assert not word.startswith("--") or word in options, (example, word)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["convert", "a", "b", "--to", "coer"], "unknown saver 'coer' (did you mean 'core'?)"),
        (["convert", "a", "b"], "say the format to write with --to: core, dcp, hf"),
        (["from-script", "model_mergr"], "(did you mean 'model_merger'?)"),
        (["verify", "--tokens", "two", ".", "."], "'two' is not a whole number"),
        (["verify", "--rtol", "two", ".", "."], "'two' is not a number"),
    ],
)
def test_mistyped_values_are_told_plainly(arguments, expected, run):
    code, _, err = run(*arguments)
    assert code
    assert err.startswith("error: ")
    assert expected in err


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["plugins", "--names"]])
def test_light_commands_import_nothing_heavy(arguments):
    code = (
        "import sys; from ckptx.cli.main import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        "print([m for m in ('numpy', 'torch', 'rich', 'pluggy', 'multiprocessing.connection')"
        " if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_convert_py_converts_from_any_directory(model, tmp_path):
    command = [sys.executable, ROOT / "convert.py", "--saver", "hf", "--load-dir", "model"]
    done = subprocess.run(
        [*command, "--save-dir", "deep/target"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "deep/target" / name).exists()
    assert "converted hf -> hf" in done.stdout
    again = subprocess.run(
        [*command, "--save-dir", "deep/target"], cwd=tmp_path, capture_output=True, text=True
    )
    assert again.returncode == 1
    refusal = again.stderr.splitlines()[-1]  # a slow machine shows progress before it
    assert refusal.startswith("error: ")
    assert "--overwrite" in refusal


def test_a_missing_source_is_named_though_the_target_exists(model, run, tmp_path):
    code, _, err = run("convert", tmp_path / "typo", model, "--to", "core", "--tp", "2")
    assert code == 1
    assert err == f"error: {tmp_path / 'typo'}: no such file or directory\n"


@pytest.mark.parametrize("command", [["inspect"], ["verify", "."], ["generate"], ["convert"]])
def test_a_target_that_is_not_finished_is_told(command, tmp_path, run):
    (tmp_path / "target.ckptx-partial").mkdir()
    more = [tmp_path / "other", "--to", "hf"] if command == ["convert"] else []
    code, _, err = run(*command, tmp_path / "target", *more)
    assert code
    assert "the conversion to it was interrupted; run the same command again" in err


def test_a_target_that_is_being_written_is_told(tmp_path, run):
    partial = tmp_path / "target.ckptx-partial"
    partial.mkdir()
    with (partial / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _, _, err = run("inspect", tmp_path / "target")
    assert f"the conversion to it is still running ({partial}); wait for it" in err


def test_nobody_is_told_to_remove_what_lies_beside_an_unfinished_target(tmp_path, model, run):
    models = tmp_path / "models"
    (models / "target.ckptx-partial").mkdir(parents=True)
    code, _, err = run("inspect", models)
    assert code == 1
    assert f"or remove {models / 'target.ckptx-partial'}, which is all that it has left" in err
    shutil.copytree(model, models / "whole")
    assert run("inspect", models)[2].endswith(f"a checkpoint lies below it: give {models}/whole\n")


def test_the_manifest_of_a_file_beside_a_model_does_not_go_with_it(tmp_path, model, run):
    source = tmp_path / "source"
    shutil.copytree(model, source)
    assert run("convert", source, source / "all.pt", "--to", "pytorch")[0] == 0
    assert (source / "all.pt.ckptx-manifest.json").is_file()
    assert run("convert", source, tmp_path / "target", "--to", "hf")[0] == 0
    assert not (tmp_path / "target" / "all.pt.ckptx-manifest.json").exists()
