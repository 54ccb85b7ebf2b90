"""Local files: paths and ``file://`` URLs, also on mounted network file systems."""

from __future__ import annotations

import errno
import os
import stat
import time
from threading import Lock
from urllib.parse import unquote, urlsplit

from . import file_upload
from .errors import AccessDenied, ConnectionFailed, NotFound, SourceError
from .source import Body, Listed, Listing, OnSend, ReadRange

_RACY_S = 2.0  # a file modified this recently may change again within its mtime's resolution


class FileSource:
    """A file system source and target. Files are copied, never linked: they are the user's."""

    network = False

    def open(self, locator: str, *, start: int = 0, stop: int | None = None) -> Body:
        try:
            # Non-blocking: opening a FIFO would wait for a writer.
            fd = os.open(path_of(locator), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise _source_error(error, locator) from error
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            os.close(fd)
            hint = "only regular files are read, and symlinks to them: put the file itself there"
            raise NotFound("not a regular file", locator=locator, hint=hint)
        offset, end = start, info.st_size if stop is None else min(stop, info.st_size)
        busy = closed = False
        mutex = Lock()

        def read_into(view: memoryview) -> int:
            nonlocal offset, busy
            with mutex:
                if closed:
                    raise ConnectionFailed("the body was closed", locator=locator)
                busy = True
            try:
                count = os.preadv(fd, [view[: max(0, min(len(view), end - offset))]], offset)
            except OSError as error:
                raise _source_error(error, locator) from error
            finally:
                with mutex:
                    busy = False
                    if closed:
                        os.close(fd)
            offset += count
            return count

        def close() -> None:
            nonlocal closed
            with mutex:
                # During a read the descriptor must not be reused: that read closes it afterwards.
                if not closed and not busy:
                    os.close(fd)
                closed = True

        racy = time.time() - info.st_mtime <= _RACY_S
        version = "" if racy else f"{info.st_dev}:{info.st_ino}:{info.st_mtime_ns}"
        return Body(start=start, total=info.st_size, read_into=read_into, close=close, fd=fd, version=version)

    def size(self, locator: str) -> int | None:
        try:
            return os.stat(path_of(locator)).st_size
        except OSError as error:
            raise _source_error(error, locator) from error

    def listing(self, locator: str) -> Listing:
        root = path_of(locator)
        try:
            is_folder = stat.S_ISDIR(os.stat(root).st_mode)
        except OSError as error:
            raise _source_error(error, locator, what="no such folder", reason="NoSuchFolder") from error
        if not is_folder:
            raise NotFound("not a folder", locator=locator, reason="NotAFolder")
        files = []
        for folder, folders, names in os.walk(root, onerror=lambda error: _raise(error, locator)):
            folders.sort()
            for name in sorted(names):
                path = os.path.join(folder, name)
                try:
                    info = os.stat(path)
                except OSError as error:
                    raise _source_error(error, path, hint="restore the target of the link, or remove the link") from error
                if stat.S_ISREG(info.st_mode):
                    files.append(Listed(path=os.path.relpath(path, root), size=info.st_size))
        return Listing(locator=locator, files=tuple(files))

    def origin(self, locator: str) -> str:
        return os.path.dirname(path_of(locator))

    def put(self, locator: str, size: int, read: ReadRange, on_send: OnSend) -> int:
        return file_upload.upload(path_of(locator), size, read, on_send, locator)


def path_of(locator: str) -> str:
    """The path of a plain or ``file://`` locator. Raises SourceError for a remote host."""
    if not locator.startswith("file://"):
        return locator
    parts = urlsplit(locator)
    if parts.netloc not in ("", "localhost"):
        raise SourceError("a file URL names no host", locator=locator, hint="write file:///path")
    return unquote(parts.path)


def _raise(error: OSError, locator: str) -> None:
    raise _source_error(error, locator) from error


def _source_error(
    error: OSError, locator: str, *, what: str = "no such file", hint: str = "", reason: str = ""
) -> SourceError:
    """The SourceError for an OSError; the keywords are for a missing file or folder."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
        return NotFound(what, locator=locator, hint=hint, reason=reason)
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessDenied("permission denied", locator=locator, hint="check who may read the source folder")
    return ConnectionFailed(error.strerror or str(error), locator=locator)
