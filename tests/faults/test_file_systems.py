"""File systems that lack what a disk has, terminals that are gone: real calls that fail."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ckptx.writing import lock
from ckptx.writing.lock import STALE

from .scene import CORE, PATIENCE, ROOT, digests

COMMAND = [sys.executable, "-c", "from ckptx.__main__ import main; main()", "convert"]


@pytest.fixture(scope="session")
def shim(tmp_path_factory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler builds the shim")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    source = Path(__file__).with_name("shim.c")
    flags = ["-shared", "-fPIC", "-O1", "-w", "-o", str(library), str(source), "-ldl"]
    subprocess.run([compiler, *flags], check=True)
    return library


@pytest.fixture
def convert(shim, sources, tmp_path):
    """The command, where calls fail as told; the target, and what is left beside it."""
    (tmp_path / "work").mkdir()

    def run(
        fault: str, *options: str, name: str = "target", **more: object
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "LD_PRELOAD": str(shim),
            "CKPTX_SHIM": fault,
            "CKPTX_SHIM_LOG": str(tmp_path / "bytes"),
        }
        target = str(tmp_path / "work" / name)
        command = [*COMMAND, str(sources[0]), target, *(options or CORE)]
        return subprocess.run(
            command,
            env=environment,
            timeout=PATIENCE,
            check=False,
            text=True,
            **{"capture_output": True, **more},
        )

    return run


@pytest.mark.parametrize(
    "fault",
    [
        *(f"fallocate:{code}" for code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)),
        "statvfs:0",
        f"statvfs:{errno.ENOSYS}",
        *(f"flock:{code}" for code in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)),
        *(f"fsyncdir:{code}" for code in (errno.EINVAL, errno.EOPNOTSUPP)),
        f"renameat2:{errno.EOPNOTSUPP}",
    ],
)
def test_what_a_file_system_lacks_is_done_without(convert, sources, tmp_path, fault):
    for _ in range(2):  # the second time in place of the first
        result = convert(fault, *CORE, "--overwrite")
        assert result.returncode == 0, result.stderr
        assert digests(tmp_path / "work/target") == sources[1]
        assert [path.name for path in (tmp_path / "work").iterdir()] == ["target"]
        assert not list((tmp_path / "work").rglob("*.ckptx-partial"))
    assert not (tmp_path / "bytes").exists()  # glibc's emulation writes a byte into every block


def test_a_file_system_that_renames_no_directory_is_refused_before_a_byte_moves(convert, tmp_path):
    result = convert(f"renamedir:{errno.EPERM}")
    assert result.returncode == 1
    assert "a directory cannot be renamed here" in result.stderr
    assert not any((tmp_path / "work").iterdir())


def test_a_single_file_whose_rename_fails_leaves_nothing(convert, tmp_path):
    result = convert(f"renameat2:{errno.EIO}", "--to", "pytorch", name="model.pt")
    assert result.returncode == 1, result.stdout
    assert "nothing was written" in result.stderr
    assert not any((tmp_path / "work").iterdir())


def test_a_pointer_that_cannot_be_written(convert, sources, tmp_path):
    result = convert(f"pointer:{errno.EPERM}")
    assert result.returncode == 1
    assert "is whole and in place" in result.stderr
    assert "write 'release' into" in result.stderr
    assert "nothing was written" not in result.stderr
    tracker = "latest_checkpointed_iteration.txt"
    expected = {name: one for name, one in sources[1].items() if name != tracker}
    assert digests(tmp_path / "work/target") == expected


def test_a_lock_by_name(convert, sources, tmp_path):
    """Of a process of this machine that lives, of one that has ended, of another machine."""
    partial = tmp_path / "work/target/release.ckptx-partial"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = os.uname().nodename
    for owner, refused in (
        (f"process {os.getpid()} on {here}, boot {boot}", True),
        (f"process {os.getpid()} on elsewhere, boot {boot}", True),
        (f"process {ended.pid} on {here}, boot {boot}", False),
        (f"process {os.getpid()} on {here}, boot of-another-time", False),
        (f"process {os.getpid()} on elsewhere, long ago", False),
    ):
        partial.mkdir(parents=True)
        (partial / "owner").write_text(owner)
        if "long ago" in owner:  # by the clock of the file system
            touched = (partial / "owner").stat().st_mtime - 2 * STALE
            os.utime(partial / "owner", (touched, touched))
        result = convert(f"flock:{errno.ENOSYS}")
        assert result.returncode == int(refused), result.stderr
        if refused:
            assert f"another conversion is writing it ({owner})" in result.stderr
            assert f"remove {partial / 'owner'} if it has ended" in result.stderr
            assert (partial / "owner").read_text() == owner
        else:
            assert digests(tmp_path / "work/target") == sources[1]
        shutil.rmtree(tmp_path / "work/target")


def test_who_locks_by_name_touches_the_file(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    monkeypatch.setattr(lock, "_REFRESHED", 0.0)
    held = lock.Lock(tmp_path / "partial", tmp_path / "target")
    held.acquire()
    owner = tmp_path / "partial" / "owner"
    os.utime(owner, (1, 1))
    while owner.stat().st_mtime == 1:
        pass
    held.release()
    assert not owner.exists()


def test_no_lock_is_asked_for(convert, sources, tmp_path):
    """Neither of the kernel nor by name: an owner that cannot be asked is in nobody's way."""
    partial = tmp_path / "work/target/release.ckptx-partial"
    partial.mkdir(parents=True)
    (partial / "owner").write_text("process 1 on elsewhere, boot unknown")
    assert convert(f"flock:{errno.ENOSYS}").returncode == 1
    result = convert(f"flock:{errno.EIO}", *CORE, "--no-lock")
    assert result.returncode == 0, result.stderr
    assert digests(tmp_path / "work/target") == sources[1]


