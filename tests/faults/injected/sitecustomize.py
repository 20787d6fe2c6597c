"""Loaded by every process of a conversion under test: kills at a chosen step, and logs writes.

``CKPTX_FAULT`` is ``ROLE VICTIM STEP``: in process ROLE, at step number STEP, VICTIM (``self``,
``parent`` or ``all`` of the session) gets SIGKILL, or ``disk`` is filled: all of CKPTX_FAULT_DISK
but as many bytes as CKPTX_FAULT_LEFT says. Steps of the saver are its writes and syncs, those of
the others what they open, make, rename and remove in the scene. ``CKPTX_FAULT_LOG`` is where writes
and syncs are noted.
"""

import os
import signal
import sys
import threading

_fault = os.environ.get("CKPTX_FAULT", "").split()
_scene = os.environ.get("CKPTX_FAULT_SCENE", "\0")
_lock = threading.Lock()
_steps = 0


def _step(role: str) -> None:
    global _steps
    if not _fault or _fault[0] != role:
        return
    with _lock:
        _steps += 1
        due = _steps == int(_fault[2])
    if due:
        _strike(_fault[1])


def _strike(victim: str) -> None:
    if victim == "disk":
        disk = os.environ["CKPTX_FAULT_DISK"]
        status = os.statvfs(disk)
        size = status.f_bavail * status.f_frsize - int(os.environ["CKPTX_FAULT_LEFT"])
        if size > 0:
            ballast = os.open(f"{disk}/ballast", os.O_WRONLY | os.O_CREAT, 0o644)
            os.posix_fallocate(ballast, 0, size)
            os.close(ballast)
    elif victim == "all":
        os.killpg(0, signal.SIGKILL)
    else:
        os.kill(os.getpid() if victim == "self" else os.getppid(), signal.SIGKILL)


def _watch_bytes() -> None:
    log = os.open(os.environ["CKPTX_FAULT_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def path(descriptor: int) -> str:
        return os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115 - as short as can be

    def note(*words: object) -> None:
        os.write(log, ("\t".join(map(str, words)) + "\n").encode())

    def writing(real):
        def pwrite(descriptor, data, offset):
            _step("saver")
            count = real(descriptor, data, offset)
            note("write", path(descriptor), offset, count)
            return count

        return pwrite

    def syncing(real):
        def sync(descriptor):
            _step("saver")
            note("begin", path(descriptor), threading.get_ident(), 0)
            real(descriptor)
            note("end", path(descriptor), threading.get_ident(), 0)
            _step("saver")

        return sync

    os.pwrite = writing(os.pwrite)
    os.fsync = syncing(os.fsync)
    os.fdatasync = syncing(os.fdatasync)


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir") and any(
        isinstance(argument, str | os.PathLike) and str(argument).startswith(_scene)
        for argument in arguments
    ):
        _step(_role)


def _be_child() -> None:
    global _role, _steps
    _role, _steps = "child", 0
    _watch_bytes()


if _fault:
    _role = "parent"
    sys.addaudithook(_audit)
    os.register_at_fork(after_in_child=_be_child)
    if "--multiprocessing-fork" in sys.orig_argv:  # started anew, not a copy
        _be_child()
