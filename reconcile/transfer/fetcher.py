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
from modelstow.cas.buffers import aligned_buffer
from modelstow.cas.layout import TABLE_FROM
from modelstow.cas.partial import Partial, read_fully
from modelstow.cas.pieces import (
    PIECE,
    ForeignStamp,
    PieceTable,
    open_regular,
    piece_hash,
    piece_range,
    proven_table,
    source_key,
)
from modelstow.cas.scrub import Level

from ..desired.lockfile import absolute
from ..events.events import BlobReused, BytesArrived, FetchStarted, Waiting
from .context import STOPPED, TransferContext
from .download import THIS_STORE, Download
from .group_commit import GroupCommit, PendingCommit, scrub_target
from .state import BlobRequest
from .worker import FIRST_STEP, SOURCE_BUGS, BodyReader, WrongSize, malformed_response


@dataclass(slots=True, kw_only=True)
class Fetcher:
    """A fetcher of blobs into one store. Safe for threads. ``before_commit`` is called for each blob and may raise."""

    store: BlobStore
    engine: TransferContext
    before_commit: Callable[[], object] = lambda: None
    _batches: set[GroupCommit] = field(default_factory=set)

    def obtain_all(self, blobs: Iterable[BlobRequest]) -> dict[Digest, bool | Exception]:
        """Ensure that blobs are in the store, verified and durable, one after the other. Raises Cancelled.

        For each blob whether its inode has changed, or its error: ChecksumError, SizeMismatchError,
        SourceUnavailableError or a subclass, naming every source and its reason; LockTimeoutError, OSError.

        Small ones are committed together. While the thread holds the lock of one blob it waits for no other.
        """
        batch, busy = GroupCommit(self.store, self.engine, lambda: self.before_commit()), []
        self._batches.add(batch)
        try:
            for wanted in blobs:
                if not self._bring(wanted, batch, waits=False):
                    busy.append(wanted)
                batch.commit_due()
            batch.commit()
            for wanted in busy:
                self._bring(wanted, batch, waits=True)
                batch.commit()
        finally:
            self._batches.discard(batch)
            batch.drop()
        return batch.outcomes

    def commit_due(self) -> None:
        """Commit what has waited long enough in the groups of all threads. For the main thread to call periodically."""
        for batch in tuple(self._batches):
            batch.commit_due()

    def _bring(self, wanted: BlobRequest, batch: GroupCommit, *, waits: bool) -> bool:
        """Fetch one blob up to its commit, which is left to *batch*; False if its lock is busy and not *waits*."""
        try:
            lock = self._lock(wanted, waits=waits)
            if lock is None:
                return False
            with ExitStack() as held:
                held.enter_context(lock)
                found = self._begin(wanted, lock, batch)
                if isinstance(found, PendingCommit):
                    held.pop_all()
                    batch.add(found)
                else:
                    batch.outcomes[wanted.digest] = found
        except Cancelled:
            raise
        except Exception as error:
            batch.outcomes[wanted.digest] = error
        return True

    def _lock(self, wanted: BlobRequest, *, waits: bool) -> locks.Lock | None:
        doing = f"fetching {wanted.digest.short}"

        def tell(holder: locks.Holder | None) -> None:
            neighbour = holder is not None and holder.mine and holder.doing != doing  # another blob with the same lock
            if waits and not neighbour:
                self.engine.emit(Waiting(for_whom=str(holder or "another process")))

        try:
            return self.store.lock_blob(
                wanted.digest,
                doing=doing,
                timeout_s=None if waits else 0.0,
                token=self.engine.token,
                on_wait=tell,
            )
        except LockTimeoutError:
            if waits:
                raise
            return None

    def _begin(self, wanted: BlobRequest, lock: locks.Lock, batch: GroupCommit) -> bool | PendingCommit:
        digest = wanted.digest
        self.store.blobs.refresh()
        look = self.store.blobs.stat(digest, wanted.size)
        shared = wanted.force_refetch and self.store.commits_seen(digest) != wanted.seen_commit
        if look.state is BlobState.INTACT and (shared or not wanted.force_refetch):
            self.engine.emit(BlobReused(digest=digest, size=wanted.size))
            return False
        if not wanted.force_refetch and self._at_hand(wanted, look.state, lock):
            self.store.note_commit(lock, digest)
            self.engine.emit(BlobReused(digest=digest, size=wanted.size))
            return look.ino != 0 and look.ino != self.store.blobs.stat(digest, wanted.size).ino
        return self._fill(wanted, look, lock, batch)

    # ---- from this disk

    def _at_hand(self, wanted: BlobRequest, state: BlobState, lock: locks.Lock) -> bool:
        """Verify what is locally available, by reading it; False if none of it is intact as a whole."""
        if state is BlobState.SUSPECT and self._prove_in_place(wanted, lock):
            return True
        for spare in wanted.local_candidates:
            try:
                fd = open_regular(spare)
            except OSError:
                continue
            try:
                if os.fstat(fd).st_size == wanted.size:
                    self.store.ingest.copy(fd, wanted.digest, wanted.size)
                    return True
            except ChecksumError:
                continue
            finally:
                os.close(fd)
        return False

    def _prove_in_place(self, wanted: BlobRequest, lock: locks.Lock) -> bool:
        """Verify a blob whose stamp changed, without fetching. One that a verification found damaged is read in full."""
        found_damaged = wanted.digest.hex in self.store.blobs.suspects()
        level = Level.FULL if found_damaged else Level.FAST
        stamp = self.store.blobs.foreign_stamp(wanted.digest)  # before the first byte is read
        verdict = next(scrub.scrub([scrub_target(self.store, wanted)], level, on_bytes=lambda count: lock.progress()))
        if not verdict.intact:
            return False
        try:
            self.store.blobs.restamp(wanted.digest)
        except PermissionError:  # of another user of a shared store: it keeps its mtime, or our copy replaces it
            if self._stamp_foreign(wanted, stamp):
                return True
            fd = open_regular(self.store.layout.blob(wanted.digest))
            try:
                self.store.ingest.copy(fd, wanted.digest, wanted.size)
            finally:
                os.close(fd)
        return True

    def _stamp_foreign(self, wanted: BlobRequest, stamp: ForeignStamp | None) -> bool:
        """Record the integrity stamp of a blob that was just read and is right; False where that cannot be done."""
        if stamp is None:
            return False
        layout, digest, size = self.store.layout, wanted.digest, wanted.size
        try:
            table = proven_table(layout.table(digest), digest, size)
            if table is None and size <= TABLE_FROM:  # the pass kept none
                table = scrub.prove(layout.blob(digest), digest, size)
            return table is not None and self.store.blobs.stamp_foreign(digest, replace(table, stamp=stamp))
        except OSError:  # a folder that cannot be written to
            return False

    def _save_pieces(self, wanted: BlobRequest, partial: Partial, table: PieceTable) -> tuple[int, ...]:
        """Copy the intact pieces of a damaged blob and of copies into *partial*; those that were damaged in the blob."""
        buffer = aligned_buffer(min(PIECE, wanted.size))
        damaged = []
        for index in list(partial.table.missing()):
            slot = table.slots[index]
            for path in (self.store.layout.blob(wanted.digest), *wanted.local_candidates):
                start, stop = piece_range(index, wanted.size)
                view = buffer[: stop - start]
                if slot is not None and _read_piece(path, view, start) and piece_hash(view) == slot.hash:
                    partial.write(start, view)
                    partial.finish(index, slot.hash, source_key(THIS_STORE))
                    break
                if path == self.store.layout.blob(wanted.digest):
                    damaged.append(index)
        return tuple(damaged)

    # ---- from sources

    def _fill(self, wanted: BlobRequest, look: BlobStatus, lock: locks.Lock, batch: GroupCommit) -> PendingCommit:
        digest, size = wanted.digest, wanted.size
        if wanted.force_refetch:
            sweep.drop_partial(self.store, digest)
        partial = self.store.ingest.open(digest, size)
        mending = look.state is BlobState.SUSPECT and not wanted.force_refetch
        table = proven_table(self.store.layout.table(digest), digest, size) if mending else None
        filled = PendingCommit(wanted, lock, look, partial, resumed=partial.held_bytes)
        try:
            filled.damaged = (
                self._save_pieces(wanted, partial, table)
                if table is not None and table.chunking == partial.chunking
                else ()
            )
            self.engine.emit(FetchStarted(digest=digest, size=size, held=partial.held_bytes, name=wanted.name))
            refused = self._fetch_at_once(filled) if _is_simple(self.engine, wanted) else None
            if partial.contiguous_end() < size or partial.actual_digest() != digest:
                self._download(filled, table, refused)
        except BaseException as error:
            batch.note_failed(filled)
            told = batch.explain(error, filled) if isinstance(error, Exception) else error
            partial.close_or_discard()
            if told is not error:
                raise told from error
            raise
        return filled

    def _fetch_at_once(self, filled: PendingCommit) -> SourceError | WrongSize | None:
        try:
            filled.fetched = _fetch_simple(self.engine, filled.request, filled.partial)
        except (SourceError, WrongSize) as error:
            return error
        return None

    def _download(self, filled: PendingCommit, table: PieceTable | None, refused: SourceError | WrongSize | None) -> None:
        run = Download(self.engine, filled.request, filled.partial, table, filled.lock, refused)
        try:
            run.fill()
        finally:
            filled.fetched += run.fetched