@pytest.mark.parametrize("stdout", ["full", "closed", "pipe"])
def test_a_report_that_cannot_be_shown(convert, sources, tmp_path, stdout):
    """The target is whole: that is what the exit code says."""
    more: dict[str, object] = {"capture_output": False, "stderr": subprocess.PIPE}
    if stdout == "full":
        more["stdout"] = os.open("/dev/full", os.O_WRONLY)
    elif stdout == "closed":
        more["preexec_fn"] = lambda: os.close(1)
    else:
        reader, writer = os.pipe()
        os.close(reader)
        more["stdout"] = writer
    result = convert("", *CORE, **more)
    assert result.returncode == 0, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("note: the target is whole; its report cannot be shown: ")
    assert digests(tmp_path / "work/target") == sources[1]


def test_without_shared_memory_a_pipe_stands_in(convert, sources, tmp_path):
    allowed = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)
    if allowed.returncode:
        pytest.skip("this user may not mount anything")
    target = tmp_path / "work/target"
    words = [*COMMAND, str(sources[0]), str(target), *CORE]
    mount = 'mount -t tmpfs -o ro none /dev/shm && exec "$@"'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, "sh", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "a pipe stands in for the queue" in result.stderr
    assert digests(target) == sources[1]


MOUNTS = {
    "tmpfs": 'mount -t tmpfs none "$0"',
    # Without extents: fallocate is not there.
    "ext2": 'truncate -s 64M "$0.img" && mkfs.ext2 -q "$0.img" && mount -o loop "$0.img" "$0"',
    "vfat": 'truncate -s 64M "$0.img" && mkfs.vfat "$0.img" && mount -o loop "$0.img" "$0"',
}


@pytest.mark.parametrize("kind", MOUNTS)
def test_real_file_systems(kind, convert, sources, tmp_path):
    """Mounted in a namespace of their own, which ends with the command."""
    work = tmp_path / "work"
    if subprocess.run(
        ["unshare", "-m", "sh", "-c", MOUNTS[kind], str(work)], capture_output=True, check=False
    ).returncode:
        pytest.skip(f"this user may not make or mount {kind}, or nothing here can")
    run = f'{MOUNTS[kind]} && shift && "$@" && cp -r "$0/target" "$0.copy" && ls -A "$0"'
    command = [*COMMAND, str(sources[0]), str(work / "target"), *CORE]
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", run, str(work), "sh", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert digests(Path(f"{work}.copy")) == sources[1]
    left = set(result.stdout.split()[-2:]) - {"lost+found", "target"}
    assert not any("partial" in name for name in left)


def test_no_working_and_no_home_directory(convert, sources, tmp_path, monkeypatch):
    monkeypatch.delenv("HOME")
    gone = tmp_path / "gone"

    def enter() -> None:
        gone.mkdir()
        os.chdir(gone)
        gone.rmdir()

    for _ in range(2):
        result = convert("", *CORE, "--overwrite", preexec_fn=enter)
        assert result.returncode == 0, result.stderr
    assert digests(tmp_path / "work/target") == sources[1]
