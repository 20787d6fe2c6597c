from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptx.errors import ConversionError, CutShortError, PlanError
from ckptx.protocol.contracts import SavePlan
from ckptx.storage.file_plan import FilePlan
from ckptx.writing import atomic, publish
from ckptx.writing.atomic import rename_new
from ckptx.writing.publish import Target


def plan(name: str = "out.bin", size: int = 4, **more: object) -> SavePlan:
    return SavePlan([FilePlan(name, size, ())], **more)


def publish_plan(target: Target, planned: SavePlan, content: bytes = b"new!") -> list[str]:
    with target:
        staging = target.prepare(planned)
        (staging / planned.files[0].path).write_bytes(content)
        listed = {planned.files[0].path: {"bytes": len(content)}}
        (staging / publish.manifest_path(planned)).write_text(json.dumps({"files": listed}))
        return target.publish()


def fail(
    target: Target, planned: SavePlan, during: Callable[[Path], None] = lambda _: None
) -> None:
    """Write half of a plan and fail."""
    with target:
        staging = target.prepare(planned)
        (staging / planned.files[0].path).write_bytes(b"half")
        during(staging)
        raise RuntimeError


def publish_late(target: Target, planned: SavePlan, meanwhile: Callable[[], None]) -> None:
    with target:
        (target.prepare(planned) / planned.files[0].path).write_bytes(b"new!")
        meanwhile()
        target.publish()


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_target_appears_whole(tmp_path):
    publish_plan(Target(tmp_path / "a" / "b", []), plan())
    assert names(tmp_path) == {"a", "a/b", "a/b/out.bin", "a/b/ckptx-manifest.json"}


def test_names_are_on_disk_before_and_after_the_rename(tmp_path, monkeypatch):
    synced = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink(), target.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    target = tmp_path / "a" / "b"
    publish_plan(Target(target, []), plan())
    staged = (tmp_path / "a" / "b.ckptx-partial" / "new", False)
    assert staged in synced
    # The new directory "a" has a name, too.
    assert [one for one in synced if one[1]] == [(tmp_path / "a", True), (tmp_path, True)]
    assert synced.index(staged) < synced.index((tmp_path / "a", True))


def test_error_removes_everything_that_was_created(tmp_path):
    def look(staging: Path) -> None:
        assert staging == tmp_path / "a/b/c.ckptx-partial/new"
        assert (staging / "out.bin").exists()

    with pytest.raises(RuntimeError):
        fail(Target(tmp_path / "a" / "b" / "c", []), plan(), look)
    assert names(tmp_path) == set()


def test_folder_that_others_use_meanwhile_is_kept(tmp_path):
    with pytest.raises(RuntimeError):
        fail(Target(tmp_path / "a" / "b", []), plan(), lambda _: (tmp_path / "a/other").touch())
    assert names(tmp_path) == {"a", "a/other"}


def test_existing_target_is_refused_and_kept(tmp_path):
    old = tmp_path / "target"
    old.mkdir()
    (old / "old").touch()
    with pytest.raises(PlanError, match=r"exists, and holds 1 file .* not written by ckptx"):
        publish_plan(Target(old, []), plan())
    assert names(tmp_path) == {"target", "target/old"}
    publish_plan(Target(tmp_path / "new", []), plan())
    with pytest.raises(PlanError, match="exists; choose another target, or replace it with --over"):
        publish_plan(Target(tmp_path / "new", []), plan())


def test_empty_directory_may_be_the_target(tmp_path):
    (tmp_path / "target").mkdir()
    publish_plan(Target(tmp_path / "target", []), plan())
    assert (tmp_path / "target/out.bin").read_bytes() == b"new!"


@pytest.mark.parametrize("kernel", [True, False])
def test_overwrite_replaces_the_old_target(tmp_path, monkeypatch, kernel):
    if not kernel:
        monkeypatch.setattr(atomic, "_renameat2", lambda *a: False)
    old = tmp_path / "target"
    publish_plan(Target(old, []), plan("old.bin"), b"old")
    old.chmod(0o2750)
    (note,) = publish_plan(Target(old, [], overwrite=True), plan())
    assert note == f"replaced {old}: 2 files, 39 bytes, written by ckptx"
    assert names(tmp_path) == {"target", "target/out.bin", "target/ckptx-manifest.json"}
    assert stat.S_IMODE(old.stat().st_mode) == 0o2750


def a_home(path: Path) -> None:
    (path / "photos").mkdir(parents=True)
    (path / "photos" / "1.jpg").write_bytes(b"photo")
    (path / "proj").mkdir()
    (path / "link").symlink_to("photos")


def a_run_below_ours(path: Path) -> None:
    publish_plan(Target(path, []), plan())
    (path / "optimizer.pt").write_bytes(b"state")


