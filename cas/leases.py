"""Leases: temporary roots, which keep the blobs of work in progress, or of a program that uses a tree.

A lease lists every digest before the first of them is relied on. It is made under the store's shared lock, so that no sweep
runs between its holder's first stat and its appearance. A lease is active while its lock is held, and for a week after its
mtime, which the holder renews: where its lock cannot be seen (another host) that is the sign of life, and an interrupted
fetch of 400 GB is not garbage the same night.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event, Thread

from . import locks
from .cancellation import CancellationToken
from .digest import Digest
from .durable import UNFINISHED, fsync_folder, write_all
from .errors import Cause, StoreStateError
from .records import INVALID, decode, encode, files_in, join_hex, reason, split_hex
from .store import BlobStore
from .untrusted import read_state

UNFINISHED_S = 7 * 86_400
"""Time that unfinished work keeps its blobs after its process died."""
HEARTBEAT_S = 600.0
"""Time between two renewals of a lease's mtime."""
_SUFFIX = ".lease"
_KIND, _VERSION = "lease", 1
_PLAIN = (b'{"holder"', b'{"digests"')  # how leases of earlier versions begin: JSON that is no record


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRecord:
    """The content of a lease file."""

    doing: str
    digests: frozenset[Digest]
    reserved: Mapping[Digest, int] = field(default_factory=dict)  # bytes of blobs still to be fetched

    def encode(self) -> bytes:
        """The lease as stored; this process is its holder."""
        fields = {
            "holder": locks.Holder.me(self.doing).to_json(),
            "digests": join_hex(sorted(self.digests)),
            "reserved": {digest.hex: size for digest, size in self.reserved.items()},
        }
        return encode(_KIND, _VERSION, fields)

    @classmethod
    def decode(cls, raw: bytes) -> LeaseRecord:
        """The lease in a record, or in the plain JSON of earlier versions. Raises one of ``records.INVALID``."""
        if raw.startswith(_PLAIN):
            fields = json.loads(raw)
            digests = [_digest(hex_) for hex_ in fields["digests"]]
        else:
            fields = decode(raw, _KIND, version=_VERSION)
            digests = split_hex(fields["digests"])
        return cls(
            doing=str(fields.get("holder", {}).get("doing", "")),
            digests=frozenset(digests),
            reserved={_digest(hex_): min(max(0, int(size)), 1 << 60) for hex_, size in fields["reserved"].items()},
        )


class Lease:
    """A held lease, with a thread that renews its mtime. ``finish`` removes it; ``close`` leaves unfinished work."""

    def __init__(self, store: BlobStore, record: LeaseRecord) -> None:
        """Write and hold a lease; durable on return. Hold the store's shared lock. Use ``take``. Raises OSError."""
        self._store, self._record, self._mutex = store, record, threading.Lock()
        self._path, self._fd = self._create()
        self._ended = Event()
        Thread(target=self._beat, name="lease-heartbeat", daemon=True).start()

    def reserve(self, sizes: Mapping[Digest, int]) -> None:
        """Record which blobs the holder is going to fetch, with their sizes in bytes; durable on return.

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
        """Ensure that the lease still exists: a suspended process may wake after a week. False if it had to be recreated.

        Then blobs may have been swept meanwhile. Any thread may call it. Raises OSError, LockTimeoutError.
        """
        with self._mutex:  # each thread of a fetch renews before its commit
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
        """Remove the lease: other roots keep the digests now. Not synced. Raises OSError."""
        self._path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Release the lease; its file stays as the root of unfinished work."""
        self._ended.set()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _create(self) -> tuple[Path, int]:
        while True:
            with suppress(FileNotFoundError):  # removed as a dead writer's, before it was locked
                return self._write()

    def _write(self) -> tuple[Path, int]:
        folder = self._store.layout.leases
        path = folder / f"{secrets.token_hex(8)}{_SUFFIX}"
        temp = folder / f"{UNFINISHED}{secrets.token_hex(8)}"
        held = locks.acquire(temp, doing=self._record.doing, mode=self._store.lock_mode)
        try:
            os.ftruncate(held.fd, 0)  # the lock wrote its note
            write_all(held.fd, self._record.encode(), 0)
            os.fsync(held.fd)
            os.rename(temp, path)
            fsync_folder(folder)
            return path, os.dup(held.fd)
        except BaseException:
            temp.unlink(missing_ok=True)
            raise
        finally:
            held.close()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            with suppress(OSError):  # it may be unreachable now; the next commit renews it
                os.utime(self._path)


