"""Files that no listing names: fetched once, named by reading them, kept in the store for the coming reconcile.

What has no digest can be gone on with only where its source tells versions apart: then what a killed `lock` left is
continued, as long as this machine has not been started anew (a power cut loses pages, and nothing here could tell), and
what was named before is not fetched again.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from modelstow.backends import Body, EndedEarly, Source, redact
from modelstow.cas import EMPTY, BlobState, BlobStore, Digest, Stopped, leases, locks, scrub, syscalls
from modelstow.cas.durable import seal, unseal, write_all, write_file
from modelstow.cas.pieces import PieceTable

from ..events.progress import Task
from .context import STOPPED, TransferContext
from .intake import MOST_STEP, BodyReader
from .pool import WorkerPool
from .retry import with_retries


@dataclass(slots=True, kw_only=True)
class Prefetcher:
    """Pulls into the store that *store* opens, when the first file is pulled."""

    store: Callable[[], BlobStore]
    engine: TransferContext
    threads: int = 8
    outer: Event = field(default_factory=Event)  # the caller's: ends every pull
    pulled: dict[str, tuple[Digest, int]] = field(default_factory=dict)
    _opened: BlobStore | None = None

    def prefetch_all(self, locators: Iterable[str]) -> dict[str, tuple[Digest, int]]:
        """The name and the size in bytes of each, several at once. Raises SourceError, OSError, Stopped."""
        wanted = list(locators)
        self._store()  # once, before several threads would

        def one(locator: str) -> None:
            self.pulled[locator] = self._pull(locator)

        with WorkerPool(self.threads, "pull", stop=self.engine.stop, outer=self.outer, stopped=STOPPED) as crew:
            for locator in wanted:
                crew.start(one, locator)
            while crew.at_work:
                crew.wait()
        return {locator: self.pulled[locator] for locator in wanted}

    def read(self, digest: Digest) -> bytes:
        """A small file that was pulled."""
        return b"" if digest == EMPTY else Path(self._store().layout.blob(digest)).read_bytes()

    def keep(self) -> None:
        """Make what was pulled the root of unfinished work, so that gc leaves it for the coming reconcile or `lock`."""
        if not self.pulled:
            return
        store = self._store()
        digests = [digest for digest, size in self.pulled.values() if size]
        stop = self.engine.stop if self.engine.stop.is_set() else self.outer  # whoever interrupts waits for no lock
        lease = leases.take(store, doing="lock", digests=digests, stop=stop)
        for locator, (digest, size) in list(self.pulled.items()):
            # A sweep may have run between the pull and the lease.
            if size and store.stat(digest, size).state is not BlobState.INTACT and not self.engine.stop.is_set():
                self._pull(locator)
        lease.close()

    def _store(self) -> BlobStore:
        if self._opened is None:
            self._opened = self.store()
            self._opened.prepare()
        return self._opened

    def _pull(self, locator: str) -> tuple[Digest, int]:
        return with_retries(lambda: self._pull_once(locator), self.engine.policy, self.engine.stop, self.engine.clock)

    def _pull_once(self, locator: str) -> tuple[Digest, int]:
        store, source = self._store(), self.engine.registry.find(locator)
        if known := self._recall(source, locator):
            return known
        body = source.open(locator)
        try:
            version = body.version
            with _Spool(store, locator, version) as spool:
                if spool.held != body.total:
                    if spool.held:
                        body.close()
                        body = _continued(source, locator, version, spool)
                    if not _cloned(body, spool):
                        self._copy(body, spool, locator)
                size = spool.held
                table = scrub.hash_file(spool.fd, size)
                self._keep_blob(spool, table)
        finally:
            body.close()
        self._remember(locator, version, table.digest, size)
        return table.digest, size

    def _copy(self, body: Body, spool: _Spool, locator: str) -> None:
        buffer = memoryview(bytearray(MOST_STEP))
        intake, at = BodyReader(body, locator, self.engine.policy, self.engine.clock), body.start
        with Task(redact(locator), self.engine.emit) as task:
            task.begin(body.total)
            if at:
                task.advance(at)
            while count := intake.read(buffer):
                if self.engine.stop.is_set():
                    raise Stopped(STOPPED)
                write_all(spool.fd, buffer[:count], at)
                at += count
                task.advance(count)
        if body.total is not None and body.total != at:
            raise EndedEarly("the body ended early", locator=locator)

    def _keep_blob(self, spool: _Spool, table: PieceTable) -> None:
        digest, store = table.digest, self._store()
        with store.lock_blob(digest, doing=f"keeping {digest.short}", stop=self.engine.stop):
            if table.size and store.stat(digest, table.size).state is not BlobState.INTACT:
                store.take_in(spool.path, table)
        spool.done = True

    # ---- what was named before

    def _recall(self, source: Source, locator: str) -> tuple[Digest, int] | None:
        """Its name, where it was pulled before, is of the same version, and is in the store still."""
        try:
            row = json.loads(unseal(self._record(locator).read_bytes()))
            version, digest, size = str(row["version"]), Digest.parse(row["digest"]), int(row["size"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not size or self._store().stat(digest, size).state is not BlobState.INTACT:
            return None
        body = source.open(locator, start=0, stop=1)
        body.close()
        return (digest, size) if (body.version, body.total) == (version, size) else None

    def _remember(self, locator: str, version: str, digest: Digest, size: int) -> None:
        if version:
            row = {"version": version, "digest": str(digest), "size": size}
            with suppress(OSError):  # then it is fetched again
                write_file(self._record(locator), seal(json.dumps(row).encode()))

    def _record(self, locator: str) -> Path:
        return self._store().layout.pulled / hashlib.sha256(locator.encode("utf-8", "surrogatepass")).hexdigest()


class _Spool:
    """The file that a body is written to, locked while we live; what is gone on with has a name that can be found again."""

    def __init__(self, store: BlobStore, locator: str, version: str) -> None:
        self._folder = store.layout.partials
        key = f"{locator}\0{version}\0{locks.boot_id()}" if version and locks.boot_id() else ""
        name = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:32] if key else secrets.token_hex(16)
        self._resumes = bool(key)
        self.path = f"{self._folder}/incoming-{name}"
        self.fd, self.done = -1, False

    def __enter__(self) -> _Spool:
        self.fd = self._open()
        if not locks.try_lock(self.fd, shared=False):  # another pulls the same: it is done twice, never wrongly
            os.close(self.fd)
            self._resumes, self.path = False, f"{self._folder}/incoming-{secrets.token_hex(16)}"
            self.fd = self._open()
            locks.try_lock(self.fd, shared=False)
        return self

    def _open(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    @property
    def held(self) -> int:
        """Bytes that are there, of an earlier run too."""
        return os.fstat(self.fd).st_size

    def __exit__(self, *error: object) -> None:
        if self.done or not self._resumes or not self.held:
            with suppress(FileNotFoundError):
                # It may be a blob by now, and its name another's.
                if os.path.samestat(os.lstat(self.path), os.fstat(self.fd)):
                    os.unlink(self.path)
        os.close(self.fd)


def _cloned(body: Body, spool: _Spool) -> bool:
    """Share a local file's extents where the file system can."""
    if body.fd is not None:
        with suppress(OSError):
            syscalls.reflink(body.fd, spool.fd)
            return True
    return False


def _continued(source: Source, locator: str, version: str, spool: _Spool) -> Body:
    """The rest of what *spool* holds the beginning of; all of it where the source would give something else."""
    body = source.open(locator, start=spool.held)
    if body.version == version and body.start == spool.held and body.ranged:
        return body
    body.close()
    os.ftruncate(spool.fd, 0)
    return source.open(locator)
