"""Errors of the store: one base class, a stable code for scripts, and the facts as fields."""

from __future__ import annotations

import enum
import errno


class Cause(enum.Enum):
    """Kind of an error, by which a caller chooses a hint for the user: this package knows no command line."""

    LATER_FORMAT = enum.auto()  # made by a later version
    NOT_A_STORE = enum.auto()
    LOCK_HELD = enum.auto()
    LOCK_LOST = enum.auto()  # the lock file was removed, or file locks are unreliable here
    LINK_UNAVAILABLE = enum.auto()
    INVENTORY_UNREADABLE = enum.auto()
    LEASE_UNREADABLE = enum.auto()
    ROOT_UNREADABLE = enum.auto()


class CasError(Exception):
    """Base of the store's errors. ``details`` holds as fields what ``str()`` says in words."""

    code = "UNKNOWN_ERROR"

    def __init__(self, what: str, *, hint: str = "", cause: Cause | None = None, **details: object) -> None:
        super().__init__(what)
        self.what, self.hint, self.cause, self.details = what, hint, cause, details


class StoreFormatError(CasError):
    """The store has a format or feature that this version does not know; nothing was changed."""

    code = "SCHEMA_VERSION_MISMATCH"


class StoreStateError(CasError):
    """A root, lease or record cannot be read, so what it keeps is unknown and nothing was deleted."""

    code = "FILESYSTEM_ERROR"


class LockTimeoutError(CasError):
    """A lock was not acquired in time, or lost. ``details``: holder (a dict or None), timeout (seconds)."""

    code = "LOCK_TIMEOUT"


FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk or an exhausted quota."""


class NoSpaceError(CasError):
    """Not enough free space. ``details``: bytes_needed, bytes_available, path."""

    code = "NO_SPACE"


class ChecksumError(CasError):
    """Bytes hash to another digest than expected. ``details``: file_path, expected, actual, sources."""

    code = "CHECKSUM_FAIL"


class SizeMismatchError(ChecksumError):
    """Bytes have another length than expected. ``details``: file_path, expected, actual, sources."""

    code = "SIZE_MISMATCH"


class LinkError(CasError):
    """No allowed kind of link could place a blob in a tree."""

    code = "FILESYSTEM_ERROR"


class Cancelled(CasError):
    """The caller's token was cancelled. No lock was acquired; what was being written can be resumed."""