def _read_piece(path: str, view: memoryview, start: int) -> bool:
    try:
        fd = open_regular(path)
    except OSError:
        return False
    try:
        return read_fully(fd, view, start)
    except OSError:
        return False
    finally:
        os.close(fd)


def _is_simple(engine: TransferContext, wanted: BlobRequest) -> bool:
    """Whether the blob comes within one read from its only source, and that has no record of failures."""
    few = 0 < wanted.size <= FIRST_STEP  # bytes of one read
    return few and len(wanted.urls) == 1 and not engine.failures.any and not engine.bad_sources.of(wanted.digest)


def _fetch_simple(engine: TransferContext, wanted: BlobRequest, partial: Partial) -> int:
    """Fetch a small blob with one request; the number of bytes received. If it is complete, its piece is recorded.

    Raises SourceError, WrongSize, Cancelled, OSError of this disk.
    """
    locator, size = absolute(wanted.urls[0], engine.base), wanted.size
    view, count = memoryview(bytearray(size + 1)), 0
    try:
        body = engine.registry.find(locator).open(locator, start=0, stop=size)
    except SOURCE_BUGS as error:
        raise malformed_response(error, locator) from error
    try:
        intake = BodyReader(body, locator, engine.policy, engine.clock)
        if body.total not in (None, size):
            raise WrongSize(size, body.total)
        if body.start != 0:
            return 0
        most = size if body.total is not None or body.ranged else size + 1  # one more shows that it is longer
        while count < most and (came := intake.read(view[count:most])):
            count += came
            engine.token.check(STOPPED)
    except (ConnectionFailed, TimedOut):
        if not count:
            raise
    finally:
        body.close()
    if count > size:
        raise WrongSize(size, count)
    if not count:
        raise EndedEarly("the body ended early", locator=locator)
    engine.emit(BytesArrived(digest=wanted.digest, count=count))
    if count == size:
        partial.write(0, view[:size])
        partial.finish(0, piece_hash(view[:size]), source_key(locator))
    return count  # an incomplete one is not kept; but what received bytes does not count as a failed attempt