def an_edited_target(path: Path) -> None:
    publish_plan(Target(path, []), plan())
    (path / "out.bin").write_bytes(b"edited")


def a_damaged_manifest(path: Path) -> None:
    publish_plan(Target(path, []), plan())
    (path / "ckptx-manifest.json").write_bytes(b'{"files": [')


@pytest.mark.parametrize(
    ("lies_there", "said"),
    [
        (a_home, "2 files (11 bytes) not written by ckptx or changed since: link, photos/1.jpg"),
        (a_run_below_ours, "1 file (5 bytes) not written by ckptx or changed since: optimizer.pt"),
        (an_edited_target, "1 file (6 bytes) not written by ckptx or changed since: out.bin"),
        (a_damaged_manifest, "2 files (15 bytes) not written by ckptx or changed since"),
    ],
)
def test_what_others_wrote_goes_only_when_it_is_asked_for(tmp_path, lies_there, said):
    old = tmp_path / "target"
    lies_there(old)
    before = names(tmp_path)
    with pytest.raises(PlanError) as refused:
        publish_plan(Target(old, [], overwrite=True), plan())
    assert said in str(refused.value)
    assert "--overwrite=foreign" in str(refused.value)
    assert names(tmp_path) == before
    (note,) = publish_plan(Target(old, [], overwrite="foreign"), plan())
    assert "of them not written by ckptx or changed since" in note
    assert names(tmp_path) == {"target", "target/out.bin", "target/ckptx-manifest.json"}


def test_a_megatron_root_of_ours_is_ours(tmp_path):
    root = tmp_path / "root"
    publish_plan(Target(root, []), megatron("release", b"release"))
    (note,) = publish_plan(Target(root, [], overwrite=True), plan())
    assert "3 files" in note
    assert "written by ckptx" in note
    assert names(root) == {"out.bin", "ckptx-manifest.json"}
    publish_plan(Target(tmp_path / "run", []), megatron("release", b"release"))
    (tmp_path / "run" / "tensorboard").write_bytes(b"log")
    with pytest.raises(PlanError, match=r"holds 1 file .*: tensorboard;"):
        publish_plan(Target(tmp_path / "run", [], overwrite=True), plan())


def test_what_others_wrote_while_the_conversion_ran_is_kept(tmp_path):
    old = tmp_path / "target"
    publish_plan(Target(old, []), plan())
    target = Target(old, [], overwrite=True)
    with pytest.raises(CutShortError, match=r"holds 1 file .*: mine"):
        publish_late(target, plan(), (old / "mine").touch)
    assert (old / "mine").exists()


def test_links_and_the_cache_of_the_hub_are_never_replaced(tmp_path):
    publish_plan(Target(tmp_path / "real", []), plan())
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(PlanError, match=r"link: is a symbolic link to .*/real"):
        publish_plan(Target(tmp_path / "link", [], overwrite="foreign"), plan())
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    publish_plan(Target(snapshot, []), plan())
    with pytest.raises(PlanError, match="cache of the Hugging Face Hub"):
        publish_plan(Target(snapshot, [], overwrite="foreign"), plan())


def test_failed_overwrite_keeps_the_old_target(tmp_path):
    old = tmp_path / "target"
    old.mkdir()
    (old / "old").touch()
    with pytest.raises(RuntimeError):
        fail(Target(old, [], overwrite="foreign"), plan())
    assert names(tmp_path) == {"target", "target/old"}


def test_old_target_of_a_run_killed_between_two_renames_comes_back(tmp_path):
    aside = tmp_path / "target.ckptx-partial" / "old"
    aside.mkdir(parents=True)
    (aside / "old").touch()
    with pytest.raises(RuntimeError):
        fail(Target(tmp_path / "target", []), plan())
    assert names(tmp_path) == {"target", "target/old"}


def test_target_that_appeared_meanwhile_is_not_replaced(tmp_path):
    def meanwhile() -> None:
        (tmp_path / "target").mkdir()
        (tmp_path / "target" / "theirs").touch()

    with pytest.raises(ConversionError, match="cannot be put in place"):
        publish_late(Target(tmp_path / "target", []), plan(), meanwhile)
    assert names(tmp_path) == {"target", "target/theirs"}


def test_file_that_appeared_meanwhile_is_not_replaced(tmp_path):
    def meanwhile() -> None:
        (tmp_path / "model.pt").write_bytes(b"theirs")

    planned = plan("model.pt", single_file=True)
    with pytest.raises(ConversionError, match="cannot be put in place"):
        publish_late(Target(tmp_path / "model.pt", []), planned, meanwhile)
    assert (tmp_path / "model.pt").read_bytes() == b"theirs"


