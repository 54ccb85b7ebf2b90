"""Bytes at rest: digests, blobs, piece tables, partials, links, trees, locks, leases. Knows no URL and no lockfile."""

from .blobs import ABSENT, BlobState, BlobStatus
from .cancellation import CancellationToken
from .digest import EMPTY, Digest
from .errors import (
    Cancelled,
    CasError,
    ChecksumError,
    LinkError,
    LockTimeoutError,
    NoSpaceError,
    SizeMismatchError,
    StoreFormatError,
    StoreStateError,
)
from .layout import Layout
from .links import LinkKind, LinkMode
from .store import BlobStore

__all__ = [
    "ABSENT",
    "EMPTY",
    "BlobState",
    "BlobStatus",
    "BlobStore",
    "CancellationToken",
    "Cancelled",
    "CasError",
    "ChecksumError",
    "Digest",
    "Layout",
    "LinkError",
    "LinkKind",
    "LinkMode",
    "LockTimeoutError",
    "NoSpaceError",
    "SizeMismatchError",
    "StoreFormatError",
    "StoreStateError",
]
