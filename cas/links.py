"""Links: a blob placed in a tree as hardlink, reflink, symlink or copy; a fall-back is reported, never silent.

Other entries are created.
"""

from __future__ import annotations

import enum
import errno
import os
import re
import secrets
from collections.abc import Callable

from .digest import Digest
from .durable import write_all
from .entries import Inline, Other, Symlink
from .errors import Cause, LinkError

_BESIDE = re.compile(r"\.modelstow-[0-9a-f]{12}")
COPY_STEP = 64 << 20  # bytes handed to copy_file_range at once


class LinkKind(enum.StrEnum):
    """The way a path of a tree holds its entry. The last three share nothing with the store; they are created: ``EMPTY``
    files, ``INLINE`` files of bytes that the tree gives, and ``LITERAL`` symlinks, whose target it gives.
    """

    HARDLINK = "hardlink"
    REFLINK = "reflink"
    SYMLINK = "symlink"
    COPY = "copy"
    EMPTY = "empty"
    INLINE = "inline"
    LITERAL = "literal"


class LinkMode(enum.StrEnum):
    """The user's choice of link kinds; ``AUTO`` is hardlink, reflink, copy."""

    HARDLINK = "hardlink"
    REFLINK = "reflink"
    SYMLINK = "symlink"
    COPY = "copy"
    AUTO = "auto"

    @property
    def kinds(self) -> tuple[LinkKind, ...]:
        """The kinds to try, best first."""
        return _ORDER[self]


_ORDER = {
    LinkMode.AUTO: (LinkKind.HARDLINK, LinkKind.REFLINK, LinkKind.COPY),
    LinkMode.HARDLINK: (LinkKind.HARDLINK, LinkKind.REFLINK, LinkKind.COPY),
    LinkMode.REFLINK: (LinkKind.REFLINK, LinkKind.COPY),
    LinkMode.SYMLINK: (LinkKind.SYMLINK, LinkKind.COPY),
    LinkMode.COPY: (LinkKind.COPY,),
}

# What the kernel answers where a kind of link cannot be made: another file system, too many links, protected_hardlinks
# or a FAT volume, no such operation. Everything else (no space, an I/O error) is a failure, not a reason to copy.
UNAVAILABLE = {
    errno.EXDEV,
    errno.EMLINK,
    errno.EPERM,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
    errno.ENOTTY,
    errno.EINVAL,
    errno.ENOSYS,
}
_PERMANENT = UNAVAILABLE - {errno.EMLINK}


class Linker:
    """A linker: it places blobs by the first kind that works, and remembers which do not work here at all.

    Safe for threads: what is remembered only saves attempts.
    """

    def __init__(self, mode: LinkMode, *, strict: bool = False) -> None:
        self._kinds = mode.kinds[:1] if strict else mode.kinds
        self._unsupported: set[LinkKind] = set()

    @property
    def prefers_hardlinks(self) -> bool:
        """Whether the first kind to be tried is a hardlink, and it was not refused here before."""
        return self._kinds[0] is LinkKind.HARDLINK and LinkKind.HARDLINK not in self._unsupported

    def place(self, blob: str, digest: Digest, size: int, folder_fd: int, name: str, *, target: str = "") -> LinkKind:
        """Make *name* in the open folder hold the blob. The name must be free.

        *target* is what a symlink should say (default: the blob's path). Copies are durable on return.
        Raises LinkError when no allowed kind works, FileExistsError, OSError (no space, …).
        """
        if size == 0:
            create(Inline(b""), folder_fd, name)
            return LinkKind.EMPTY
        refusal: OSError | None = None
        for kind in self._kinds:
            if kind in self._unsupported:
                continue
            try:
                _place(kind, blob, digest, size, folder_fd, name, target or blob)
            except OSError as error:
                if error.errno not in UNAVAILABLE:
                    raise
                if error.errno in _PERMANENT and kind is not self._kinds[-1]:
                    self._unsupported.add(kind)
                refusal = error
                continue
            return kind
        wanted = " or ".join(self._kinds)
        raise LinkError(
            f"cannot {wanted} {name}: {refusal.strerror if refusal else 'tried before'}",
            cause=Cause.LINK_UNAVAILABLE,
        )


