from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
from pathlib import Path

import pytest

from ckptx.conversion import supervisor
from ckptx.errors import ConversionError, FormatError, PlanError, PluginError
from ckptx.writing.publish import Target

from .conftest import is_gone, session, wait_for

pytestmark = pytest.mark.timeout(60)


def test_a_conversion_moves_the_bytes_and_publishes_once(scene):
    report = supervisor.convert(scene.job())
    assert (scene.target / "out.bin").read_bytes() == (scene.source / "data.bin").read_bytes()
    assert {path.name for path in scene.target.iterdir()} == {"out.bin", "ckptx-manifest.json"}
    assert report.facts.tensors == 100
    assert report.facts.bytes_out == 800
    assert not multiprocessing.active_children()


def test_manifest_is_equal_for_equal_input_and_names_no_machine(scene):
    supervisor.convert(scene.job())
    first = (scene.target / "ckptx-manifest.json").read_bytes()
    supervisor.convert(scene.job(overwrite=True, threads=1))
    assert (scene.target / "ckptx-manifest.json").read_bytes() == first
    assert os.fsencode(scene.root) not in first
    content = json.loads(first)
    assert content["written_by"].keys() == {"ckptx", "fake-plugins"}
    entry = content["files"]["out.bin"]["tensors"][3]
    assert entry["name"] == "t3"
    assert entry["sources"] == [{"file": "data.bin", "bytes": [24, 32]}]


@pytest.mark.parametrize(
    ("loader_fault", "saver_fault", "kind", "message"),
    [
        ("raise", "", ConversionError, "loader 'fake' failed: ValueError: broken by request"),
        ("ours", "", FormatError, "data.bin: broken by request"),
        ("", "raise", ConversionError, "saver 'fake' failed: ValueError: broken by request"),
        ("", "ours at start", FormatError, "data.bin: broken by request"),
        ("exit 1", "", ConversionError, "loader 'fake' stopped with exit code 1"),
        ("exit 0 at start", "", ConversionError, "loader 'fake' stopped early, with exit code 0"),
        ("", "exit 1", ConversionError, "saver 'fake' stopped with exit code 1"),
        ("", "exit 0", ConversionError, "saver 'fake' stopped early, with exit code 0"),
        ("sysexit 3", "", ConversionError, "loader 'fake' called exit(3)"),
        ("", "sysexit 0", ConversionError, "saver 'fake' called exit(0)"),
        ("kill at start", "", ConversionError, "loader 'fake' was killed by signal 9 (SIGKILL)"),
        ("kill", "", ConversionError, "loader 'fake' was killed by signal 9 (SIGKILL)"),
        ("", "kill at start", ConversionError, "saver 'fake' was killed by signal 9 (SIGKILL)"),
        ("", "kill", ConversionError, "saver 'fake' was killed by signal 9 (SIGKILL)"),
        ("", "kill while writing", ConversionError, "saver 'fake' was killed by signal 9"),
        ("", "raise while writing", ConversionError, "saver 'fake' failed: ValueError"),
        ("lambda", "", PluginError, "cannot travel between processes (Tensors 'passthrough')"),
        ("no end", "", PluginError, "ended without sending End"),
        ("after end", "", PluginError, "sent End, expected nothing"),
        ("", "lazy", PluginError, "returned before it had read all messages"),
    ],
)
def test_any_failure_stops_both_and_leaves_nothing(scene, loader_fault, saver_fault, kind, message):
    with pytest.raises(kind, match=re.escape(message)) as caught:
        supervisor.convert(scene.job(loader_fault, saver_fault))
    assert not multiprocessing.active_children()
    assert "\n" not in str(caught.value)
    scene.assert_clean()


def test_both_are_gone_before_the_target_is_cleaned(scene, monkeypatch):
    """Whoever still writes would make anew what is being removed."""
    alive: list[object] = []
    leave = Target.__exit__

    def watched(target: Target, *error: object) -> None:
        alive.extend(multiprocessing.active_children())
        leave(target, *error)

    monkeypatch.setattr(Target, "__exit__", watched)
    with pytest.raises(ConversionError, match="broken by request"):
        supervisor.convert(scene.job("raise"))
    assert not alive


@pytest.mark.parametrize("fault", ["kill when full", "exit 1 when full", "raise when full"])
def test_saver_that_dies_while_the_queue_is_full_does_not_hang(scene, fault):
    with pytest.raises(ConversionError, match="saver 'fake'"):
        supervisor.convert(scene.job("endless", fault, max_queue_size=1))
    assert is_gone(scene.pid("endless"))
    scene.assert_clean()


def test_the_first_cause_is_reported_with_the_traceback_of_the_child(scene):
    with pytest.raises(FormatError) as caught:
        supervisor.convert(scene.job("ours", "raise when full", max_queue_size=200))
    assert type(caught.value) is FormatError
    assert "in fail" in "".join(caught.value.__notes__)


def test_plan_that_is_refused_by_the_target_stops_the_children(scene):
    scene.target.mkdir()
    (scene.target / "mine").touch()
    with pytest.raises(PlanError, match="exists, and holds 1 file"):
        supervisor.convert(scene.job())
    assert [path.name for path in scene.target.iterdir()] == ["mine"]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"]
)
@pytest.mark.parametrize("where", ["--loader-fault=endless", "--saver-fault=sleep while writing"])
def test_interrupt_ends_everything(scene, signum, code, where):
    process = scene.start(where)
    child = scene.pid(where.partition("=")[2].removesuffix(" while writing"))
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)  # what a terminal does on Ctrl-C
    else:
        process.send_signal(signum)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code
    lines = [line for line in err.splitlines() if "plugin that prints" not in line]
    assert lines == [f"error: stopped by {signum.name}; nothing was written"]
    assert not out
    assert is_gone(child)
    wait_for(lambda: not session(process.pid), seconds=5)
    scene.assert_clean()


def test_children_die_with_a_killed_parent_and_the_next_run_cleans_up(scene):
    process = scene.start("--loader-fault=", "--saver-fault=sleep while writing")
    saver = scene.pid("sleep")
    process.kill()
    process.communicate(timeout=20)
    wait_for(lambda: is_gone(saver), seconds=5)
    wait_for(lambda: not session(process.pid), seconds=5)
    assert {path.name for path in scene.root.iterdir() if path.suffix != ".pid"} == {
        "source",
        "site",
        "target.ckptx-partial",
    }
    supervisor.convert(scene.job())
    assert (scene.target / "out.bin").stat().st_size == 800
    assert not Path(f"{scene.target}.ckptx-partial").exists()


def test_second_run_for_one_target_is_refused(scene):
    process = scene.start("--saver-fault=sleep while writing")
    scene.pid("sleep")
    try:
        with pytest.raises(ConversionError, match=rf"another .* \(process {process.pid} on "):
            supervisor.convert(scene.job())
        assert Path(f"{scene.target}.ckptx-partial/new/out.bin").exists()
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    scene.assert_clean()


def test_json_on_stdout_is_whole_even_if_a_plugin_prints(scene):
    process = scene.start("--json")
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert json.loads(out)["tensors"] == 100
    assert "a plugin that prints" in err


def test_error_is_one_line_and_verbose_adds_the_traceback_of_the_child(scene):
    process = scene.start("--loader-fault=raise", "--quiet")
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err.splitlines()[-1] == (
        "error: loader 'fake' failed: ValueError: broken by request; nothing was written"
    )
    assert "Traceback" not in err
    process = scene.start("--loader-fault=raise", "--verbose")
    out, err = process.communicate(timeout=30)
    assert 'raise ValueError("broken by request")' in err
    assert not out
