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
from .look import ABSENT, BlobState, Look
from .store import BlobStore

__all__ = [
    "ABSENT",
    "EMPTY",
    "BlobState",
    "BlobStore",
    "CasError",
    "ChecksumError",
    "Digest",
    "Layout",
    "LinkError",
    "LinkKind",
    "LinkMode",
    "LockTimeoutError",
    "Look",
    "NoSpaceError",
    "SizeMismatchError",
    "Stopped",
    "StoreFormatError",
    "StoreStateError",
]