def shared_store_lock(
    store: BlobStore, *, doing: str, timeout_s: float | None = None, token: CancellationToken | None = None
) -> locks.Lock:
    """The store's lock for adding a lease; hold it for moments. Raises LockTimeoutError, Cancelled, OSError.

    It is acquired through a gate that a waiting exclusive holder keeps closed, so that shared ones do not starve it.
    """
    with store.lock("gate", doing=doing, shared=True, timeout_s=timeout_s, token=token):
        return store.lock("store", doing=doing, shared=True, timeout_s=timeout_s, token=token)


def exclusive_store_lock(
    store: BlobStore, *, doing: str, timeout_s: float | None = None, token: CancellationToken | None = None
) -> locks.Lock:
    """The store's lock for deleting. Raises LockTimeoutError, Cancelled, OSError."""
    with store.lock("gate", doing=doing, timeout_s=timeout_s, token=token):
        return store.lock("store", doing=doing, timeout_s=timeout_s, token=token)


def take(store: BlobStore, *, doing: str, digests: Iterable[Digest], reserved: Mapping[Digest, int] | None = None,
         timeout_s: float | None = None, token: CancellationToken | None = None) -> Lease:  # fmt: skip
    """A new lease on *digests*; durable on return. *reserved* is the bytes of blobs that its holder is going to fetch.

    Raises LockTimeoutError, Cancelled, OSError.
    """
    record = LeaseRecord(doing=doing, digests=frozenset(digests), reserved=dict(reserved or {}))
    with shared_store_lock(store, doing=doing, timeout_s=timeout_s, token=token):
        return Lease(store, record)


def active(store: BlobStore, *, remove_expired: bool = False, held: bool = True) -> list[tuple[Path, LeaseRecord, bool]]:
    """Active leases: path, content, and whether the lock is held; without *held* only those whose lock is not.

    *remove_expired* deletes the others. Raises StoreStateError for a lease that cannot be read, OSError.
    """
    result = []
    for path in files_in(store.layout.leases):
        try:
            live = locks.is_held(path)
            if live and not held:
                continue
            if not live and _age(path) > UNFINISHED_S:
                if remove_expired:
                    path.unlink(missing_ok=True)
                continue
            record = _read(store, path)
        except (OSError, *INVALID) as error:
            raise StoreStateError(
                f"lease {path} cannot be read ({reason(error)}), so nothing may be deleted",
                cause=Cause.LEASE_UNREADABLE,
            ) from error
        if record is not None:
            result.append((path, record, live))
    return result


def drop_superseded(store: BlobStore, digests: frozenset[Digest]) -> bool:
    """Remove leases of dead processes whose digests are all in *digests*, of which the caller has a lease; whether any was.

    An unreadable lease stops garbage collection, not a fetch. Raises OSError.
    """
    found = False
    with suppress(StoreStateError):
        for path, record, _ in active(store, held=False):
            if record.digests <= digests:
                path.unlink(missing_ok=True)
                found = True
    return found


def _digest(hex_: str) -> Digest:
    return Digest.parse("sha256:" + hex_)


def _age(path: Path) -> float:
    try:
        return max(0.0, time.time() - os.lstat(path).st_mtime)  # after a clock was set back, files are young, never old
    except FileNotFoundError:
        return 0.0


def _read(store: BlobStore, path: Path) -> LeaseRecord | None:
    try:
        return LeaseRecord.decode(read_state(path, store.writers))
    except FileNotFoundError:
        return None
