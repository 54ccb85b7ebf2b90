"""The second half of mark and sweep: taking dead blobs and stale partials off the disk.

Mark is the caller's, and so is the store's exclusive lock. A crash between two unlinks leaves garbage for next time and
no index to repair. Nothing is chmodded before it is unlinked: a tree's hardlink to the same inode would lose its bits.
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
"""How old a partial that no lockfile names must be before it is stale."""


def sweep(store: BlobStore, dead: Iterable[Digest]) -> list[Digest]:
    """Unlink blobs and their tables; what was there. Needs no free byte. Raises OSError."""
    gone = []
    for digest in dead:
        try:
            os.unlink(store.layout.blob(digest))
        except FileNotFoundError:
            pass
        except (IsADirectoryError, PermissionError):
            if not os.path.isdir(store.layout.blob(digest)):
                raise
            store.blobs.quarantine(digest)  # a folder under a blob's name: somebody's, not ours to delete
            gone.append(digest)
        else:
            gone.append(digest)
        with suppress(FileNotFoundError):
            os.unlink(store.layout.table(digest))
        store.blobs.clear_suspects([digest])
    return gone


def orphan_tables(store: BlobStore) -> list[str]:
    """Tables beside which no blob stands (a crash between two unlinks)."""
    found = []
    for fan in range(256):
        folder = f"{store.layout.blobs}/{fan:02x}"
        with suppress(FileNotFoundError):
            names = set(os.listdir(folder))
            found += [f"{folder}/{n}" for n in names if n.endswith(".pieces") and n.removesuffix(".pieces") not in names]
    return found


def partials(store: BlobStore) -> Iterator[Digest]:
    """The blobs of which there is a partial, or a part of one."""
    try:
        names = os.listdir(store.layout.partials)
    except FileNotFoundError:
        return
    for hex_ in sorted({name.partition(".")[0] for name in names}):
        with suppress(ValueError):  # not a name of ours
            yield Digest.parse("sha256:" + hex_)


def stale_partials(store: BlobStore, named: frozenset[Digest]) -> list[Digest]:
    """Partials whose blob is committed, and week-old ones that are not in *named*; never one whose lock is held."""
    stale = []
    for digest in partials(store):
        old = time.time() - _newest(store, digest) > STALE_S
        ended = _intact_by_name(store, digest) or (old and digest not in named)
        if ended and not locks.is_held(store.blob_lock_path(digest)):
            stale.append(digest)
    return stale


def end_commits(store: BlobStore) -> None:
    """Remove partials whose blob is there: a kill came between the publishing and the removing. Raises OSError."""
    for digest in partials(store):
        if _intact_by_name(store, digest):
            with suppress(LockTimeoutError):  # somebody is at it just now
                remove_partial(store, digest)


def partial_bytes(store: BlobStore, digest: Digest) -> int:
    """What removing a partial would free."""
    freed = 0
    for path in (store.layout.partial(digest), store.layout.journal(digest)):
        with suppress(FileNotFoundError):
            found = os.lstat(path)
            freed += found.st_blocks * 512 if found.st_nlink == 1 else 0
    return freed


def remove_partial(store: BlobStore, digest: Digest) -> int:
    """Remove a stale partial under its lock; bytes freed. Raises LockTimeoutError when it came to life, OSError."""
    with store.lock_blob(digest, doing="removing a stale partial", timeout_s=0):
        freed = partial_bytes(store, digest)
        drop_partial(store, digest)
    return freed


def drop_partial(store: BlobStore, digest: Digest) -> None:
    """Unlink a partial and its journal, whatever they hold; the caller holds the blob's lock. Raises OSError."""
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
