"""Upload into a folder: a resumable partial file next to the target, then an atomic rename."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .errors import AccessDenied, ConnectionFailed, SourceError, TargetFull
from .source import OnSend, ReadRange

_BLOCK_BYTES = 8 << 20
_POLL_S = 0.1  # seconds between attempts to lock a partial file of a concurrent upload
_TRANSIENT_ERRNOS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY, errno.EAGAIN, errno.ENETDOWN, errno.EHOSTDOWN}


def upload(path: str, size: int, read: ReadRange, on_send: OnSend, locator: str) -> int:
    """Write *size* bytes to *path* atomically and durably (fsync); the number of bytes written.

    Resumes a partial file of an earlier upload: blocks that are equal already are skipped.
    Exceptions of *read* and *on_send* propagate unchanged. Raises SourceError.
    """
    folder, partial, sent = os.path.dirname(path) or ".", f"{path}.unfinished", 0
    with _source_errors(locator):
        parents = _make_dirs(folder)
    fd = _open_exclusive(partial, path, size, on_send, locator)
    if fd is None:
        return 0
    try:
        for offset in range(0, size, _BLOCK_BYTES):
            data = read(offset, min(offset + _BLOCK_BYTES, size))
            with _source_errors(locator):
                existing = os.pread(fd, len(data), offset)
            if existing != data:
                on_send(len(data))
                with _source_errors(locator):
                    _write_all(fd, data, offset)
                sent += len(data)
        with _source_errors(locator):
            os.ftruncate(fd, size)
            _fsync_or_unlink(fd, partial)
            _rename(partial, path)
    finally:
        os.close(fd)
    with _source_errors(locator):
        for directory in (folder, *parents):
            _fsync_dir(directory)
    return sent


def _open_exclusive(partial: str, path: str, size: int, on_send: OnSend, locator: str) -> int | None:
    """The partial file, exclusively locked; None if a concurrent upload finished meanwhile.

    Two concurrent writers could mix their bytes: compressed pieces differ between versions of zstd.
    On file systems without locks it proceeds without one: readers verify what they get.
    """
    waited = False
    while True:
        with _source_errors(locator):
            fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            with suppress(FileNotFoundError):  # renamed by the previous holder of the lock
                if _try_lock(fd) and os.path.samestat(os.fstat(fd), os.stat(partial)):
                    if waited and _has_size(path, size):
                        os.unlink(partial)
                        return None
                    fd, locked = -1, fd
                    return locked
        finally:
            if fd >= 0:
                os.close(fd)
        on_send(0)
        time.sleep(_POLL_S if waited else 0)
        waited = True


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # locks are not supported by this file system
        return True
    return True


def _has_size(path: str, size: int) -> bool:
    with suppress(OSError):
        return os.stat(path).st_size == size
    return False


def _make_dirs(folder: str) -> list[str]:
    """Create a folder and its parents; the directories that gained an entry, for fsync."""
    parents, parent = [], folder
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent) or "."
        parents.append(parent)
    os.makedirs(folder, exist_ok=True)
    return parents


def _write_all(fd: int, data: bytes, offset: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(fd, memoryview(data)[written:], offset + written)


def _rename(partial: str, path: str) -> None:
    try:
        os.replace(partial, path)
    except FileNotFoundError:
        if not os.path.exists(path):  # else renamed by a concurrent upload, without locks
            raise


def _fsync_or_unlink(fd: int, partial: str) -> None:
    """Sync a file, or remove it: after a failed fsync, the next one would report success."""
    try:
        os.fsync(fd)
    except OSError:
        with suppress(OSError):
            os.unlink(partial)
        raise


def _fsync_dir(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _source_errors(locator: str) -> Iterator[None]:
    """Map OSError to SourceError; only temporary disk or network failures are transient."""
    try:
        yield
    except OSError as error:
        what = error.strerror or str(error)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            hint = "check who may write to the target folder"
            raise AccessDenied(f"it cannot be written ({what})", locator=locator, hint=hint) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some room there: what was sent is kept, and the next upload continues there"
            raise TargetFull(what, locator=locator, hint=hint) from error
        if error.errno in _TRANSIENT_ERRNOS:
            raise ConnectionFailed(what, locator=locator) from error
        raise SourceError(f"it cannot be written ({what})", locator=locator, hint="check the target folder") from error
