"""What a store can complain about. One base; a code that scripts may rely on; fields, not only text."""

from __future__ import annotations

import errno


class CasError(Exception):
    """A store could not do what was asked. ``details`` holds the fields that ``str()`` tells in words."""

    code = "UNKNOWN_ERROR"

    def __init__(self, what: str, *, hint: str = "", **details: object) -> None:
        super().__init__(what)
        self.what, self.hint, self.details = what, hint, details


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


class Stopped(CasError):
    """The caller's stop flag was set while waiting; nothing was acquired."""
