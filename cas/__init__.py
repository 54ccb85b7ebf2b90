"""The content-addressed store: bytes at rest, under their sha256. Knows no URL and no lockfile.

* Names: ``digest`` (the name of some bytes), ``layout`` (every path below ROOT, and the format file).
* Blobs: ``store`` (the whole, and its locks), ``blobs`` (status by stat, suspects, integrity stamps, quarantine),
  ``ingest`` (every way in), ``partial`` (an unfinished blob and its journal), ``hasher`` (its sha256 while it arrives),
  ``commit`` (the steps that make it a blob).
* Pieces: ``chunking`` (the division of a blob), ``pieces`` (hashes of its pieces), ``compressed`` (its pieces as zstd
  frames), ``scrub`` (reading again what is at rest).
* Trees: ``entries`` (what a path of a tree holds), ``links`` (placing it there), ``materialise`` (filling folders),
  ``tree`` (files of a tree, managed and others), ``inventory`` (the record of what was placed), ``trash`` (removed trees).
* Lifetime: ``locks`` (mutual exclusion between processes), ``leases`` (roots of work in progress), ``sweep`` (deletion of
  dead blobs; marking is the caller's).
* Below all: ``presence`` (whether anything is at a path), ``durable`` (files that survive a power cut), ``records`` (their
  encoding with a checksum), ``syscalls``, ``buffers``, ``cancellation``, ``errors``.
"""

from .blobs import ABSENT, BlobState, BlobStatus
from .cancellation import CancellationToken
from .digest import EMPTY, Digest
from .entries import Entry, Inline, Symlink
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
    "Entry",
    "Inline",
    "Layout",
    "LinkError",
    "LinkKind",
    "LinkMode",
    "LockTimeoutError",
    "NoSpaceError",
    "SizeMismatchError",
    "StoreFormatError",
    "StoreStateError",
    "Symlink",
]