@pytest.mark.parametrize("overwrite", [False, True])
def test_single_file_has_its_manifest_beside_it(tmp_path, overwrite):
    if overwrite:
        (tmp_path / "model.pt").write_bytes(b"old")
        with pytest.raises(PlanError, match=r"holds 1 file .* not written by ckptx"):
            publish_plan(
                Target(tmp_path / "model.pt", [], True), plan("model.pt", single_file=True)
            )
    target = Target(tmp_path / "model.pt", [], "foreign" if overwrite else False)
    publish_plan(target, plan("model.pt", single_file=True))
    assert names(tmp_path) == {"model.pt", "model.pt.ckptx-manifest.json"}
    assert (tmp_path / "model.pt").read_bytes() == b"new!"


def test_single_file_of_ours_is_replaced_by_one_of_another_size(tmp_path):
    """Its manifest lies beside it, and is looked at before that of the new file replaces it."""
    file, made = tmp_path / "model.pt", plan("model.pt", single_file=True)
    publish_plan(Target(file, []), made, b"of another size")
    (note,) = publish_plan(Target(file, [], overwrite=True), made)
    assert note == f"replaced {file}: 1 file, 15 bytes, written by ckptx"
    assert file.read_bytes() == b"new!"
    manifest = json.loads((tmp_path / "model.pt.ckptx-manifest.json").read_bytes())
    assert manifest["files"] == {"model.pt": {"bytes": 4}}


def megatron(iteration: str, tracker: bytes) -> SavePlan:
    return plan(directory=iteration, pointers={"latest_checkpointed_iteration.txt": tracker})


def test_tracker_of_a_new_megatron_root_is_written_last(tmp_path):
    publish_plan(Target(tmp_path / "root", []), megatron("release", b"release"))
    assert (tmp_path / "root/latest_checkpointed_iteration.txt").read_bytes() == b"release"
    assert (tmp_path / "root/release/out.bin").exists()


def test_other_iteration_and_its_tracker_are_left_as_they_are(tmp_path):
    root = tmp_path / "root"
    publish_plan(Target(root, []), megatron("iter_0000010", b"10"))
    (note,) = publish_plan(Target(root, []), megatron("iter_0000020", b"20"))
    assert "stays as it is (10)" in note
    assert (root / "latest_checkpointed_iteration.txt").read_bytes() == b"10"
    (note,) = publish_plan(Target(root, [], overwrite=True), megatron("iter_0000020", b"20"))
    assert note.startswith(f"replaced {root / 'iter_0000020'}: 2 files")
    assert (root / "latest_checkpointed_iteration.txt").read_bytes() == b"20"
    assert (root / "iter_0000010/out.bin").exists()


def test_megatron_root_is_not_replaced_by_something_else(tmp_path):
    publish_plan(Target(tmp_path / "root", []), megatron("iter_0000010", b"10"))
    with pytest.raises(PlanError, match=r"holds Megatron iterations \(iter_0000010\)"):
        publish_plan(Target(tmp_path / "root", [], overwrite=True), plan())
    assert (tmp_path / "root/iter_0000010/out.bin").exists()


