"""The life of a target: refused, locked, staged, published, or gone without a trace.

    DIR/                          the parent of the target
      TARGET.ckptx-partial/       all that is left if the machine loses power
        lock                      held by the run that works here
        journal                   what of ``new`` is on disk, see `ckptx.writing.journal`
        publishing                which inode is, or is about to be, TARGET
        new/                      what will be TARGET
      TARGET                      appears by one rename, whole

In a Megatron root the target is the iteration directory, and the tracker file is written after it.
With ``--overwrite`` the new and the old directory trade places in one step; then the old one, now
in the partial directory, is removed with it. What ckptx did not write goes only if it was named
and ``foreign`` files were asked for.

An error removes the partial directory. A run that was cut short keeps it, if something is recorded
in its journal; the next run for the target either continues it, if it is the same conversion, or
removes it. A run that was killed after the target had appeared is continued, too: with the pointers
to it, and by removing what is left.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from ckptx.errors import ConversionError, CutShortError, PlanError
from ckptx.protocol.contracts import SavePlan
from ckptx.storage.file_plan import FilePlan
from ckptx.storage.partial import LOCK, MANIFEST, OWNER, PARTIAL
from ckptx.text.sizes import size_text
from ckptx.writing import atomic, journal, pointers
from ckptx.writing.atomic import sync_directory, write_durable
from ckptx.writing.disk import occupied_bytes, shortage
from ckptx.writing.existing import (
    Existing,
    Leftover,
    check_directory,
    check_place,
    existing,
    is_taken,
    keep_permissions,
)
from ckptx.writing.lock import Lock

if TYPE_CHECKING:
    from ckptx.writing.journal import Identity

_PUBLISHING = "publishing"
_LAST = (_PUBLISHING, OWNER, LOCK)
"""What a partial directory loses last, in this order."""
_REMOVED_OPEN = (".nfs", ".fuse_hidden")
"""How names begin that a file system gives to open files that were removed."""
_TRIES, _PAUSE = 20, 0.05  # seconds between two looks
_log = logging.getLogger(__name__)


def outline(plan: SavePlan) -> SavePlan:
    """Return a plan without its regions: all that the target's owner needs to know."""
    return replace(plan, files=[FilePlan(file.path, file.size, ()) for file in plan.files])


def check_files(plan: SavePlan, save_dir: Path, files: Sequence[str]) -> None:
    """Check that a plan replaces none of the files that it reads, by whatever links they are known.

    Raises:
        PlanError: a file of the source lies in the target.
    """
    target = (save_dir.resolve() / plan.directory).resolve()
    for file in files:
        place = Path(file).resolve()
        if place == target or (target in place.parents and not plan.single_file):
            linked = "" if place == Path(file).absolute() else f", by the link {file}"
            raise PlanError(f"{target}: contains the source {place}{linked}; choose another target")


def manifest_path(plan: SavePlan) -> str:
    """Return where the manifest of a plan lies, relative to the staging directory."""
    return f"{plan.files[0].path}.{MANIFEST}" if plan.single_file else MANIFEST


