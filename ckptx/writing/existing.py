"""What lies at a target that exists, and whether ckptx has written it."""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from ckptx.errors import CkptxError, PlanError, first_few
from ckptx.storage.partial import MANIFEST
from ckptx.storage.source_file import read_json
from ckptx.text.sizes import size_text

_TRACKERS = frozenset({"latest_checkpointed_iteration.txt", "latest_train_state.pt"})
"""What points to the iteration in a Megatron root, and is in no manifest."""
_LARGEST = 1 << 30  # bytes of a manifest: some 300 for a tensor


@dataclass(frozen=True, slots=True)
class Existing:
    """The files of an existing target; sizes in bytes."""

    path: Path
    files: int
    nbytes: int
    foreign: tuple[str, ...]
    """Files that its manifest does not list, or not with the size that they have; all of them if
    there is no manifest. Symbolic links are among them: ckptx writes none."""
    foreign_bytes: int

    def refusal(self) -> str:
        """Return why it is not replaced, where files of others are among it."""
        count = f"{_files(len(self.foreign))} ({size_text(self.foreign_bytes)})"
        return (
            f"{self.path}: exists, and holds {count} {self._of_others()}; choose another target, "
            "or delete them, too, with --overwrite=foreign"
        )

    def __str__(self) -> str:
        """Return what goes when the target is replaced."""
        text = f"{_files(self.files)}, {size_text(self.nbytes)}"
        if not self.foreign:
            return f"{text}, written by ckptx"
        return f"{text}, {len(self.foreign)} of them {self._of_others()}"

    def _of_others(self) -> str:
        return f"not written by ckptx or changed since: {first_few(self.foreign, 3)}"


@dataclass(frozen=True, slots=True)
class Leftover:
    """What a run that was cut short has left for the next one; sizes in bytes."""

    place: Path
    durable: int
    total: int

    def __str__(self) -> str:
        """Return it for the user who has to know."""
        return (
            f"{size_text(self.durable)} of {size_text(self.total)} are kept in {self.place}: run "
            "the same command again to continue, or remove it"
        )


def is_taken(path: Path) -> bool:
    """Return whether there is anything at a place; an empty directory is nothing."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def check_place(path: Path) -> None:
    """Check that replacing ``path`` touches neither what a link leads to, nor a cache.

    Raises:
        PlanError: it is a symbolic link, or a snapshot of the Hugging Face Hub's cache.
    """
    if path.is_symlink():
        raise PlanError(
            f"{path}: is a symbolic link to {path.resolve()}, which would be replaced; name that "
            "itself, or choose another target"
        )
    if "snapshots" in path.parts and any(part.startswith("models--") for part in path.parts):
        raise PlanError(f"{path}: lies in the cache of the Hugging Face Hub; not replaced")


def check_directory(path: Path) -> None:
    """Check that a directory is not plainly more than one old checkpoint.

    Raises:
        PlanError: it is a home, the working directory, a file system or a repository.
    """
    for own in (Path.cwd, Path.home):
        with contextlib.suppress(OSError, RuntimeError):  # there is no such
            if path == own() or path in own().parents:
                raise PlanError(f"{path}: is or holds your working or home directory; not replaced")
    if os.path.ismount(path) or (path / ".git").exists():
        raise PlanError(f"{path}: is a file system or a repository of its own; not replaced")


def existing(path: Path) -> Existing:
    """Return what lies at ``path``, a file or a directory; no symbolic link is followed.

    Raises:
        OSError: a directory cannot be listed.
    """
    if not path.is_dir():
        listed = _listed(path.with_name(f"{path.name}.{MANIFEST}"))
        sizes = {path.name: path.lstat().st_size}
    else:
        listed = _listed(path / MANIFEST)
        sizes = _sizes(path)
        for manifest in path.glob(f"*/{MANIFEST}"):  # of an iteration in a Megatron root
            inside = manifest.parent.name
            if files := _listed(manifest):
                listed |= {f"{inside}/{name}": size for name, size in files.items()}
                listed |= {name: sizes[name] for name in _TRACKERS & sizes.keys()}
                listed[f"{inside}/{MANIFEST}"] = manifest.stat().st_size
        if listed and MANIFEST in sizes:
            listed[MANIFEST] = sizes[MANIFEST]
    foreign = {name: size for name, size in sizes.items() if listed.get(name) != size}
    total = sum(sizes.values())
    return Existing(path, len(sizes), total, tuple(sorted(foreign)), sum(foreign.values()))


def keep_permissions(old: Path, new: Path) -> None:
    """Give ``new`` the mode and, where it is allowed, the group of ``old``, which it replaces."""
    status = old.stat()
    with contextlib.suppress(OSError):  # not our group, or a file system without any
        os.chown(new, -1, status.st_gid)
    with contextlib.suppress(OSError):
        new.chmod(stat.S_IMODE(status.st_mode))


def _sizes(root: Path) -> dict[str, int]:
    """Return path, relative to ``root``, to size of all that is no directory."""

    def stop(error: OSError) -> None:
        raise error

    found = {}
    for folder, folders, names in os.walk(root, onerror=stop):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        for name in (*names, *links):
            place = Path(folder, name)
            found[place.relative_to(root).as_posix()] = place.lstat().st_size
    return found


def _listed(manifest: Path) -> dict[str, int]:
    """Return path to size of the files of a manifest; empty if there is none that can be read."""
    if manifest.is_symlink():
        return {}
    try:
        files = read_json(manifest, _LARGEST)["files"]
        return {str(name): int(entry["bytes"]) for name, entry in files.items()}
    except (CkptxError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"
