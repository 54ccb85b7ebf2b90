"""Entries: what a path of a tree holds: a blob, by its digest, or something too small for the store, given in full.

Others than blobs are compared by their content, which is a readlink(2) or a read of a few bytes. A symlink is never
followed: it may lead anywhere, or nowhere.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass

from .digest import Digest

MAX_TARGET = 4095
"""Bytes of a symlink's target, at most: PATH_MAX without its zero byte."""
MAX_INLINE = 1 << 20
"""Bytes of an inline file, at most: they are in the inventory too. More is a blob."""


@dataclass(frozen=True, slots=True)
class Symlink:
    """A symlink with this target, relative or absolute. Raises ValueError where the target is none or too long."""

    target: str

    def __post_init__(self) -> None:
        if not 0 < len(self.content) <= MAX_TARGET or "\0" in self.target:
            raise ValueError(f"a symlink's target has 1 to {MAX_TARGET} bytes and no zero byte: {self.target[:80]!a}")

    @property
    def content(self) -> bytes:
        """The target as bytes."""
        return os.fsencode(self.target)


@dataclass(frozen=True, slots=True)
class Inline:
    """A small file with these bytes, which the store keeps no blob for. Raises ValueError where they are too many."""

    content: bytes

    def __post_init__(self) -> None:
        if len(self.content) > MAX_INLINE:
            raise ValueError(f"an inline file has {MAX_INLINE:,} bytes at most, not {len(self.content):,}")


Other = Symlink | Inline
"""An entry that is no blob."""
Entry = Digest | Other


def digest_of(entry: Entry) -> Digest:
    """The digest of an entry's bytes; of a symlink's target, as git has it."""
    return entry if isinstance(entry, Digest) else Digest.of(entry.content)


def read(path: str) -> Other | None:
    """The symlink or small file at a path, following no symlink there. Raises OSError.

    None where there is something else, nothing, or what may not be read, and so was not put there by us.
    """
    try:
        there = os.lstat(path)
        if stat.S_ISLNK(there.st_mode):
            return Symlink(os.readlink(path))
        if not stat.S_ISREG(there.st_mode) or there.st_size > MAX_INLINE:
            return None
        # It may be replaced meanwhile, by a pipe too.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # replaced since, by a symlink or a socket
            return None
        raise
    with open(fd, "rb") as file:
        data = file.read(MAX_INLINE + 1)
    return Inline(data) if len(data) <= MAX_INLINE else None
