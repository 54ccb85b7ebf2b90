"""Prefetching: files that no listing names are fetched once to learn their digest, and kept for the coming reconcile.

Small files are committed in groups as they come. A large one is resumed only where its source tells versions apart: then
what a killed `lock` left is continued, as long as this machine has not been rebooted (a power cut loses pages, and nothing
here could tell), and what was hashed before is not fetched again.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from modelstow.backends import Body, Changed, EndedEarly, Source, redact
from modelstow.cas import EMPTY, BlobState, BlobStore, CancellationToken, Digest, leases, locks, scrub, syscalls
from modelstow.cas.buffers import aligned_buffer
from modelstow.cas.durable import write_all, write_file
from modelstow.cas.ingest import SMALL, Incoming
from modelstow.cas.pieces import PieceTable
from modelstow.cas.records import INVALID, decode, encode

from ..events.progress import Task
from ..state_dirs import HASH_CACHE
from .context import STOPPED, TransferContext
from .pool import WorkerPool
from .retry import with_retries
from .worker import MOST_STEP, BodyReader

_KIND = "hash"
_TRIES = 3  # to read a file that changes
_TIME_STEP_NS = 50_000_000  # more than the step of the times of a local file system
_GROUP = 250  # small files that are committed together, if so many have come


@dataclass(slots=True, kw_only=True)
class Prefetcher:
    """Fetches into the store that *store* opens, when the first file is wanted."""

    store: Callable[[], BlobStore]
    context: TransferContext
    threads: int = 8
    found: dict[str, tuple[Digest, int]] = field(default_factory=dict)  # by locator: digest and size in bytes
    _opened: BlobStore | None = None
    _small: list[tuple[str, bytes]] = field(default_factory=list)  # came, and are to be committed
    _mutex: Lock = field(default_factory=Lock)  # of the above

    def prefetch_all(self, locators: Iterable[str]) -> dict[str, tuple[Digest, int]]:
        """The digest and the size in bytes of each. Raises SourceError, OSError, Cancelled."""
        wanted = list(locators)
        self._store()  # once, before several threads would
        # A local file is read faster by one thread than handed to another; only what is large is worth a thread.
        local = [locator for locator in wanted if not self.context.registry.find(locator).network]
        large = self._read_small(local)
        remote = set(wanted) - set(local)
        with WorkerPool(self.threads, "prefetch", token=self.context.token, cancelled=STOPPED) as pool:
            for locator in (*large, *(each for each in wanted if each in remote)):
                pool.start(self._prefetch, locator)
            while pool.busy:
                pool.wait()
                if len(self._small) >= _GROUP or not pool.busy:
                    self._commit_small()
        return {locator: self.found[locator] for locator in wanted}

    def read(self, digest: Digest) -> bytes:
        """The content of a small file that was prefetched."""
        return b"" if digest == EMPTY else Path(self._store().layout.blob(digest)).read_bytes()

    def keep(self) -> None:
        """Lease what was fetched as unfinished work, so that gc leaves it for the coming reconcile or `lock`."""
        if not self.found:
            return
        store, token = self._store(), self.context.token
        digests = [digest for digest, size in self.found.values() if size]
        lease = leases.take(store, doing="lock", digests=digests, token=token)
        for locator, (digest, size) in list(self.found.items()):
            # A sweep may have run between the fetch and the lease.
            if size and store.blobs.stat(digest, size).state is not BlobState.INTACT and not token.cancelled:
                self._prefetch(locator)
        self._commit_small()
        lease.close()

    def _store(self) -> BlobStore:
        if self._opened is None:
            self._opened = self.store()
            self._opened.prepare()
        return self._opened

    # ---- small files

    def _read_small(self, locators: list[str]) -> list[str]:
        """Read and commit the small ones of local files; the others."""
        large: list[str] = []
        names: list[str] = []
        sizes: list[int] = []
        with Task(f"reading {len(locators):,} files", self.context.emit) as task:

            def contents() -> Iterator[bytes]:
                for locator in locators:
                    if self.context.token.cancelled:
                        return
                    data = self._content(locator)
                    if data is None:
                        large.append(locator)
                        continue
                    names.append(locator)
                    sizes.append(len(data))
                    yield data

            for number, digest in enumerate(self._store().ingest.add_small(contents())):
                if not number:
                    task.begin(None)
                self.found[names[number]] = digest, sizes[number]
                task.advance(sizes[number])
        self.context.token.check(STOPPED)
        return large

    def _content(self, locator: str) -> bytes | None:
        """A local file's bytes; None where it is large. Raises SourceError, Cancelled."""
        for _ in range(_TRIES):
            body = self.context.registry.find(locator).open(locator)
            try:
                if body.total is None or body.total > SMALL:
                    return None
                watch = _Watch(body, self.context.token)
                with suppress(EndedEarly):  # it was truncated meanwhile
                    data = self._read_whole(body, locator)
                    if not watch.changed():
                        return data
            finally:
                body.close()
        raise _changed(locator)

    def _read_whole(self, body: Body, locator: str) -> bytes:
        """A body of at most ``SMALL`` bytes, all of it. Raises SourceError, Cancelled."""
        reader, data = BodyReader(body, locator, self.context.policy, self.context.clock), bytearray()
        buffer = memoryview(bytearray((body.total or 0) + 1))
        while count := reader.read(buffer):
            self.context.token.check(STOPPED)
            data += buffer[:count]
        if len(data) != body.total:
            raise EndedEarly("the body ended early", locator=locator)
        return bytes(data)

    def _commit_small(self) -> None:
        with self._mutex:
            group, self._small = self._small, []
        digests = self._store().ingest.add_small(data for _, data in group)
        for (locator, data), digest in zip(group, digests, strict=True):
            self.found[locator] = digest, len(data)

    # ---- files of any size

    def _prefetch(self, locator: str) -> None:
        with_retries(lambda: self._prefetch_once(locator), self.context.policy, self.context.token, self.context.clock)

    def _prefetch_once(self, locator: str) -> None:
        source = self.context.registry.find(locator)
        if known := self._cached_hash(source, locator):
            self.found[locator] = known
            return
        for _ in range(_TRIES):
            if self._read_once(source, locator):
                return
        raise _changed(locator)

    def _read_once(self, source: Source, locator: str) -> bool:
        """Read, hash and keep a file; False if it changed meanwhile."""
        store, body = self._store(), source.open(locator)
        watch = _Watch(body, self.context.token)
        try:
            if body.total is not None and body.total <= SMALL and not body.start:
                data = self._read_whole(body, locator)
                if watch.changed():
                    return False
                with self._mutex:
                    self._small.append((locator, data))
                return True
            version = body.version
            key = f"{locator}\0{version}\0{locks.boot_id()}" if version and locks.boot_id() else ""
            with store.ingest.incoming(key) as incoming:
                if incoming.held != body.total:
                    if incoming.held:
                        body.close()
                        body = _continued(source, locator, version, incoming)
                        watch = _Watch(body, self.context.token)
                    if not _reflinked(body, incoming):
                        self._copy(body, incoming, locator)
                table = scrub.hash_file(incoming.fd, incoming.held)
                if watch.changed():
                    incoming.done = True  # the bytes of two states of the file
                    return False
                self._commit(incoming, table)
        except EndedEarly:
            if watch.changed():  # it was truncated
                return False
            raise
        finally:
            body.close()
        self._cache_hash(locator, version, table.digest, table.size)
        self.found[locator] = table.digest, table.size
        return True

    def _copy(self, body: Body, incoming: Incoming, locator: str) -> None:
        buffer = aligned_buffer(MOST_STEP)
        reader, at = BodyReader(body, locator, self.context.policy, self.context.clock), body.start
        with Task(redact(locator), self.context.emit) as task:
            task.begin(body.total)
            if at:
                task.advance(at)
            while count := reader.read(buffer):
                self.context.token.check(STOPPED)
                write_all(incoming.fd, buffer[:count], at)
                at += count
                task.advance(count)
        if body.total is not None and body.total != at:
            raise EndedEarly("the body ended early", locator=locator)

    def _commit(self, incoming: Incoming, table: PieceTable) -> None:
        store, digest = self._store(), table.digest
        with store.lock_blob(digest, doing=f"keeping {digest.short}", token=self.context.token):
            store.ingest.take(incoming, table)

    # ---- what was hashed before

    def _cached_hash(self, source: Source, locator: str) -> tuple[Digest, int] | None:
        """Digest and size, where it was fetched before, is of the same version, and is in the store still."""
        try:
            row = decode(self._store().writers.read_mine(self._record(locator)), _KIND, version=1)
            version, digest, size = str(row["file_version"]), Digest.parse(row["digest"]), int(row["size"])
        except (OSError, *INVALID):
            return None
        if not size or self._store().blobs.stat(digest, size).state is not BlobState.INTACT:
            return None
        body = source.open(locator, start=0, stop=1)
        body.close()
        return (digest, size) if (body.version, body.total) == (version, size) else None

    def _cache_hash(self, locator: str, version: str, digest: Digest, size: int) -> None:
        if version:
            row = {"file_version": version, "digest": str(digest), "size": size}
            with suppress(OSError):  # then it is fetched again
                self._store().make_state_dir(HASH_CACHE)
                write_file(self._record(locator), encode(_KIND, 1, row))

    def _record(self, locator: str) -> Path:
        name = hashlib.sha256(locator.encode("utf-8", "surrogatepass")).hexdigest()
        return self._store().layout.state_dir(HASH_CACHE) / name


