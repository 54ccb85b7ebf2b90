"""Small files that are there whole or not at all, before and after a power cut."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path

from . import locks

UNFINISHED = ".tmp-"
"""How the names of files begin that are being written."""


_MANY = 16  # files from which one sync of the file system is cheaper than one a file


def write_file(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace *path* by *data* in one step: write beside it, fsync, rename, fsync the folder.

    Durable on return. A crash leaves the old content or the new, and perhaps a ``.tmp-*`` neighbour, which is locked
    while its writer lives: ``remove_temp_files`` removes the others.
    """
    while not _replace(path, data, mode):
        pass
    fsync_folder(path.parent)


def _replace(path: Path, data: bytes, mode: int) -> bool:
    beside = path.with_name(f"{UNFINISHED}{secrets.token_hex(6)}")
    fd = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        locks.try_lock(fd, shared=False)
        os.fchmod(fd, mode)
        write_all(fd, data)
        os.fsync(fd)
        os.replace(beside, path)
    except FileNotFoundError:
        return False  # taken for the leftover of a dead writer, before it was locked or where locks lie
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    return True


def remove_temp_files(folders: Iterable[Path]) -> None:
    """Remove what ``write_file`` left in *folders* when it was killed. Raises OSError."""
    for folder in folders:
        for path in folder.glob(f"{UNFINISHED}*") if folder.is_dir() else ():
            if not locks.is_held(path):
                path.unlink(missing_ok=True)


def write_all(fd: int, data: bytes | memoryview, offset: int | None = None) -> None:
    """Write every byte; write(2) may do less than asked (a quota, a signal, RLIMIT_FSIZE)."""
    view = memoryview(data)
    while view:
        count = os.write(fd, view) if offset is None else os.pwrite(fd, view, offset)
        view = view[count:]
        if offset is not None:
            offset += count


def fsync_folder(path: Path | str) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Syncer:
    """Makes the content of several files, and then their names, durable. A context manager.

    From ``_MANY`` files on, and on a local file system that is known to write what it holds at syncfs(2), one call serves
    all: ten thousand small files cost seconds instead of a minute. A failure is repeated to each file: nothing that could
    not be synced may be trusted, and asking again would hide it. Elsewhere each file and folder is synced by itself.
    """

    def __init__(self, folder: str, count: int) -> None:
        """*folder*: one on the file system that holds all of them."""
        self._folder, self._count, self._fd = folder, count, -1
        self._outcomes: dict[str, OSError | None] = {}

    def __enter__(self) -> Syncer:
        if self._count >= _MANY:
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
        """The content of an open file; all files of the group are written by now. Raises OSError."""
        if self._fd < 0:
            os.fsync(fd)
            return
        from . import syscalls

        self._once("content", lambda: syscalls.syncfs(self._fd))
        syscalls.check_written(fd)  # what failed before, or what another process was told of

    def sync_folder(self, folder: str) -> None:
        """The names in a folder; all names of the group are there by now. Raises OSError."""
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
                self._outcomes[what] = error
        if (failure := self._outcomes[what]) is not None:
            raise failure
