"""The lock of a partial directory: by the kernel, or by a file where the file system cannot."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import threading
from pathlib import Path

from ckptx.errors import ConversionError, PlanError
from ckptx.storage.partial import LOCK, OWNER

_REFRESHED = 60.0  # seconds between two touches of the file that locks by name
STALE = 900.0
"""Seconds without a touch after which another machine's file counts for nothing."""
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
"""What file systems without flock return: Lustre mounted without it, some NFS and FUSE."""


class Lock:
    """Holds a partial directory for this process, from `acquire` to `release`.

    ``flock`` ends with the process. Without it a file that only one process can create names its
    owner and is touched while it is held; it counts for nothing if that process has ended on this
    machine, or has not touched it for `STALE` seconds by the file system's own clock. Where none is
    ``wanted`` nothing is held: who asked for that sees to it that nobody else writes there.
    """

    def __init__(self, partial: Path, target: Path, *, wanted: bool = True) -> None:
        self._partial, self._target, self._wanted = partial, target, wanted
        self._descriptor = -1
        self._owner: Path | None = None
        self._released = threading.Event()

    def acquire(self) -> None:
        """Make the directory and hold it.

        Raises:
            ConversionError: another process holds it.
            PlanError: it cannot be made.
        """
        while self._descriptor < 0:
            try:
                self._partial.mkdir(exist_ok=True)
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
                descriptor = os.open(self._partial / LOCK, flags, 0o644)
            except FileNotFoundError:
                continue  # the run that held it has just removed it
            except OSError as error:
                raise PlanError(f"{self._partial}: cannot be written: {error.strerror}") from error
            try:
                self._take(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(descriptor), (self._partial / LOCK).stat()):
                    self._descriptor = descriptor
                    break
            os.close(descriptor)  # locked a file that its owner had removed: try again

    def _take(self, descriptor: int) -> None:
        if not self._wanted:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            raise self._refusal(owner or "just started", "wait for it") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise PlanError(f"{self._partial}: cannot be locked: {error.strerror}") from error
            self._take_by_name()

    def _take_by_name(self) -> None:
        place = self._partial / OWNER
        while self._owner is None:
            try:
                with place.open("x") as file:
                    file.write(_signature())
                self._owner = place
                threading.Thread(target=self._refresh, args=(place,), daemon=True).start()
            except FileExistsError:
                with contextlib.suppress(FileNotFoundError):
                    found = place.read_text(errors="replace")
                    if not has_ended(found) and not self._is_stale(place):
                        advice = f"wait for it, or remove {place} if it has ended"
                        raise self._refusal(found.strip() or "just started", advice) from None
                    place.unlink()
            except OSError as error:
                raise PlanError(f"{place}: cannot be written: {error.strerror}") from error

    def _refresh(self, owner: Path) -> None:
        # Signals are for the thread that watches the children.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while not self._released.wait(_REFRESHED):
            with contextlib.suppress(OSError):
                os.utime(owner)

    def _is_stale(self, owner: Path) -> bool:
        """Return whether nobody has touched the file for long; the lock was opened just now."""
        os.utime(self._partial / LOCK)
        return (self._partial / LOCK).stat().st_mtime - owner.stat().st_mtime > STALE

    def _refusal(self, owner: str, advice: str) -> ConversionError:
        return ConversionError(
            f"{self._target}: another conversion is writing it ({owner}); {advice}, or choose "
            "another target"
        )

    def sign(self) -> None:
        """Say in the lock who holds it."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(
            self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0
        )

    def release(self) -> None:
        """Let go of the directory, whatever is left of it."""
        self._released.set()
        if self._owner is not None:
            with contextlib.suppress(OSError):
                self._owner.unlink()
            self._owner = None
        os.close(self._descriptor)
        self._descriptor = -1


def _signature() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}, boot {_boot()}\n"


def _boot() -> str:
    """Return what names this run of the kernel, empty where nothing does."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def has_ended(signature: str) -> bool:
    """Return whether the process that signed so is known to have ended: one of this machine."""
    words = signature.replace(",", "").split()
    if len(words) < 4 or words[3] != socket.gethostname():
        return False
    boot = _boot()
    if boot and words[5:] != [boot]:
        return True
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return True
    except (ValueError, OSError, OverflowError):  # it is another user's, or nothing is known
        return False
    return False