class _Watch:
    """Whether a local file changes while it is read, by its size, times and inode. Of other sources nothing is known.

    The times advance in steps: a write in the same step as the one before it would not show. So a file that was written to
    just now is read a moment later.
    """

    def __init__(self, body: Body, token: CancellationToken) -> None:
        self._stat = body.stat
        if self._stat is not None:
            age_ns = time.time_ns() - self._stat().st_mtime_ns
            if 0 <= age_ns < _TIME_STEP_NS:
                token.wait((_TIME_STEP_NS - age_ns) / 1e9)
            self._before = self._state()

    def changed(self) -> bool:
        return self._stat is not None and self._state() != self._before

    def _state(self) -> tuple[int, ...]:
        assert self._stat is not None
        found = self._stat()
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _changed(locator: str) -> Changed:
    what = f"the file changed each of the {_TRIES} times that it was read"
    return Changed(what, locator=locator, hint="lock again when nothing writes to it, or lock a copy")


def _reflinked(body: Body, incoming: Incoming) -> bool:
    """Share a local file's extents where the file system can."""
    if body.fd is not None:
        with suppress(OSError):
            syscalls.reflink(body.fd, incoming.fd)
            return True
    return False


def _continued(source: Source, locator: str, version: str, incoming: Incoming) -> Body:
    """The rest of what *incoming* holds the beginning of; all of it where the source would give something else."""
    body = source.open(locator, start=incoming.held)
    if body.version == version and body.start == incoming.held and body.ranged:
        return body
    body.close()
    os.ftruncate(incoming.fd, 0)
    return source.open(locator)
