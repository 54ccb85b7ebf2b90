"""Durable writes: files that a crash or power cut leaves whole or absent, and group syncs."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from . import locks

UNFINISHED = ".tmp-"
"""Prefix of temporary files, which readers ignore."""

_GROUP_MIN = 16  # files from which one sync of the file system is cheaper than one for each


def write_file(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace the content of *path* atomically: temporary file, fsync, rename, fsync of the folder. Raises OSError.

    Durable on return. A crash leaves the old content or the new, and perhaps the temporary file, which is locked while its
    writer lives, so that ``remove_temp_files`` removes those of dead ones.
    """
    while not _replace(path, data, mode):
        pass
    fsync_folder(path.parent)


def _replace(path: Path, data: bytes, mode: int) -> bool:
    temp = path.with_name(f"{UNFINISHED}{secrets.token_hex(6)}")
    fd = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        locks.try_lock(fd, shared=False)
        os.fchmod(fd, mode)
        write_all(fd, data)
        os.fsync(fd)
        os.replace(temp, path)
    except FileNotFoundError:
        return False  # removed as a dead writer's, before it was locked or where file locks are unreliable
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    return True


def remove_temp_files(folders: Iterable[Path]) -> None:
    """Remove temporary files of dead writers in *folders*. What cannot be removed, such as a folder, stays."""
    for folder in folders:
        for path in folder.glob(f"{UNFINISHED}*") if folder.is_dir() else ():
            with suppress(OSError):
                if not locks.is_held(path):
                    path.unlink(missing_ok=True)


def write_all(fd: int, data: bytes | memoryview, offset: int | None = None) -> None:
    """Write all of *data*, at *offset* if given; write(2) may write less (quota, signal, RLIMIT_FSIZE). Raises OSError."""
    view = memoryview(data)
    while view:
        count = os.write(fd, view) if offset is None else os.pwrite(fd, view, offset)
        view = view[count:]
        if offset is not None:
            offset += count


def fsync_folder(path: Path | str) -> None:
    """Make the names in a folder durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folders(path: Path) -> bool:
    """Make a folder and those above it that are missing; their names are durable on return. False where it is there.

    Raises OSError.
    """
    made = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in made:
        with suppress(PermissionError):  # a folder that may be written to, but not read
            fsync_folder(each.parent)
    return bool(made)


class Syncer:
    """A group sync: makes the content of several files durable, then their names. A context manager, for one thread.

    From 16 files on, and on a local file system whose syncfs(2) is known to write everything, one call serves all of them:
    ten thousand small files cost seconds instead of a minute. Its failure is raised for each file, because a second call
    would succeed without having written what the first could not. Elsewhere each file and folder is synced by itself.
    """

    def __init__(self, folder: str, count: int) -> None:
        """*folder* is any on the file system of all *count* files."""
        self._folder, self._count, self._fd = folder, count, -1
        self._outcomes: dict[str, OSError | None] = {}

    def __enter__(self) -> Syncer:
        if self._count >= _GROUP_MIN:
            from . import syscalls

            self._fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if not syscalls.is_local(self._fd):
                self.__exit__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def sync_file(self, fd: int) -> None:
        """Make the content of an open file durable, after all files of the group were written. Raises OSError."""
        if self._fd < 0:
            os.fsync(fd)
            return
        from . import syscalls

        self._once("content", lambda: syscalls.syncfs(self._fd))
        syscalls.check_written(fd)  # a failure that an earlier sync, or another process's, has consumed

    def sync_folder(self, folder: str) -> None:
        """Make the names in a folder durable, after all files of the group have theirs. Raises OSError."""
        if self._fd < 0:
            self._once(folder, lambda: fsync_folder(folder))
        else:
            from . import syscalls

            self._once("names", lambda: syscalls.syncfs(self._fd))

    def _once(self, what: str, sync: Callable[[], None]) -> None:
        if what not in self._outcomes:
            try:
                sync()
                self._outcomes[what] = None
            except OSError as error:
                error.filename = error.filename or self._folder
                self._outcomes[what] = error
        if (failure := self._outcomes[what]) is not None:
            raise failure
