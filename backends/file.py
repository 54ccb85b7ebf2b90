"""Folders and ``file://``: paths on this machine or on a mounted network file system."""

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

_SETTLED_S = 2.0  # a file that was written to later may be written to again without another time


class FileSource:
    """Plain paths and ``file:///…``. Files are read, never linked: the source is the user's."""

    network = False

    def open(self, locator: str, *, start: int = 0, stop: int | None = None) -> Body:
        try:
            fd = os.open(path_of(locator), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for a writer
        except OSError as error:
            raise _translated(error, locator) from error
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            os.close(fd)
            hint = "only regular files are read, and links to such: put the file itself there"
            raise NotFound("not a regular file", locator=locator, hint=hint)
        at, end = start, found.st_size if stop is None else min(stop, found.st_size)
        reading = closed = False
        mutex = Lock()

        def read_into(view: memoryview) -> int:
            nonlocal at, reading
            with mutex:
                if closed:
                    raise ConnectionFailed("the body was closed", locator=locator)
                reading = True
            try:
                count = os.preadv(fd, [view[: max(0, min(len(view), end - at))]], at)
            except OSError as error:
                raise _translated(error, locator) from error
            finally:
                with mutex:
                    reading = False
                    if closed:
                        os.close(fd)
            at += count
            return count

        def close() -> None:
            nonlocal closed
            with mutex:
                # Under a read of another thread the number would be free for another file: that read closes it then.
                if not closed and not reading:
                    os.close(fd)
                closed = True

        settled = time.time() - found.st_mtime > _SETTLED_S
        version = f"{found.st_dev}:{found.st_ino}:{found.st_mtime_ns}" if settled else ""
        return Body(start=start, total=found.st_size, read_into=read_into, close=close, fd=fd, version=version)

    def size(self, locator: str) -> int | None:
        try:
            return os.stat(path_of(locator)).st_size
        except OSError as error:
            raise _translated(error, locator) from error

    def listing(self, locator: str) -> Listing:
        root, lost = path_of(locator), "a relative source is relative to models.toml"
        try:
            is_folder = stat.S_ISDIR(os.stat(root).st_mode)
        except OSError as error:
            raise _translated(error, locator, missing=lost, what="no such folder") from error
        if not is_folder:
            raise NotFound("not a folder", locator=locator, hint=lost)
        files = []
        for folder, folders, names in os.walk(root, onerror=lambda error: _raise(error, locator)):
            folders.sort()
            for name in sorted(names):
                path = os.path.join(folder, name)
                try:
                    found = os.stat(path)
                except OSError as error:
                    raise _translated(error, path, missing="restore what the link leads to, or remove it") from error
                if stat.S_ISREG(found.st_mode):
                    files.append(Listed(path=os.path.relpath(path, root), size=found.st_size))
        return Listing(locator=locator, files=tuple(files))

    def origin(self, locator: str) -> str:
        return os.path.dirname(path_of(locator))

    def put(self, locator: str, size: int, read: ReadRange, on_send: OnSend) -> int:
        return file_upload.put(path_of(locator), size, read, on_send, locator)


def path_of(locator: str) -> str:
    """The path that a locator names. Raises SourceError."""
    if not locator.startswith("file://"):
        return locator
    parts = urlsplit(locator)
    if parts.netloc not in ("", "localhost"):
        raise SourceError("a file URL names no host", locator=locator, hint="write file:///path")
    return unquote(parts.path)


def _raise(error: OSError, locator: str) -> None:
    raise _translated(error, locator) from error


def _translated(error: OSError, locator: str, *, missing: str = "", what: str = "no such file") -> SourceError:
    """*what* is told of what is not there, and *missing* is the hint then."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
        return NotFound(what, locator=locator, hint=missing)
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessDenied("permission denied", locator=locator, hint="check who may read the source folder")
    return ConnectionFailed(error.strerror or str(error), locator=locator)
