"""Sweep: deletion of dead blobs and stale partials. Marking is the caller's, who holds the store's exclusive lock.

A crash between two unlinks leaves garbage for the next sweep, and no index to repair. No mode is changed before an
unlink: a tree's hardlink to the same inode would change too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress

from . import locks
from .blobs import BlobState
from .digest import Digest
from .errors import LockTimeoutError
from .store import BlobStore

STALE_S = 7 * 86_400
"""Seconds without a write after which a partial that no root names is stale."""


def sweep(store: BlobStore, dead: Iterable[Digest]) -> list[Digest]:
    """Unlink blobs and their tables; the digests that existed. Not synced. Needs no free space. Raises OSError."""
    removed = []
    for digest in dead:
        try:
            os.unlink(store.layout.blob(digest))
        except FileNotFoundError:
            pass
        except (IsADirectoryError, PermissionError):
            if not os.path.isdir(store.layout.blob(digest)):
                raise
            store.blobs.quarantine(digest)  # a folder under a blob's name was not made by this package
            removed.append(digest)
        else:
            removed.append(digest)
        with suppress(FileNotFoundError):
            os.unlink(store.layout.table(digest))
        store.blobs.clear_suspects([digest])
    return removed


def orphan_tables(store: BlobStore) -> list[str]:
    """Paths of tables without a blob, as a crash between two unlinks leaves them."""
    found = []
    for fan in range(256):
        folder = f"{store.layout.blobs}/{fan:02x}"
        with suppress(FileNotFoundError):
            names = set(os.listdir(folder))
            found += [f"{folder}/{n}" for n in names if n.endswith(".pieces") and n.removesuffix(".pieces") not in names]
    return found


def partials(store: BlobStore) -> Iterator[Digest]:
    """Digests with a partial, or only its data or journal."""
    try:
        names = os.listdir(store.layout.partials)
    except FileNotFoundError:
        return
    for hex_ in sorted({name.partition(".")[0] for name in names}):
        with suppress(ValueError):  # an incoming file, or a foreign name
            yield Digest.parse("sha256:" + hex_)


def stale_partials(store: BlobStore, named: frozenset[Digest]) -> list[Digest]:
    """Partials whose blob is intact, and week-old ones that are not in *named*; none whose blob lock is held."""
    stale = []
    for digest in partials(store):
        old = time.time() - _newest(store, digest) > STALE_S
        ended = _intact_by_name(store, digest) or (old and digest not in named)
        if ended and not locks.is_held(store.blob_lock_path(digest)):
            stale.append(digest)
    return stale


def end_commits(store: BlobStore) -> None:
    """Remove partials whose blob is intact, as a kill between the link and the unlink leaves them. Raises OSError."""
    for digest in partials(store):
        if _intact_by_name(store, digest):
            with suppress(LockTimeoutError):  # another process works on it
                remove_partial(store, digest)


def partial_bytes(store: BlobStore, digest: Digest) -> int:
    """Bytes on disk that removing a partial would free."""
    freed = 0
    for path in (store.layout.partial(digest), store.layout.journal(digest)):
        with suppress(FileNotFoundError):
            found = os.lstat(path)
            freed += found.st_blocks * 512 if found.st_nlink == 1 else 0
    return freed


def remove_partial(store: BlobStore, digest: Digest) -> int:
    """Remove a stale partial under its blob's lock; bytes freed. Raises LockTimeoutError if it is in use, OSError."""
    with store.lock_blob(digest, doing="removing a stale partial", timeout_s=0):
        freed = partial_bytes(store, digest)
        drop_partial(store, digest)
    return freed


def drop_partial(store: BlobStore, digest: Digest) -> None:
    """Unlink a partial and its journal. Hold the blob's lock. Raises OSError."""
    for path in (store.layout.partial(digest), store.layout.journal(digest)):
        with suppress(FileNotFoundError):
            os.unlink(path)


def _newest(store: BlobStore, digest: Digest) -> float:
    times = [0.0]
    for name in (store.layout.partial(digest), store.layout.journal(digest)):
        with suppress(FileNotFoundError):
            times.append(os.lstat(name).st_mtime)
    return max(times)


def _intact_by_name(store: BlobStore, digest: Digest) -> bool:
    try:
        size = os.lstat(store.layout.blob(digest)).st_size
    except FileNotFoundError:
        return False
    return store.blobs.stat(digest, size).state is BlobState.INTACT
