"""Files and directories that appear whole or not at all, and stay after a power cut."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from ckptx.errors import ConversionError
from ckptx.writing.disk import shortage

_NOT_THERE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF}
"""What a file system returns for what it does not have."""
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2  # linux include/uapi/linux/fs.h


def write_durable(path: Path, content: bytes) -> None:
    """Write a small file and wait until it is on disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:  # a file system that has no such thing has nothing to wait for
        if error.errno not in _NOT_THERE:
            raise
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """Wait until every file and directory below ``root`` is on disk."""
    for folder, _, names in os.walk(root):
        for name in names:
            descriptor = os.open(Path(folder, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(folder))


def exchange(new: Path, old: Path, aside: Path) -> None:
    """Let two directories trade places at once; without kernel support ``old`` moves ``aside``."""
    if _renameat2(new, old, _RENAME_EXCHANGE):
        return
    old.rename(aside)  # `rescue` undoes this if we are killed before the next line
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise


def rename_new(source: Path, target: Path) -> None:
    """Rename a file to a name that must be free."""
    if not _renameat2(source, target, _RENAME_NOREPLACE):
        if target.exists():
            raise FileExistsError(errno.EEXIST, "exists by now", str(target))
        source.rename(target)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Return whether the rename was done; False if this system cannot do it that way."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_fdcwd = -100  # linux include/uapi/linux/fcntl.h
    paths = os.fsencode(source), os.fsencode(target)
    if function(at_fdcwd, paths[0], at_fdcwd, paths[1], flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_THERE:
        return False
    raise OSError(code, os.strerror(code), str(target))


def rescue(partial: Path, target: Path) -> None:
    """Put an old target back that a killed run had moved aside and not yet replaced."""
    if (partial / "old").exists() and not target.exists():
        (partial / "old").rename(target)


def keep_only(root: Path, files: Collection[str]) -> None:
    """Remove everything below ``root`` but regular files at these paths; follow no link."""
    folders = {parent for file in files for parent in PurePosixPath(file).parents}
    for place, names, others in os.walk(root):
        here = PurePosixPath(Path(place).relative_to(root))
        for name in [*names, *others]:
            path = Path(place, name)
            wanted = path.is_dir() if here / name in folders else str(here / name) in files
            if path.is_symlink() or not wanted or (path.is_dir() and here / name not in folders):
                remove(path)
        names[:] = [name for name in names if here / name in folders]


def inode(path: Path) -> str:
    """Return the inode of a path in words, which a rename does not change; empty if none."""
    try:
        status = path.lstat()
    except OSError:
        return ""
    return f"inode {status.st_ino}"  # the device has another number after a remount


def reason_of(error: OSError, folder: Path) -> str:
    """Return what the system says about a file, and which disk is full if one is."""
    if error.errno != errno.ENOSPC:
        return str(error)
    found = shortage(folder, None)
    return f"{error.strerror}{found and ': '}{found}; free space, and run the same command again"


def remove(path: Path) -> None:
    """Remove what a killed run has left, a file or a directory.

    Raises:
        ConversionError: it cannot be removed.
    """
    try:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ConversionError(
            f"{path}: left by a killed run, cannot be removed: {error.strerror}"
        ) from error


def existing_folder(folder: Path) -> Path:
    """Return the nearest directory that is there: this one, or one above."""
    while not folder.exists():
        folder = folder.parent
    return folder
