"""Putting one object into a folder: beside its place, going on behind what is there and right; then one rename."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .errors import AccessDenied, ConnectionFailed, SourceError, TargetFull
from .source import OnSend, ReadRange

_STEP = 8 << 20
_POLL_S = 0.1  # how often to look whether another who puts the same is done
_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY, errno.EAGAIN, errno.ENETDOWN, errno.EHOSTDOWN}


def put(path: str, size: int, read: ReadRange, on_send: OnSend, locator: str) -> int:
    """Let the file hold *size* bytes, whole or not at all, synced; how many were written.

    What an earlier put left beside it is gone on with. What *read* and *on_send* raise is passed on as it is. Raises
    SourceError.
    """
    folder, beside, sent = os.path.dirname(path) or ".", f"{path}.unfinished", 0
    with _translated(locator):
        grown = _make_folders(folder)
    fd = _open_alone(beside, path, size, on_send, locator)
    if fd is None:
        return 0
    try:
        for at in range(0, size, _STEP):
            data = read(at, min(at + _STEP, size))
            with _translated(locator):
                there = os.pread(fd, len(data), at)
            if there != data:
                on_send(len(data))
                with _translated(locator):
                    _write_all(fd, data, at)
                sent += len(data)
        with _translated(locator):
            os.ftruncate(fd, size)
            _sync_or_drop(fd, beside)
            _rename(beside, path)
    finally:
        os.close(fd)
    with _translated(locator):
        for changed in (folder, *grown):
            _sync(changed)
    return sent


def _open_alone(beside: str, path: str, size: int, on_send: OnSend, locator: str) -> int | None:
    """The unfinished file, for us alone; None where another has put the object while we waited for it.

    Two at once would mix what they write, and compressed pieces differ by the version of zstd. Where there are no locks
    it is gone on without: whoever reads proves what it gets.
    """
    waited = False
    while True:
        with _translated(locator):
            fd = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            with suppress(FileNotFoundError):  # the one before us has renamed it
                if _lock(fd) and os.path.samestat(os.fstat(fd), os.stat(beside)):
                    if waited and _has(path, size):
                        os.unlink(beside)
                        return None
                    fd, ours = -1, fd
                    return ours
        finally:
            if fd >= 0:
                os.close(fd)
        on_send(0)
        time.sleep(_POLL_S if waited else 0)
        waited = True


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # this file system has none
        return True
    return True


def _has(path: str, size: int) -> bool:
    with suppress(OSError):
        return os.stat(path).st_size == size
    return False


def _make_folders(folder: str) -> list[str]:
    """Make a folder; which others have got a new name in them by it."""
    grown, above = [], folder
    while not os.path.isdir(above):
        above = os.path.dirname(above) or "."
        grown.append(above)
    os.makedirs(folder, exist_ok=True)
    return grown


def _write_all(fd: int, data: bytes, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, memoryview(data)[done:], at + done)


def _rename(beside: str, path: str) -> None:
    try:
        os.replace(beside, path)
    except FileNotFoundError:
        if not os.path.exists(path):  # else another has put the same, where there are no locks
            raise


def _sync_or_drop(fd: int, beside: str) -> None:
    """A sync that failed is never repeated on that file: the next one would say that all is well."""
    try:
        os.fsync(fd)
    except OSError:
        with suppress(OSError):
            os.unlink(beside)
        raise


def _sync(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _translated(locator: str) -> Iterator[None]:
    """What this file system refuses: asking again mends none but a passing failure of a disk or a network."""
    try:
        yield
    except OSError as error:
        what = error.strerror or str(error)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            hint = "check who may write to the target folder"
            raise AccessDenied(f"it cannot be written ({what})", locator=locator, hint=hint) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some room there: what was sent is kept, and the next push continues there"
            raise TargetFull(what, locator=locator, hint=hint) from error
        if error.errno in _PASSING:
            raise ConnectionFailed(what, locator=locator) from error
        raise SourceError(f"it cannot be written ({what})", locator=locator, hint="check the target folder") from error
