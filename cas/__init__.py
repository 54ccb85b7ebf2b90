"""Bytes at rest: digests, blobs, piece tables, partials, links, trees, locks, leases. Knows no URL and no lockfile."""

from .digest import EMPTY, Digest
from .errors import (
    CasError,
    ChecksumError,
    LinkError,
    LockTimeoutError,
    NoSpaceError,
    SizeMismatchError,
    Stopped,
    StoreFormatError,
    StoreStateError,
)
from .layout import Layout
from .links import LinkKind, LinkMode
from .look import ABSENT, BlobState, BlobStatus
from .store import BlobStore

__all__ = [
    "ABSENT",
    "EMPTY",
    "BlobState",
    "BlobStatus",
    "BlobStore",
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
    "Stopped",
    "StoreFormatError",
    "StoreStateError",
]