def kind_of(entry: Other) -> LinkKind:
    """The kind of link of an entry that is no blob."""
    return LinkKind.LITERAL if isinstance(entry, Symlink) else LinkKind.INLINE


def create(entry: Other, folder_fd: int, name: str) -> LinkKind:
    """Make a symlink or small file in an open folder. Its bytes are durable on return. Raises FileExistsError, OSError."""
    if isinstance(entry, Symlink):
        os.symlink(entry.target, name, dir_fd=folder_fd)
        return kind_of(entry)
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=folder_fd)
    try:
        os.fchmod(fd, 0o644)
        if entry.content:
            write_all(fd, entry.content)
            os.fsync(fd)
    finally:
        os.close(fd)
    return kind_of(entry)


def _place(kind: LinkKind, blob: str, digest: Digest, size: int, folder_fd: int, name: str, target: str) -> None:
    if kind is LinkKind.HARDLINK:
        os.link(blob, name, dst_dir_fd=folder_fd, follow_symlinks=False)
    elif kind is LinkKind.SYMLINK:
        os.symlink(target, name, dir_fd=folder_fd)
    else:
        _duplicate(blob, digest, size, folder_fd, name, reflink=kind is LinkKind.REFLINK)


def _duplicate(blob: str, digest: Digest, size: int, folder_fd: int, name: str, *, reflink: bool) -> None:
    source = os.open(blob, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        copy = os.open(name, flags, 0o600, dir_fd=folder_fd)
        try:
            if reflink:
                from . import syscalls

                syscalls.reflink(source, copy)
            else:
                _copy(source, copy, size)
            os.fchmod(copy, 0o444)
            # A copy carries the same proof in its inode as its blob.
            os.utime(copy, (digest.mtime, digest.mtime))
            os.fsync(copy)
        except BaseException:
            os.unlink(name, dir_fd=folder_fd)
            raise
        finally:
            os.close(copy)
    finally:
        os.close(source)


def _copy(source: int, copy: int, size: int) -> None:
    done = 0
    while done < size:
        try:
            count = os.copy_file_range(source, copy, min(COPY_STEP, size - done), done, done)
        except (OSError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno not in UNAVAILABLE:
                raise
            data = os.pread(source, min(1 << 20, size - done), done)
            count = os.pwrite(copy, data, done)
        if count == 0:
            raise OSError(errno.EIO, "the blob is shorter than its record")
        done += count


def is_temp_name(name: str) -> bool:
    """Whether a name is one that ``replace`` gives a file before its own. Of a killed one, it is left."""
    return _BESIDE.fullmatch(name) is not None


def is_left_over(path: str) -> bool:
    """Whether a path in a tree is what a killed ``replace`` left, and not a file of the user's."""
    return is_temp_name(path.rpartition("/")[2])


def remove_temp_names(folder_fd: int) -> None:
    """Remove the names that a killed ``replace`` left in an open folder; hold the tree's lock. Raises OSError."""
    for name in filter(is_temp_name, os.listdir(folder_fd)):
        os.unlink(name, dir_fd=folder_fd)


def replace(place: Callable[[str], LinkKind], folder_fd: int, name: str) -> LinkKind:
    """*place* called with a free name, whose file then takes *name* from the one that may have it, in one step."""
    beside = f".modelstow-{secrets.token_hex(6)}"
    try:
        kind = place(beside)
        os.replace(beside, name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
    finally:
        # rename(2) on two names of one inode does nothing and keeps both, and after a failure ours is left over.
        try:
            os.unlink(beside, dir_fd=folder_fd)
        except FileNotFoundError:
            pass
    return kind
