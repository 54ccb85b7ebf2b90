"""Reading what others may have laid: files of a store's own folders, of which the name alone is known.

Whoever may write into a folder of the store, and whatever filled an old disk, can put anything under such a name: a pipe,
on which a reader would wait for ever, a symlink to an endless device, a file of a terabyte. ``read_state`` reads a regular
file of bounded size, and of a user that may have written it; everything else is an OSError.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

MOST_BYTES = 128 << 20
"""Most bytes of a state file. A lockfile has at most 64 MiB, and what is on record of one takes about as many."""


@dataclass(frozen=True, slots=True)
class Writers:
    """The users whose state files count in one store; None: every user's, since the folders' modes say who may write."""

    readable: frozenset[int] | None = None  # whose files are read
    mine: frozenset[int] | None = None  # whose files say what is to be done outside the store, or with the user's files

    @classmethod
    def of(cls, root: Path, *, shared: bool) -> Writers:
        """Those of the store at *root*: in a private one this user, root, and the owner of the store (behind a mount of
        another user namespace, all files belong to an unmapped user)."""
        own = frozenset({os.geteuid(), 0})
        if shared:
            return cls(mine=own)
        try:
            own |= {os.stat(root).st_uid}
        except OSError:
            pass  # there is no store, and so nothing to be read
        return cls(own, own)

    def read_mine(self, path: str | Path) -> bytes:
        """The content of a state file that only this user, or root, may have written. Raises as ``read_state``."""
        return read_state(path, Writers(self.mine))


EVERYBODY = Writers()


def open_regular(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Descriptor of a regular file; no symlink is followed, and a pipe does not block. Raises OSError for anything else."""
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return fd


def read_state(path: str | Path, writers: Writers = EVERYBODY, *, most: int = MOST_BYTES) -> bytes:
    """The content of a state file. Raises FileNotFoundError, OSError for what is not a readable file of these writers."""
    return read_owned(path, writers, most=most)[0]


def read_owned(path: str | Path, writers: Writers = EVERYBODY, *, most: int = MOST_BYTES) -> tuple[bytes, int]:
    """The content of a state file and the user that wrote it. Raises as ``read_state``."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a symlink, a socket
            raise OSError(errno.EINVAL, "not a regular file", str(path)) from error
        raise
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if writers.readable is not None and found.st_uid not in writers.readable:
            raise PermissionError(errno.EPERM, f"a file of another user ({found.st_uid})", str(path))
        if found.st_size > most:
            raise OSError(errno.EFBIG, f"more than {most:,} bytes", str(path))
        raw = b""
        while (left := found.st_size - len(raw)) and (chunk := os.read(fd, left)):
            raw += chunk
        return raw, found.st_uid
    finally:
        os.close(fd)
