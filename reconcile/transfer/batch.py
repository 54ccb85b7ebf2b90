"""Batches: small blobs of one origin that are fetched over one pipelined connection and committed together.

A batch is for what is plain: absent blobs, each with one source, and no record of failures. Whatever else a response or
the store shows leaves a blob to be fetched by itself, which finds the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import islice
from threading import Lock

from modelstow.backends import PipelinedSource, SourceError
from modelstow.cas import BlobState, BlobStore, ChecksumError, Digest, LockTimeoutError, locks
from modelstow.cas.store import lock_stripe

from ..events.events import BlobFailed, BlobFetched, BlobReused, BytesArrived, FetchStarted
from .context import STOPPED, TransferContext
from .group_commit import TOGETHER_S, most_open
from .state import BlobRequest
from .worker import FIRST_STEP, SOURCE_BUGS

_FIRST, _MOST = 8, 100  # blobs of the first batch and of a full one
_IN_FLIGHT = 200  # blobs of all batches together, where descriptors allow: a blob and its lock are open


def is_simple(context: TransferContext, request: BlobRequest) -> bool:
    """Whether the blob comes within one read from its only source, and that has no record of failures."""
    fits = 0 < request.size <= FIRST_STEP  # bytes of one read
    return fits and len(request.urls) == 1 and not context.failures.any and not context.bad_sources.of(request.digest)


@dataclass(slots=True)
class Batch:
    """The blobs of one batch, and what became of them."""

    requests: dict[Digest, BlobRequest]
    received: dict[Digest, int] = field(default_factory=dict)  # bytes
    pending: dict[Digest, bytes] = field(default_factory=dict)  # received and not committed
    outcomes: dict[Digest, bool | Exception] = field(default_factory=dict)  # as of ``Fetcher.obtain_all``
    corrupt: bool = False  # a body was not the blob's

    def left(self) -> list[tuple[BlobRequest, int]]:
        """The blobs that are still to be fetched, each with the bytes that were received for it and dropped."""
        done = self.outcomes
        return [(r, self.received.get(d, 0)) for d, r in self.requests.items() if d not in done]


class BatchFetcher:
    """The batches of one fetcher. Safe for threads, whose batches share the descriptors that may be open."""

    def __init__(self, store: BlobStore, context: TransferContext) -> None:
        self._store, self._context = store, context
        self._size, self._mutex = _FIRST, Lock()
        self._available = min(_IN_FLIGHT, most_open() // 8)

    def fetch(self, first: BlobRequest, others: Iterator[BlobRequest], before_commit: Callable[[], object]) -> Batch:
        """Fetch the *first* of several blobs and, if its source can, with it as many *others* as one batch takes.

        They are durable on return, but for those that failed or are left. *before_commit* is called before each commit.
        Raises Cancelled.
        """
        batch, complete = Batch({first.digest: first}), False
        if not self._fits(first):
            return batch
        with self._mutex:
            size = min(self._size, self._available // 2)  # the other half is for other threads
            self._available -= size
        try:
            source = self._context.registry.find(first.urls[0])
            if isinstance(source, PipelinedSource) and size > 1:
                with ExitStack() as held:
                    complete = self._fetch(batch, source, self._fitting(others, size - 1), held, before_commit)
        except (SourceError, OSError, LockTimeoutError, *SOURCE_BUGS):
            pass  # the blobs that are left show it again, if it persists
        except BaseException:
            for digest in batch.received.keys() - batch.outcomes.keys():
                self._context.emit(BlobFailed(digest=digest, fetched_bytes=batch.received[digest]))
            raise
        finally:
            with self._mutex:
                self._available += size
                if complete:
                    self._size = min(2 * self._size, _MOST)
                elif batch.corrupt:  # from now on each response is judged by itself
                    self._size = 0
        return batch

    def _fitting(self, requests: Iterator[BlobRequest], most: int) -> Iterator[BlobRequest]:
        """Up to so many requests, ending behind the first that does not fit: other threads may take what follows."""
        for request in islice(requests, most):
            yield request
            if not self._fits(request):
                return

    def _fits(self, request: BlobRequest) -> bool:
        plain = is_simple(self._context, request) and not request.force_refetch and not request.local_candidates
        return plain and not self._context.mirrors  # which would have to be asked first

    def _fetch(
        self,
        batch: Batch,
        source: PipelinedSource,
        others: Iterable[BlobRequest],
        held: ExitStack,
        before_commit: Callable[[], object],
    ) -> bool:
        """Whether objects were requested, and all were committed."""
        (first,) = batch.requests.values()
        locator, commit = first.urls[0], _Commit(self._store, self._context, batch, before_commit)
        with source.pipeline(locator, commit.if_due) as fetch_objects:
            if fetch_objects is None:
                return False
            batch.requests.update((request.digest, request) for request in others)
            origin = f"{source.origin(locator)}/"
            fitting = [r for r in batch.requests.values() if self._fits(r) and r.urls[0].startswith(origin)]
            commit.locks = self._lock(fitting, held)
            absent = self._absent(batch, [request for request in fitting if lock_stripe(request.digest) in commit.locks])
            bodies = fetch_objects([(request.urls[0], request.size) for request in absent])
            for request, body in zip(absent, bodies, strict=False):
                if body is not None:
                    batch.received[request.digest] = len(body)
                    batch.pending[request.digest] = body
                    self._context.emit(FetchStarted(digest=request.digest, size=request.size, held=0, name=request.name))
                    self._context.emit(BytesArrived(digest=request.digest, count=len(body)))
                commit.if_due()
        commit.run()
        return 0 < len(absent) == sum(batch.outcomes.get(request.digest) is False for request in absent)

    def _lock(self, requests: Iterable[BlobRequest], held: ExitStack) -> dict[str, locks.Lock]:
        """The locks that are free, by stripe. With one lock held, none is waited for."""
        blob_locks: dict[str, locks.Lock] = {}
        for stripe, digest in {lock_stripe(request.digest): request.digest for request in requests}.items():
            with suppress(LockTimeoutError):
                lock = self._store.lock_blob(digest, doing=f"fetching {digest.short}", timeout_s=0.0)
                blob_locks[stripe] = held.enter_context(lock)
        return blob_locks

    def _absent(self, batch: Batch, requests: Iterable[BlobRequest]) -> list[BlobRequest]:
        """Those that are to be fetched: what another process committed meanwhile is not, what is damaged is left."""
        self._store.blobs.refresh()
        sizes = {request.digest: request.size for request in requests}
        states = {digest: status.state for digest, status in self._store.blobs.stat_all(sizes).items()}
        for digest, size in sizes.items():
            if states[digest] is BlobState.INTACT:
                batch.outcomes[digest] = False
                self._context.emit(BlobReused(digest=digest, size=size))
        return [batch.requests[digest] for digest, state in states.items() if state is BlobState.ABSENT]


class _Commit:
    """The commits of one batch: at its end, and of what waited long enough."""

    def __init__(
        self, store: BlobStore, context: TransferContext, batch: Batch, before_commit: Callable[[], object]
    ) -> None:
        self._store, self._context, self._batch, self._before_commit = store, context, batch, before_commit
        self.locks: dict[str, locks.Lock] = {}
        self._last = context.clock()

    def if_due(self) -> None:
        """Raises Cancelled."""
        self._context.token.check(STOPPED)
        if self._context.clock() - self._last >= TOGETHER_S:
            self.run()

    def run(self) -> None:
        """Commit what was received, unless a lock was removed, and record progress in the locks."""
        for lock in self.locks.values():
            lock.progress()
        if self._batch.pending and all(lock.is_current() for lock in self.locks.values()):
            self._before_commit()
            contents, self._batch.pending = self._batch.pending, {}
            failed = self._store.ingest.commit_small(contents)
            for digest, data in contents.items():
                if digest not in failed:
                    self._batch.outcomes[digest] = False
                    count = len(data)
                    self._context.emit(BlobFetched(digest=digest, size=count, fetched_bytes=count, resumed_bytes=0))
                elif isinstance(failed[digest], ChecksumError):
                    self._batch.corrupt = True
                elif isinstance(failed[digest], OSError) and os.path.lexists(self._store.layout.blob(digest)):
                    # It has its name and is not durable: found intact by a second attempt, it would be reported as such.
                    self._batch.outcomes[digest] = failed[digest]
                    self._context.emit(BlobFailed(digest=digest, fetched_bytes=len(data)))
        self._last = self._context.clock()
