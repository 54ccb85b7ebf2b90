"""Trees: folders of linked blobs, published in one step and drained; the inventory says which files are managed.

No step follows a symlink inside a tree: folders are opened one by one from the tree's top with ``O_NOFOLLOW`` and files
are named relative to them. A file is removed only if the inventory lists it with the inode that is there; whatever
else is found is the user's and is moved, never deleted.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from . import entries, presence
from .durable import fsync_folder
from .inventory import STAGING, InventoryEntry
from .links import LinkKind, is_left_over

OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(slots=True)
class Scan:
    """The content of a folder: every non-folder with its inode, and every folder. Paths are POSIX and relative."""

    files: dict[str, int] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)


def scan(root: Path | str) -> Scan | None:
    """Walk a folder without a stat per file; None where no folder is. Raises OSError."""
    found = Scan()
    if os.path.islink(root):
        return None  # whatever it leads to is not ours
    try:
        _scan_into(found, str(root))
    except (FileNotFoundError, NotADirectoryError):
        if presence.is_folder(root):
            return scan(root)  # something inside vanished while we looked
        return None
    return found


def _scan_into(found: Scan, root: str) -> None:
    waiting = [""]  # no recursion: the user's own folders may be as deep as they like
    while waiting:
        prefix = waiting.pop()
        with os.scandir(f"{root}/{prefix}" if prefix else root) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_dir(follow_symlinks=False):
                    found.folders.add(name)
                    waiting.append(name + "/")
                else:
                    found.files[name] = entry.inode()


# ---- folders, following no symlink


def open_below(top: int, folder: str) -> int:
    """Open a folder below an open one, following no symlink on the way. The caller closes it."""
    fd = os.dup(top)
    for part in PurePosixPath(folder).parts:
        try:
            _refuse_to_leave(part)
            inner = os.open(part, OPEN_FOLDER, dir_fd=fd)
        finally:
            os.close(fd)
        fd = inner
    return fd


def _refuse_to_leave(part: str) -> None:
    """Raises OSError for a part of a path that leads out of the folder it is in."""
    if part in ("", ".", "..") or part.startswith("/"):
        raise OSError(errno.EINVAL, "not a path within a tree", part)


@contextlib.contextmanager
def open_parent(root: Path | str, path: str) -> Iterator[tuple[int, str]]:
    """The open folder that holds *path*, and its name there, following no symlink on the way. Raises OSError."""
    top = os.open(root, OPEN_FOLDER)
    try:
        folder, _, name = path.rpartition("/")
        _refuse_to_leave(name)
        fd = open_below(top, folder)
    finally:
        os.close(top)
    try:
        yield fd, name
    finally:
        os.close(fd)


def unlink(root: Path | str, path: str) -> None:
    """Remove one file below *root*, following no symlink that may have replaced one of its folders. Raises OSError."""
    with open_parent(root, path) as (fd, name):
        os.unlink(name, dir_fd=fd)


def new_staging(live: Path) -> Path:
    """A free name next to a tree for the folder that will replace it; never a legal variant name.

    Hold the tree's lock: empty ones that an earlier run made and was killed before it could announce them are removed.
    """
    for earlier in live.parent.glob(f".{glob.escape(live.name)}.*{STAGING}"):
        with contextlib.suppress(OSError):  # it is not empty, and so it is not ours to remove
            earlier.rmdir()
    return live.parent / f".{live.name}.{secrets.token_hex(6)}{STAGING}"


def publish(staging: Path, live: Path) -> bool:
    """Publish the staged folder under the tree's name in one step; durable on return.

    True: the old folder is now under the staging name and is to be drained. False: there was none.
    Raises OSError: EXDEV, EBUSY, EINVAL or ENOSYS where a folder cannot be exchanged here.
    """
    try:
        there = os.lstat(live)
    except FileNotFoundError:
        os.rename(staging, live)
        fsync_folder(live.parent)
        return False
    if not stat.S_ISDIR(there.st_mode):
        raise OSError(errno.ENOTDIR, "not a folder", str(live))
    os.chmod(staging, stat.S_IMODE(there.st_mode))
    from . import syscalls

    syscalls.exchange(str(staging), str(live))
    fsync_folder(live.parent)
    return True


EXCHANGE_IMPOSSIBLE = {errno.EXDEV, errno.EBUSY, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EACCES}
"""The errors after which a tree must be changed file by file."""


# ---- taking apart


@dataclass(slots=True)
class Classified:
    """The content of a folder by owner."""

    ours: list[str] = field(default_factory=list)  # as we placed it
    edited: list[str] = field(default_factory=list)  # where we placed something, with other bytes
    theirs: list[str] = field(default_factory=list)  # the user's
    folders: set[str] = field(default_factory=set)


def classify(root: Path, placed: Mapping[str, InventoryEntry]) -> Classified:
    """The files below *root* by owner, according to the inventory and one stat. Raises OSError."""
    found = scan(root) or Scan()
    result = Classified(folders=found.folders)
    for path in found.files:
        ours = placed.get(path)
        if ours is None:
            (result.ours if is_left_over(path) else result.theirs).append(path)
        elif as_placed(f"{root}/{path}", ours):
            result.ours.append(path)
        else:
            result.edited.append(path)
    return result


def as_placed(path: str, placed: InventoryEntry) -> bool:
    """Whether a path still holds what the inventory says we put there: of a blob, as far as a stat can tell."""
    if placed.other is not None:
        return entries.read(path) == placed.other
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return False
    same = there.st_ino == placed.ino or not placed.ino  # 0: recorded before it was made
    if placed.kind is LinkKind.SYMLINK:
        return same and stat.S_ISLNK(there.st_mode)
    if placed.kind is LinkKind.EMPTY:
        return same and there.st_size == 0
    # In a restored store every inode is another; the proof came along, and no edit carries it.
    return stat.S_ISREG(there.st_mode) and there.st_mtime_ns == placed.digest.mtime * 1_000_000_000


@dataclass(slots=True)
class Displaced:
    """The files that were moved out of the way: path in the tree -> where it is now."""

    quarantined: dict[str, str] = field(default_factory=dict)
    moved: list[str] = field(default_factory=list)  # the user's files that went into the new tree


class Quarantine:
    """A fresh folder below ``quarantine/``, made when first needed, for what is displaced from one tree."""

    def __init__(self, folder: Path, label: str) -> None:
        self._base = folder / f"{int(time.time())}-{secrets.token_hex(4)}-{label}"
        self.displaced = Displaced()

    def take(self, root: Path, path: str) -> None:
        """Move *path* of the tree at *root* here, on whatever file system it is. Raises OSError."""
        target = self._base / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_parent(root, path) as (fd, name):
            _move(fd, name, f"{root}/{path}", str(target))
        self.displaced.quarantined[path] = str(target)


def _move(folder_fd: int, name: str, source: str, target: str) -> None:
    try:
        os.rename(name, target, src_dir_fd=folder_fd)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.move(source, target)


def drain(old: Path, live: Path, placed: Mapping[str, InventoryEntry], quarantine: Quarantine) -> None:
    """Empty an exchanged folder of everything that is not ours: the user's files go into the live tree, edited ones to
    quarantine. Idempotent: after a crash it continues. Our own links stay for readers that are inside. Raises OSError.
    """
    sorted_ = classify(old, placed)
    for path in sorted_.edited:
        quarantine.take(old, path)
    for path in sorted_.theirs:
        target = live / path
        if presence.exists(target) or not _folders_are_real(live, path):
            quarantine.take(old, path)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_parent(old, path) as (fd, name):
            _move(fd, name, f"{old}/{path}", str(target))
        quarantine.displaced.moved.append(path)
    listed = {str(parent) for path in placed for parent in PurePosixPath(path).parents}
    for folder in sorted(sorted_.folders - listed, reverse=True):  # the user's, and empty by now
        if not presence.exists(live / folder) and _folders_are_real(live, folder):
            (live / folder).mkdir(parents=True, exist_ok=True)
        remove_folder(old / folder)


def _folders_are_real(root: Path, path: str) -> bool:
    """Whether no folder on the way to *path* is a file or a symlink."""
    walked = str(root)
    for part in path.split("/")[:-1]:
        walked = f"{walked}/{part}"
        try:
            if not stat.S_ISDIR(os.lstat(walked).st_mode):
                return False
        except FileNotFoundError:
            return True
    return True


def remove_managed(root: Path, placed: Mapping[str, InventoryEntry], quarantine: Quarantine | None) -> bool:
    """Remove managed files from a folder; True if the folder itself was removed too.

    Edited files go to *quarantine*; the user's stay, with the folders that hold them. Without a quarantine (a folder
    whose name is ours alone: staging, trash) edited files stay too. Raises OSError.
    """
    sorted_ = classify(root, placed)
    for path in sorted_.ours:
        with contextlib.suppress(FileNotFoundError):
            unlink(root, path)
    if quarantine is not None:
        for path in sorted_.edited:
            quarantine.take(root, path)
    listed = {str(parent) for path in placed for parent in PurePosixPath(path).parents}
    for folder in sorted(sorted_.folders & listed, reverse=True):
        remove_folder(f"{root}/{folder}")
    return remove_folder(root)


def remove_folder(path: str | Path) -> bool:
    """Remove an empty folder; False where it is not empty or in use. Raises OSError."""
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, errno.ENOTDIR):
            return False
        raise
    return True
