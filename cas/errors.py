"""Errors of a store: one base, a code that scripts may rely on, and fields beside the text."""

from __future__ import annotations

import enum
import errno


class Cause(enum.Enum):
    """What an error is about, for those who know what the user can do about it: this package knows no command line."""

    LATER_FORMAT = enum.auto()  # a newer version made the store
    NOT_A_STORE = enum.auto()
    LOCK_HELD = enum.auto()
    LOCK_LOST = enum.auto()  # the lock file was removed, or this file system does not keep locks
    LINK_UNAVAILABLE = enum.auto()
    INVENTORY_UNREADABLE = enum.auto()
    LEASE_UNREADABLE = enum.auto()
    ROOT_UNREADABLE = enum.auto()


class CasError(Exception):
    """A store could not do what was asked. ``details`` holds as fields what ``str()`` says in words."""

    code = "UNKNOWN_ERROR"

    def __init__(self, what: str, *, hint: str = "", cause: Cause | None = None, **details: object) -> None:
        super().__init__(what)
        self.what, self.hint, self.cause, self.details = what, hint, cause, details


class StoreFormatError(CasError):
    """The store's format or one of its features is not known here; nothing was changed."""

    code = "SCHEMA_VERSION_MISMATCH"


class StoreStateError(CasError):
    """Something that garbage collection must read cannot be read, so nothing was deleted."""

    code = "FILESYSTEM_ERROR"


class LockTimeoutError(CasError):
    """A lock was not had in time. ``details``: holder, what it is doing, timeout in seconds."""

    code = "LOCK_TIMEOUT"


FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says of a disk without room."""


class NoSpaceError(CasError):
    """Not enough room. ``details``: bytes_needed, bytes_available, path."""

    code = "NO_SPACE"


class ChecksumError(CasError):
    """Bytes do not hash to the name they should carry. ``details``: file_path, expected, actual, sources."""

    code = "CHECKSUM_FAIL"


class SizeMismatchError(ChecksumError):
    """Bytes have another length than the lockfile says. ``details``: file_path, expected, actual, sources."""

    code = "SIZE_MISMATCH"


class LinkError(CasError):
    """No allowed way of placing a blob in a tree worked."""

    code = "FILESYSTEM_ERROR"


class Cancelled(CasError):
    """The caller's token was cancelled; what was being waited for was not acquired, what was being written is resumable."""
