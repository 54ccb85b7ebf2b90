"""The fetcher: blobs into the store, from this disk where possible, else from their sources.

Local candidates are tried first: a blob whose stamp changed is read again, a copy in a tree is copied, the intact pieces of
a damaged blob are recovered. Only the rest is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from modelstow.backends import ConnectionFailed, EndedEarly, SourceError, TimedOut
from modelstow.cas import (
    BlobState,
    BlobStatus,
    BlobStore,
    Cancelled,
    ChecksumError,
    Digest,
    LockTimeoutError,
    locks,
    scrub,
    sweep,
)
from modelstow.cas.chunking import MAX_FETCHED_PIECE_BYTES
from modelstow.cas.layout import TABLE_FROM
from modelstow.cas.partial import Partial
from modelstow.cas.pieces import (
    ForeignStamp,
    PieceTable,
    piece_hash,
    proven_table,
    source_key,
)
from modelstow.cas.scrub import Level
from modelstow.cas.untrusted import open_regular

from ..desired.lockfile import absolute
from ..events.events import BlobReused, BytesArrived, FetchStarted, Waiting
from .batch import BatchFetcher, is_simple
from .context import STOPPED, TransferContext
from .download import THIS_STORE, Download
from .group_commit import GroupCommit, PendingCommit, scrub_target
from .state import BlobRequest
from .worker import SOURCE_BUGS, BodyReader, WrongSize, malformed_response


@dataclass(slots=True, kw_only=True)
class Fetcher:
    """A fetcher of blobs into one store. Safe for threads. ``before_commit`` is called for each blob and may raise."""

    store: BlobStore
    context: TransferContext
    before_commit: Callable[[], object] = lambda: None
    _groups: set[GroupCommit] = field(default_factory=set)
    _batches: BatchFetcher = field(init=False)

    def __post_init__(self) -> None:
        self._batches = BatchFetcher(self.store, self.context)

    def obtain_all(self, blobs: Iterable[BlobRequest]) -> dict[Digest, bool | Exception]:
        """Ensure that blobs are in the store, verified and durable, one after the other. Raises Cancelled.

        For each blob whether its inode has changed, or its error: ChecksumError, SizeMismatchError,
        SourceUnavailableError or a subclass, naming every source and its reason; LockTimeoutError, OSError.

        Small ones are committed together. While the thread holds the lock of one blob it waits for no other.
        """
        group, busy = GroupCommit(self.store, self.context, lambda: self.before_commit()), []
        self._groups.add(group)
        blobs = iter(blobs)
        try:
            for first in blobs:
                batch = self._batches.fetch(first, blobs, lambda: self.before_commit())
                group.outcomes |= batch.outcomes
                for request, received in batch.left():
                    if not self._obtain(request, group, waits=False, received=received):
                        busy.append((request, received))
                    group.commit_due()
            group.commit()
            for request, received in busy:
                self._obtain(request, group, waits=True, received=received)
                group.commit()
        finally:
            self._groups.discard(group)
            group.drop()
        return group.outcomes

    def commit_due(self) -> None:
        """Commit what has waited long enough in the groups of all threads. For the main thread to call periodically."""
        for group in tuple(self._groups):
            group.commit_due()

    def _obtain(self, request: BlobRequest, group: GroupCommit, *, waits: bool, received: int = 0) -> bool:
        """Fetch one blob up to its commit, which is left to *group*; False if its lock is busy and not *waits*.

        *received*: bytes that were received for it before and dropped.
        """
        try:
            lock = self._lock(request, waits=waits)
            if lock is None:
                return False
            with ExitStack() as held:
                held.enter_context(lock)
                found = self._begin(request, lock, group, received)
                if isinstance(found, PendingCommit):
                    held.pop_all()
                    group.add(found)
                else:
                    group.outcomes[request.digest] = found
        except Cancelled:
            raise
        except Exception as error:
            group.outcomes[request.digest] = error
        return True

    def _lock(self, request: BlobRequest, *, waits: bool) -> locks.Lock | None:
        doing = f"fetching {request.digest.short}"

        def report_wait(holder: locks.Holder | None) -> None:
            neighbour = holder is not None and holder.mine and holder.doing != doing  # another blob with the same lock
            if waits and not neighbour:
                self.context.emit(Waiting(for_whom=str(holder or "another process")))

        try:
            return self.store.lock_blob(
                request.digest,
                doing=doing,
                timeout_s=None if waits else 0.0,
                token=self.context.token,
                on_wait=report_wait,
            )
        except LockTimeoutError:
            if waits:
                raise
            return None

    def _begin(self, request: BlobRequest, lock: locks.Lock, group: GroupCommit, received: int) -> bool | PendingCommit:
        digest = request.digest
        self.store.blobs.refresh()
        status = self.store.blobs.stat(digest, request.size)
        shared = request.force_refetch and self.store.commits_seen(digest) != request.seen_commit
        if status.state is BlobState.INTACT and (shared or not request.force_refetch):
            self.context.emit(BlobReused(digest=digest, size=request.size))
            return False
        if not request.force_refetch and self._take_local(request, status.state, lock):
            self.store.note_commit(lock, digest)
            self.context.emit(BlobReused(digest=digest, size=request.size))
            return status.ino != 0 and status.ino != self.store.blobs.stat(digest, request.size).ino
        return self._fetch(request, status, lock, group, received)

    # ---- from this disk

    def _take_local(self, request: BlobRequest, state: BlobState, lock: locks.Lock) -> bool:
        """Verify what is locally available, by reading it; False if none of it is intact as a whole."""
        if state is BlobState.SUSPECT and self._prove_in_place(request, lock):
            return True
        for candidate in request.local_candidates:
            try:
                fd = open_regular(candidate)
            except OSError:
                continue
            try:
                if os.fstat(fd).st_size == request.size:
                    self.store.ingest.copy(fd, request.digest, request.size)
                    return True
            except ChecksumError:
                continue
            finally:
                os.close(fd)
        return False

    def _prove_in_place(self, request: BlobRequest, lock: locks.Lock) -> bool:
        """Verify a blob whose stamp changed, without fetching. One that a verification found damaged is read in full."""
        found_damaged = request.digest.hex in self.store.blobs.suspects()
        level = Level.FULL if found_damaged else Level.FAST
        before = os.lstat(self.store.layout.blob(request.digest))  # before the first byte is read
        stamp = ForeignStamp.take(before)
        known = proven_table(self.store.layout.table(request.digest), request.digest, request.size)
        verdict = next(scrub.scrub([scrub_target(self.store, request)], level, on_bytes=lambda count: lock.progress()))
        if not verdict.intact:
            return False
        if known is not None and known.stamp is not None and self._stamp_foreign(request, stamp):
            return True  # another tool's file too: its mode and mtime are not ours to set
        try:
            if not self.store.blobs.restamp(request.digest, before):
                return False  # written to while it was read
        except PermissionError:  # of another user of a shared store: it keeps its mtime, or our copy replaces it
            if self._stamp_foreign(request, stamp):
                return True
            fd = open_regular(self.store.layout.blob(request.digest))
            try:
                self.store.ingest.copy(fd, request.digest, request.size)
            finally:
                os.close(fd)
        return True

    def _stamp_foreign(self, request: BlobRequest, stamp: ForeignStamp | None) -> bool:
        """Record the integrity stamp of a blob that was just read and is right; False where that cannot be done."""
        if stamp is None:
            return False
        layout, digest, size = self.store.layout, request.digest, request.size
        try:
            table = proven_table(layout.table(digest), digest, size)
            if table is None and size <= TABLE_FROM:  # the pass kept none
                table = scrub.prove(layout.blob(digest), digest, size)
            return table is not None and self.store.blobs.stamp_foreign(digest, replace(table, stamp=stamp))
        except OSError:  # a folder that cannot be written to
            return False

    def _save_pieces(self, request: BlobRequest, partial: Partial, table: PieceTable) -> tuple[int, ...]:
        """Copy the intact pieces of a damaged blob and of copies into *partial*; those that were damaged in the blob."""
        damaged = []
        for index in list(partial.table.missing()):
            slot = table.slots[index]
            for path in (self.store.layout.blob(request.digest), *request.local_candidates):
                if slot is not None and partial.salvage(path, index, slot.hash, source_key(THIS_STORE)):
                    break
                if path == self.store.layout.blob(request.digest):
                    damaged.append(index)
        return tuple(damaged)

    # ---- from sources

    def _fetch(
        self, request: BlobRequest, status: BlobStatus, lock: locks.Lock, group: GroupCommit, received: int
    ) -> PendingCommit:
        request = self.context.with_mirrors(request)
        digest, size = request.digest, request.size
        if request.force_refetch:
            sweep.drop_partial(self.store, digest)
        repairing = status.state is BlobState.SUSPECT and not request.force_refetch
        table = proven_table(self.store.layout.table(digest), digest, size) if repairing else None
        if table is not None and table.chunking.piece_bytes > MAX_FETCHED_PIECE_BYTES:
            table = None
        partial = self.store.ingest.open(digest, size, chunking=table.chunking if table is not None else None)
        pending = PendingCommit(request, lock, status, partial, resumed=partial.held_bytes, fetched=received)
        try:
            pending.damaged = self._save_pieces(request, partial, table) if table is not None else ()
            self.context.emit(FetchStarted(digest=digest, size=size, held=partial.held_bytes, name=request.name))
            refused = self._fetch_at_once(pending) if is_simple(self.context, request) else None
            if partial.contiguous_end() < size or partial.actual_digest() != digest:
                self._download(pending, table, refused)
        except BaseException as error:
            group.note_failed(pending)
            explained = group.explain(error, pending) if isinstance(error, Exception) else error
            partial.close_or_discard()
            if explained is not error:
                raise explained from error
            raise
        return pending

    def _fetch_at_once(self, pending: PendingCommit) -> SourceError | WrongSize | None:
        try:
            pending.fetched += _fetch_simple(self.context, pending.request, pending.partial)
        except (SourceError, WrongSize) as error:
            return error
        return None

    def _download(self, pending: PendingCommit, table: PieceTable | None, refused: SourceError | WrongSize | None) -> None:
        run = Download(self.context, pending.request, pending.partial, table, pending.lock, refused)
        try:
            run.fill()
        finally:
            pending.fetched += run.fetched


def _fetch_simple(context: TransferContext, request: BlobRequest, partial: Partial) -> int:
    """Fetch a small blob with one request; the number of bytes received. If it is complete, its piece is recorded.

    Raises SourceError, WrongSize, Cancelled, OSError of this disk.
    """
    locator, size = absolute(request.urls[0], context.base), request.size
    view, count = memoryview(bytearray(size + 1)), 0
    try:
        body = context.registry.find(locator).open(locator, start=0, stop=size)
    except SOURCE_BUGS as error:
        raise malformed_response(error, locator) from error
    try:
        reader = BodyReader(body, locator, context.policy, context.clock)
        if body.total not in (None, size):
            raise WrongSize(size, body.total)
        if body.start != 0:
            return 0
        limit = size if body.total is not None or body.ranged else size + 1  # one more shows that it is longer
        while count < limit and (received := reader.read(view[count:limit])):
            count += received
            context.token.check(STOPPED)
    except (ConnectionFailed, TimedOut):
        if not count:
            raise
    finally:
        body.close()
    if count > size:
        raise WrongSize(size, count)
    if not count:
        raise EndedEarly("the body ended early", locator=locator)
    context.emit(BytesArrived(digest=request.digest, count=count))
    if count == size:
        partial.write(0, view[:size])
        partial.finish(0, piece_hash(view[:size]), source_key(locator))
    return count  # an incomplete one is not kept; but what received bytes does not count as a failed attempt
