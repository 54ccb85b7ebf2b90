"""Local files: paths and ``file://`` URLs, also on mounted network file systems."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from threading import Lock
from urllib.parse import unquote, urlsplit

from . import file_upload
from .errors import AccessDenied, ConnectionFailed, NotFound, NotListable, SourceError
from .source import Body, Listed, Listing, OnSend, ReadRange

_LINK_HINT = "restore what the link leads to, remove it, or leave it out with `exclude`"
_MOST_ENTRIES = 1_000_000  # of one listing
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
        return Body(
            start=start,
            total=info.st_size,
            read_into=read_into,
            close=close,
            fd=fd,
            version=version,
            stat=lambda: os.fstat(fd),
        )

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
        return Listing(locator=locator, files=tuple(_walk(root, locator)))

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


def _walk(root: str, locator: str) -> Iterator[Listed]:
    """The files below a folder, through symlinks too. What cannot be read is listed with its error. Raises SourceError."""
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]  # folders, and those above by inode
    count = 0
    while pending:
        folder, above = pending.pop()
        path = os.path.join(root, folder)
        try:
            here = os.stat(path)
            with os.scandir(path) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            if not folder:
                raise _source_error(error, locator) from error
            yield Listed(path=folder, error=_source_error(error, path, hint=_LINK_HINT))
            continue
        if (here.st_dev, here.st_ino) in above:
            continue  # a symlink to a folder above: what is in it is listed there
        count += len(entries)
        if count > _MOST_ENTRIES:  # symlinks between folders can make very many ways to the same file
            raise NotListable(f"more than {_MOST_ENTRIES:,} files", locator=locator, hint="name a folder below it")
        for entry in entries:
            try:
                info = entry.stat()
            except OSError as error:
                yield Listed(path=folder + entry.name, error=_source_error(error, entry.path, hint=_LINK_HINT))
                continue
            if stat.S_ISREG(info.st_mode):
                yield Listed(path=folder + entry.name, size=info.st_size)
            elif stat.S_ISDIR(info.st_mode):
                pending.append((f"{folder}{entry.name}/", above | {(here.st_dev, here.st_ino)}))


def _source_error(
    error: OSError, locator: str, *, what: str = "no such file", hint: str = "", reason: str = ""
) -> SourceError:
    """The SourceError for an OSError; the keywords are for a missing file or folder."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
        return NotFound(what, locator=locator, hint=hint, reason=reason)
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessDenied("permission denied", locator=locator, hint="check who may read the source folder")
    return ConnectionFailed(error.strerror or str(error), locator=locator)
