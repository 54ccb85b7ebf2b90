"""Leases: work in flight, or a program that uses a tree, keeps its blobs from being swept.

A lease names every digest before the first of them is relied on. It is made under the store's shared lock, so that no
sweep runs between looking and being seen. Its held lock proves that its holder lives; elsewhere (another host, another
boot) its mtime does, which a holder renews. Work that ended badly leaves its lease behind, without a lock: it keeps its
blobs for another week, because an interrupted fetch of 400 GB is not garbage that night.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event, Thread
from threading import Lock as Mutex

from . import locks
from .cancellation import CancellationToken
from .digest import Digest
from .durable import UNFINISHED, fsync_folder
from .errors import Cause, StoreStateError
from .store import BlobStore

UNFINISHED_S = 7 * 86_400
"""How long unfinished work keeps its blobs after its process died."""
HEARTBEAT_S = 600.0
_SUFFIX = ".lease"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRecord:
    """What a lease file says."""

    doing: str
    digests: frozenset[Digest]
    reserved: Mapping[Digest, int] = field(default_factory=dict)  # bytes of blobs still to be fetched


class Lease:
    """A held lease. ``finish`` removes it; ``close`` leaves it behind as unfinished work."""

    def __init__(self, store: BlobStore, record: LeaseRecord) -> None:
        """Write and hold the lease; durable on return. Hold the store's shared lock. Raises OSError."""
        self._store, self._record, self._mutex = store, record, Mutex()
        self._path, self._fd = self._create()
        self._ended = Event()
        Thread(target=self._beat, name="lease-heartbeat", daemon=True).start()

    def reserve(self, sizes: Mapping[Digest, int]) -> None:
        """Say which blobs the holder is going to fetch, and their sizes in bytes; durable on return.

        Raises OSError, LockTimeoutError.
        """
        with self._mutex:
            self._record = replace(self._record, reserved=dict(sizes))
            old = self._path, self._fd
            with shared_store_lock(self._store, doing="reserving room"):
                self._path, self._fd = self._create()
            old[0].unlink(missing_ok=True)
            os.close(old[1])

    def renew(self) -> bool:
        """Make sure that the lease still stands (a process may have slept for a week); False if it had to be made anew.

        Raises OSError, LockTimeoutError.
        """
        with self._mutex:  # every thread of a fetch renews before its commit
            try:
                if os.path.samestat(os.stat(self._path), os.fstat(self._fd)):
                    return True
            except FileNotFoundError:
                pass
            with shared_store_lock(self._store, doing="renewing a lease"):
                path, fd = self._create()
            os.close(self._fd)
            self._path, self._fd = path, fd
            return False

    def finish(self) -> None:
        """The work is done: what it needed is kept by roots now."""
        self._path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Let go, leaving the file behind as the root of unfinished work."""
        self._ended.set()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _create(self) -> tuple[Path, int]:
        while True:
            with suppress(FileNotFoundError):  # taken for the leftover of a dead writer, before it was locked
                return self._write()

    def _write(self) -> tuple[Path, int]:
        folder = self._store.layout.leases
        path = folder / f"{secrets.token_hex(8)}{_SUFFIX}"
        beside = folder / f"{UNFINISHED}{secrets.token_hex(8)}"
        held = locks.acquire(beside, doing=self._record.doing, mode=self._store.lock_mode)
        try:
            held.write_note(
                digests=[digest.hex for digest in sorted(self._record.digests)],
                reserved={digest.hex: size for digest, size in self._record.reserved.items()},
            )
            os.fsync(held.fd)
            os.rename(beside, path)
            fsync_folder(folder)
            return path, os.dup(held.fd)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        finally:
            held.close()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            with suppress(OSError):  # it may be gone for now; the next commit renews it
                os.utime(self._path)


def shared_store_lock(
    store: BlobStore, *, doing: str, timeout_s: float | None = None, token: CancellationToken | None = None
) -> locks.Lock:
    """The store's lock for those who add, held for moments. They pass a gate that a waiting sweep holds, so that it
    is not starved by a stream of them."""
    with store.lock("gate", doing=doing, shared=True, timeout_s=timeout_s, token=token):
        return store.lock("store", doing=doing, shared=True, timeout_s=timeout_s, token=token)


def exclusive_store_lock(
    store: BlobStore, *, doing: str, timeout_s: float | None = None, token: CancellationToken | None = None
) -> locks.Lock:
    """The store's lock for those who delete."""
    with store.lock("gate", doing=doing, timeout_s=timeout_s, token=token):
        return store.lock("store", doing=doing, timeout_s=timeout_s, token=token)


def take(store: BlobStore, *, doing: str, digests: Iterable[Digest], reserved: Mapping[Digest, int] | None = None,
         timeout_s: float | None = None, token: CancellationToken | None = None) -> Lease:  # fmt: skip
    """Lease *digests*. *reserved* are the sizes of blobs that the holder is going to fetch.

    Raises LockTimeoutError, Cancelled, OSError.
    """
    record = LeaseRecord(doing=doing, digests=frozenset(digests), reserved=dict(reserved or {}))
    with shared_store_lock(store, doing=doing, timeout_s=timeout_s, token=token):
        return Lease(store, record)


def active(store: BlobStore, *, remove_expired: bool = False, held: bool = True) -> list[tuple[Path, LeaseRecord, bool]]:
    """Every lease that counts, and whether its holder lives; without *held* only those whose holder does not.

    Raises StoreStateError for one that cannot be read.
    """
    folder = store.layout.leases
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    result = []
    for name in names:
        path = folder / name
        if name.startswith(UNFINISHED):
            continue
        live = locks.is_held(path)
        if live and not held:
            continue
        if not live and _age(path) > UNFINISHED_S:
            if remove_expired:
                path.unlink(missing_ok=True)
            continue
        record = _read(path)
        if record is not None:
            result.append((path, record, live))
    return result


def drop_superseded(store: BlobStore, digests: frozenset[Digest]) -> None:
    """Remove leases of dead work all of whose blobs the caller has just brought home.

    One that cannot be read stops gc, not those who fetch.
    """
    with suppress(StoreStateError):
        for path, record, _ in active(store, held=False):
            if record.digests <= digests:
                path.unlink(missing_ok=True)


def _age(path: Path) -> float:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)  # a clock that was set back makes things young, never old
    except FileNotFoundError:
        return 0.0


def _read(path: Path) -> LeaseRecord | None:
    try:
        note = json.loads(path.read_bytes())
        return LeaseRecord(
            doing=str(note.get("holder", {}).get("doing", "")),
            digests=frozenset(Digest.parse("sha256:" + hex_) for hex_ in note["digests"]),
            reserved={Digest.parse("sha256:" + hex_): int(size) for hex_, size in note["reserved"].items()},
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise StoreStateError(
            f"lease {path} cannot be read ({error}), so nothing may be deleted",
            cause=Cause.LEASE_UNREADABLE,
        ) from error