def test_the_source_as_target_is_refused(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    link = tmp_path / "link"
    link.symlink_to(source)
    for target in (source, link):
        with pytest.raises(PlanError, match="is the source itself"):
            Target(target, [source], overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_in_the_source_is_replaced(tmp_path, overwrite):
    source = tmp_path / "source"
    mine = source / "sub" / "mine"
    mine.parent.mkdir(parents=True)
    mine.write_text("keep")
    for target in (mine, mine.parent):
        for made in (plan(), megatron("release", b"release")):
            with pytest.raises(PlanError):
                publish_plan(Target(target, [source], overwrite), made)
    assert [path.name for path in source.rglob("*")] == ["sub", "mine"]
    assert mine.read_text() == "keep"


@pytest.mark.parametrize("target", ["sub", "sub/deeper"])
def test_a_new_place_in_the_source_is_like_any_other(tmp_path, target):
    source = tmp_path / "source"
    source.mkdir()
    publish_plan(Target(source / target, [source]), plan())
    assert (source / target / "out.bin").is_file()
    assert not list(source.rglob("*.ckptx-partial"))


def test_source_in_the_target_is_refused(tmp_path):
    source = tmp_path / "target" / "source"
    source.mkdir(parents=True)
    with pytest.raises(PlanError, match="contains the source"):
        publish_plan(Target(tmp_path / "target", [source], overwrite=True), plan())
    publish_plan(Target(tmp_path / "target", [source]), megatron("release", b"release"))


def test_what_the_source_links_to_is_not_replaced(tmp_path, write_llama, run):
    real = write_llama(tmp_path / "real")
    before = (real / "model.safetensors").read_bytes()
    variant = tmp_path / "variant"
    variant.mkdir()
    (variant / "config.json").write_bytes((real / "config.json").read_bytes())
    (variant / "model.safetensors").symlink_to("../real/model.safetensors")
    for command in ("convert", "plan"):
        options = ("--to", "hf", "--dtype", "bf16", "--overwrite")
        code, out, err = run(command, variant, real, *options)
        said = " ".join((out + err).split())
        assert f"contains the source {real / 'model.safetensors'}, by the link" in said
        assert code == (command == "convert")
    assert (real / "model.safetensors").read_bytes() == before
    assert run("convert", variant, tmp_path / "fine", "--to", "hf", "-q")[0] == 0
    file = real / "model.safetensors"
    code, _, err = run("convert", variant, file, "--to", "pytorch", "--overwrite")
    assert code == 1
    assert file.read_bytes() == before, err


def test_iteration_that_is_a_link_to_nothing_is_refused_before_the_copy(tmp_path):
    (tmp_path / "release").symlink_to("nowhere")
    target = Target(tmp_path, [], overwrite=True)
    with pytest.raises(PlanError, match="a link to nothing"), target:
        target.prepare(megatron("release", b"release"))


def test_working_directory_and_repositories_are_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    with pytest.raises(PlanError, match="working or home directory"):
        publish_plan(Target(tmp_path / "here", [], overwrite=True), plan())
    (tmp_path / "repo" / ".git").mkdir(parents=True)
    with pytest.raises(PlanError, match="repository"):
        publish_plan(Target(tmp_path / "repo", [], overwrite=True), plan())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_parent_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PlanError, match="is not writable"):
            Target(tmp_path / "target", [])
    finally:
        tmp_path.chmod(0o700)


def test_unwritable_parent_is_refused_for_root_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *a: False)
    with pytest.raises(PlanError, match="is not writable"):
        Target(tmp_path / "target", [])


def test_disk_is_checked_before_the_first_byte(tmp_path):
    message = r"the disk /.* has .* free, .* less than is needed; free space"
    with pytest.raises(ConversionError, match=message):
        publish_plan(Target(tmp_path / "target", []), plan(size=1 << 50))
    assert names(tmp_path) == set()


@pytest.mark.parametrize("name", ["../out.bin", "/out.bin", "a/../../out.bin"])
def test_no_path_leads_out_of_the_target(tmp_path, name):
    with pytest.raises(PlanError, match="must stay inside the target"):
        publish_plan(Target(tmp_path / "target", []), plan(name))


def test_two_runs_never_write_one_target(tmp_path):
    with Target(tmp_path / "target", []) as first:
        first.prepare(plan())
        with (
            pytest.raises(ConversionError, match=rf"process {os.getpid()} on "),
            Target(tmp_path / "target", []) as second,
        ):
            second.prepare(plan())
        assert (tmp_path / "target.ckptx-partial/new").is_dir()
        first.publish()
    assert names(tmp_path) == {"target"}


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    stale = tmp_path / "target.ckptx-partial" / "new" / "deep"
    stale.mkdir(parents=True)
    (stale / "half").touch()
    (tmp_path / "target.ckptx-partial" / "lock").write_text("process 1 on elsewhere")
    publish_plan(Target(tmp_path / "target", []), plan())
    assert names(tmp_path) == {"target", "target/out.bin", "target/ckptx-manifest.json"}


def test_lock_of_a_finished_run_is_not_taken_for_a_live_one(tmp_path, monkeypatch):
    real, calls = fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        if not calls:  # the owner finishes just before we get its lock
            (tmp_path / "target.ckptx-partial/lock").unlink()
            (tmp_path / "target.ckptx-partial").rmdir()
        calls.append(descriptor)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    publish_plan(Target(tmp_path / "target", []), plan())
    assert len(calls) == 2
    assert (tmp_path / "target/out.bin").exists()


def test_rename_without_kernel_support_says_so(monkeypatch, tmp_path):
    class Library:
        def __init__(self, *args: object, **kwargs: object) -> None:
            self.renameat2 = lambda *a: -1

    monkeypatch.setattr(atomic.ctypes, "CDLL", Library)
    monkeypatch.setattr(atomic.ctypes, "get_errno", lambda: errno.ENOSYS)
    (tmp_path / "a").touch()
    rename_new(tmp_path / "a", tmp_path / "b")
    assert names(tmp_path) == {"b"}
    (tmp_path / "a").touch()
    with pytest.raises(FileExistsError):
        rename_new(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("single_file", [False, True])
def test_a_pipe_or_a_device_is_not_replaced(single_file, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    target = Target(tmp_path / "pipe", [], overwrite=True)
    with pytest.raises(PlanError, match="is a pipe, a socket or a device"):
        publish_plan(target, plan(single_file=single_file))
    assert (tmp_path / "pipe").is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