class Target:
    """The place a conversion writes to; a context that cleans up unless `publish` succeeded.

    Args:
        save_dir: what the user named.
        inputs: source paths, of which the target must not replace a part.
        overwrite: whether an existing target may be replaced, if ckptx wrote all of it; with
            ``"foreign"`` whoever wrote it.
        earlier: what pointers may say that move on to this target.
        locks: whether the place is locked while it is written.
    """

    def __init__(
        self,
        save_dir: Path,
        inputs: Sequence[Path],
        overwrite: bool | Literal["foreign"] = False,
        earlier: Sequence[str] = (),
        *,
        locks: bool = True,
    ) -> None:
        self._locks = locks
        self._earlier = earlier
        self._named = save_dir
        self.save_dir = save_dir.resolve()
        self.inputs = [path.resolve() for path in inputs]
        self.overwrite = overwrite
        self.path = self.save_dir
        """What appears in the end; known once `prepare` has seen the plan."""
        self._created: list[Path] = []
        self._lock: Lock | None = None
        self._keep = False
        self.replaced: Existing | None = None
        """What `publish` deletes; known once a plan was checked."""
        self.published = False
        """Whether the target is in place, put there by this run or one before."""
        self.kept: Leftover | None = None
        """What is left for another run; known once the context has ended."""
        if self.save_dir in self.inputs:
            raise PlanError(f"{self.save_dir}: is the source itself; choose another target")
        folder = atomic.existing_folder(self.save_dir.parent)
        if not folder.is_dir():
            raise PlanError(f"{folder}: is a file; the target would lie below it")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PlanError(f"{folder}: is not writable; the target would be created there")

    def __enter__(self) -> Target:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._lock is not None:
            self.kept = self._worth_keeping() if self._keep else None
            if self.kept is None:
                self._clear()
            self._release()
        for folder in reversed(self._created if kind else []):
            with contextlib.suppress(OSError):  # not empty: the work of someone else meanwhile
                folder.rmdir()

    def _clear(self) -> None:
        """Remove the partial directory: what another run can use last, and the lock after it."""
        for name in ("new", "old", journal.NAME, *_LAST):
            with contextlib.suppress(ConversionError):
                atomic.remove(self._partial / name)
        shutil.rmtree(self._partial, ignore_errors=True)

    def _acquire(self) -> None:
        if self._lock is None:
            lock = Lock(self._partial, self.path, wanted=self._locks)
            lock.acquire()
            self._lock = lock

    def _release(self) -> None:
        """Let go of the partial directory, and of its last trace.

        NFS and FUSE keep what is removed while it is open, under another name, until it is closed.
        """
        lock, self._lock = self._lock, None
        if lock is None:
            return
        lock.release()
        for _ in range(_TRIES):
            left = self._names()
            if left is None or not all(name.startswith(_REMOVED_OPEN) for name in left):
                break
            with contextlib.suppress(OSError):
                self._partial.rmdir()
                break
            time.sleep(_PAUSE)

    def _names(self) -> set[str] | None:
        """Return the names in the partial directory, None if it cannot be listed."""
        try:
            return {path.name for path in self._partial.iterdir()}
        except OSError:
            return None

    def _clear_orphan(self) -> None:
        """Remove what a run has left that was killed while it removed the last of what it had.

        Nothing of it is of use to anyone; with a journal it would be, and stays.

        Raises:
            ConversionError: a run that has just begun owns it.
        """
        if not self._orphaned():
            return
        self._acquire()
        if self._orphaned():  # still, now that nobody else can be at work here
            self._clear()
        self._release()

    def _orphaned(self) -> bool:
        names = self._names()
        return names is not None and names <= set(_LAST)

    def keep(self) -> None:
        """Leave what is recorded in the journal for another run, if anything is."""
        self._keep = True

    def prepare(self, plan: SavePlan, identity: Identity | None = None) -> Path:
        """Return the staging directory for a plan, after all that can be refused was checked.

        It is empty, unless an earlier run of the same ``identity`` has left something in its
        journal. Without an identity nothing is continued. If an earlier run has put all of it in
        place already, that place is returned, and `published` set.

        Raises:
            PlanError: the target exists, touches the source, or cannot be written.
            ConversionError: another run works on it, or the disk is too small.
        """
        self._name(plan)
        if self._was_published(identity):
            self._acquire()
            if self._was_published(identity):
                self.published = True
                self._publish_manifest()  # if the run was killed before
                _log.warning("resuming: %s is in place and whole", self.path)
                return self.path.parent if plan.single_file else self.path
        if self.path.exists():
            self._clear_orphan()
        self._check_place()
        self._make(self.path.parent)
        self._acquire()
        atomic.rescue(self._partial, self.path)
        self._probe()
        staging = self._partial / "new"
        kept = {journal.NAME, "new"} if self._continues(identity) else set()
        for leftover in self._partial.iterdir():
            if leftover.name not in {LOCK, OWNER, *kept}:
                atomic.remove(leftover)
        # After the leftovers of a killed run have made room.
        self._check_disk(occupied_bytes(staging))
        try:
            if self._lock is not None:
                self._lock.sign()
            staging.mkdir(exist_ok=True)
        except OSError as error:
            raise ConversionError(f"{staging}: {atomic.reason_of(error, self._partial)}") from error
        return staging

    def _probe(self) -> None:
        """Try what makes the target appear, before a byte moves.

        Raises:
            PlanError: the file system cannot rename a directory.
        """
        before, after = self._partial / "probe", self._partial / "probed"
        try:
            before.mkdir(exist_ok=True)
            before.rename(after)
            after.rmdir()
        except OSError as error:
            raise PlanError(
                f"{self._partial}: a directory cannot be renamed here ({error.strerror}), by which "
                "a target appears; choose another target"
            ) from error

    def _was_published(self, identity: Identity | None) -> bool:
        """Return whether a killed run of this conversion has put its target in place."""
        named = self._publishing()
        if identity is None or not named or named != atomic.inode(self.path):
            return False
        found = journal.read(self._partial / journal.NAME)
        return found is not None and not found.identity.difference(identity)

    def _publishing(self) -> str:
        """Return what a killed run was about to put in place; empty if it did not get so far."""
        try:
            return (self._partial / _PUBLISHING).read_text().partition(" of ")[0]
        except (OSError, ValueError):
            return ""

    def _continues(self, identity: Identity | None) -> bool:
        """Return whether the partial directory holds the beginning of this conversion."""
        found = journal.read(self._partial / journal.NAME)
        if found is None or not found.durable:
            return False
        staging = self._partial / "new"
        if not staging.is_dir() or staging.is_symlink():
            return False
        if self._publishing() not in ("", atomic.inode(self._staged())):
            return False  # it did, and what lies here is the target that it replaced
        reason = found.identity.difference(identity) if identity else "it is not to be continued"
        if reason:
            _log.warning(
                "starting over: %s in %s are not used, %s",
                *(size_text(found.durable), self._partial, reason),
            )
        return not reason

    def _worth_keeping(self) -> Leftover | None:
        found = journal.read(self._partial / journal.NAME)
        if found is None or not found.durable:
            return None
        return Leftover(self._partial, found.durable, sum(file.size for file in self.plan.files))

    def check(self, plan: SavePlan) -> None:
        """Check all that can be told without writing.

        Raises:
            PlanError: the target exists or touches the source.
            ConversionError: the disk is too small.
        """
        self._name(plan)
        self._check_place()
        self._check_disk()

    def _name(self, plan: SavePlan) -> None:
        """Learn from a plan where the target and its partial directory are."""
        self.plan = plan
        self.path = self.save_dir / plan.directory if plan.directory else self.save_dir
        for path in (plan.directory, *plan.pointers, *(file.path for file in plan.files)):
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise PlanError(f"{path!r}: an output path must stay inside the target")
        self._partial = self.path.parent / f"{self.path.name}{PARTIAL}"

    def _staged(self) -> Path:
        """Return what becomes the target by a rename."""
        new = self._partial / "new"
        return new / self.plan.files[0].path if self.plan.single_file else new

    def publish(self) -> list[str]:
        """Make the staged files the target, then write the pointers; return remarks.

        Raises:
            CutShortError: the target appeared meanwhile, or cannot be renamed; or it is in place,
                and a pointer to it cannot be written.
        """
        if not self.published:
            self._put_in_place()
        created, self._created = self._created, []
        try:
            for folder in (self.path, *reversed(created)):
                sync_directory(folder.parent)
            replaced = [f"replaced {self.path}: {self.replaced}"] if self.replaced else []
            return replaced + pointers.write(
                *(self.save_dir, self.plan, self._partial),
                overwrite=bool(self.overwrite),
                earlier=self._earlier,
            )
        except OSError as error:
            missing = [
                f"write {content.decode(errors='replace').strip()!r} into {self.save_dir / name}"
                for name, content in self.plan.pointers.items()
            ]
            raise CutShortError(
                f"{self.path}: is whole and in place, but not all that belongs to it: "
                f"{atomic.reason_of(error, self._partial)}{'; mend it, then ' * bool(missing)}"
                f"{' and '.join(missing)}"
            ) from error

    def pointers_stay(self) -> list[str]:
        """Return remarks on pointers that stay as they are; empty if all are written."""
        return [] if self.overwrite else pointers.notes(self.save_dir, self.plan, self._earlier)

    def _put_in_place(self) -> None:
        staging = self._partial / "new"
        try:
            if self.overwrite and self.path.exists():
                self._replace_knowingly()
            write_durable(self._partial / _PUBLISHING, atomic.inode(self._staged()).encode())
            if self.plan.single_file:
                self._publish_file(staging)
            else:
                self._publish_directory(staging)
        except OSError as error:
            reason = atomic.reason_of(error, self._partial)
            if error.errno == errno.EXDEV:
                reason = "its file system cannot move what lies there; remove it, and run again"
            raise CutShortError(f"{self.path}: cannot be put in place: {reason}") from error
        self.published = True

    def _check_place(self) -> None:
        path = self.path
        if self.plan.conflict and not self.overwrite:
            raise PlanError(self.plan.conflict)
        for source in self.inputs:
            if path == source:
                raise PlanError(f"{path}: is the source itself; choose another target")
            # A new place inside is like any other: "zero_to_fp32.py . output" is DeepSpeed's way.
            if source in path.parents and (is_taken(self.save_dir) or is_taken(path)):
                raise PlanError(
                    f"{path}: lies inside the source {source}, where nothing is replaced; choose "
                    "a target that does not exist"
                )
            if path in source.parents and not self.plan.single_file and path.exists():
                raise PlanError(f"{path}: contains the source {source}; choose another target")
        if self.save_dir.exists() and self.plan.directory and not self.save_dir.is_dir():
            raise PlanError(f"{self.save_dir}: is a file; the target must be a directory")
        if path.is_symlink() and not path.exists():
            raise PlanError(f"{path}: is a link to nothing; remove it, or choose another target")
        if not is_taken(path):
            if path.exists() and self.plan.single_file:
                raise PlanError(f"{path}: is a directory; name the file to write")
            return
        if path.is_dir() and self.plan.single_file:
            raise PlanError(f"{path}: is a directory; name the file to write")
        if not path.is_dir() and not path.is_file():
            raise PlanError(f"{path}: is a pipe, a socket or a device; choose another target")
        if path.is_file() and not self.plan.single_file:
            raise PlanError(f"{path}: is a file, and the target is a directory; choose another")
        for named in (self._named, path):
            check_place(named)
        if path.is_dir():
            self._check_replaceable(path)
        self.replaced = self._what_goes()
        if not self.overwrite:
            raise PlanError(
                f"{path}: exists; choose another target, or replace it with --overwrite"
            )

    def _what_goes(self) -> Existing:
        """Return what lies at the target, all of which may be deleted.

        Raises:
            PlanError: files that ckptx did not write are among it, and nobody asked for that.
        """
        try:
            found = existing(self.path)
        except OSError as error:
            raise PlanError(f"{self.path}: cannot be listed: {error}") from error
        if found.foreign and self.overwrite != "foreign":
            raise PlanError(found.refusal())
        return found

    def _check_replaceable(self, path: Path) -> None:
        """Refuse to replace a directory that is plainly more than one old checkpoint."""
        check_directory(path)
        if not self.plan.directory:
            found = sorted(p.name for p in path.iterdir() if p.name.startswith("iter_"))
            if found:
                raise PlanError(
                    f"{path}: holds Megatron iterations ({', '.join(found[:3])}), which would be "
                    "removed; choose another target"
                )

    def _make(self, folder: Path) -> None:
        missing = []
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for path in reversed(missing):
            try:
                path.mkdir()
            except OSError as error:
                raise PlanError(f"{path}: cannot be created: {error.strerror}") from error
            self._created.append(path)

    def _check_disk(self, occupied: int = 0) -> None:
        """Raise unless the plan fits; ``occupied`` bytes of it are there already."""
        found = shortage(atomic.existing_folder(self.path.parent), self.plan, occupied)
        if found:
            raise ConversionError(f"{self.path}: {found}; free space or choose another target")

    def _publish_file(self, staging: Path) -> None:
        name = self.plan.files[0].path
        sync_directory(staging)
        if self.overwrite:
            (staging / name).replace(self.path)
        else:
            atomic.rename_new(staging / name, self.path)
        self._publish_manifest()

    def _publish_manifest(self) -> None:
        """Put the manifest of a single file beside it, unless that was done."""
        manifest = self._partial / "new" / manifest_path(self.plan)
        if self.plan.single_file and manifest.exists():
            manifest.replace(self.path.with_name(f"{self.path.name}.{MANIFEST}"))

    def _publish_directory(self, staging: Path) -> None:
        sync_directory(staging)
        if self.overwrite and self.path.exists():
            atomic.exchange(staging, self.path, staging.with_name("old"))
        else:
            staging.rename(self.path)  # fails if a directory with anything in it is there now

    def _replace_knowingly(self) -> None:
        """Look again at what is replaced, since much time may have passed; keep its permissions.

        Raises:
            CutShortError: files of others have come.
        """
        try:
            self.replaced = self._what_goes() if is_taken(self.path) else None
        except PlanError as error:
            raise CutShortError(str(error)) from error
        keep_permissions(self.path, self._staged())
