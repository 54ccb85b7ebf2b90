"""One blob's download: the threads, connections and files around its ``Scheduler``."""

from __future__ import annotations

import os
from contextlib import ExitStack
from threading import Condition, Thread

from modelstow.backends import Body, SourceError
from modelstow.cas import locks, syscalls
from modelstow.cas.buffers import STEP, aligned_buffer
from modelstow.cas.hasher import BackgroundHasher
from modelstow.cas.layout import TABLE_FROM
from modelstow.cas.partial import Partial
from modelstow.cas.pieces import PieceTable, hash_piece_of, source_key

from ..desired.lockfile import absolute
from ..events.events import BytesArrived, Info
from .compressed import CompressedBlob, CompressedForms
from .concurrency import ConcurrencyController
from .context import STOPPED, TransferContext
from .retry import Failure, Reason
from .scheduler import EARLIER, Scheduler
from .source_health import FailureAttribution, all_sources_failed
from .state import Action, Backoff, BlobRequest, Fail, Idle, Request, Verify
from .worker import PiecePrefix, TransferSink, Worker, WrongSize

THIS_STORE = "this store"
"""The sender of pieces that were recovered from a damaged blob or a copy."""
_OF_ONE_OBJECT = frozenset({Reason.NOT_FOUND, Reason.TRUNCATED, Reason.WRONG_SIZE})
"""Reasons that say nothing about other objects of the same host."""
_REPORTED_S = 0.5  # the shortest wait that is reported
_TICK_S = 0.02  # between checks of concurrency, stalls and cancellation


class Download(TransferSink):
    """One blob's download while it lasts.

    ``fill`` runs in one thread and starts workers, which end before it returns. A worker that waits for a response when its
    range was taken over is abandoned: it holds no claim, writes nothing, and ends with the response or its timeout.
    The caller holds the blob's lock, and closes *partial*. Threads and locks: see the package docstring.
    """

    def __init__(
        self,
        context: TransferContext,
        request: BlobRequest,
        partial: Partial,
        table: PieceTable | None,
        lock: locks.Lock,
        refused: SourceError | WrongSize | None = None,
    ) -> None:
        """*table*: the verified hash of each piece of *partial*, where it is known. *refused*: how the first request, which
        the caller made already, failed."""
        self._refused = refused
        self._context, self._request, self._partial, self._table, self._lock = context, request, partial, table, lock
        self.size, self.chunking, self._pieces = request.size, partial.chunking, len(partial.table.slots)
        self.fetched = 0  # bytes received, corrupt ones too
        self._locators = {absolute(url, context.base): url for url in request.urls}
        compressed = {absolute(p, context.base): absolute(c, context.base) for p, c in request.compressed.items()}
        self._forms = CompressedForms(
            compressed, lambda locator: CompressedBlob(locator, request.digest, request.size, context.policy, context.clock)
        )
        self._attribution = FailureAttribution(
            request,
            self._locators,
            self._forms,
            registry=context.registry,
            failures=context.failures,
            bad_sources=context.bad_sources,
            emit=context.emit,
        )
        recent = self._attribution.recently_failed()
        exhausted = self._attribution.exhausted(recent)
        self._scheduler = Scheduler(
            request.size, tuple(self._locators), context.policy, recent, exhausted, chunking=self.chunking
        )
        # Each connection has a piece in flight, which a kill loses: that should not be the whole blob.
        self._concurrency = ConcurrencyController(min(context.connections.most, max(1, self._pieces // 2)))
        self._hasher: BackgroundHasher | None = None
        self._mutex = Condition()  # guards everything below, the scheduler and the attribution
        self._bodies: dict[int, Body] = {}  # by claim, while they are read
        self._workers: dict[int, Thread] = {}  # by claim, while it is active
        self._prefixes: dict[int, PiecePrefix] = {}  # by piece: what a failed connection left of it
        self._writers: set[Thread] = set()  # workers that may access the partial
        self._first_worker: Thread | None = None  # on the blob's own connection; the others are borrowed
        self._error: BaseException | None = None  # of a worker
        self._ended = False

    def fill(self) -> None:
        """Fetch until every piece is held and the digest matches.

        Raises ChecksumError, SizeMismatchError, SourceUnavailableError or a subclass, naming every source; Cancelled,
        OSError.
        """
        by_key = {source_key(locator): locator for locator in self._locators}
        by_key[source_key(THIS_STORE)] = THIS_STORE
        for index, slot in enumerate(self._partial.table.slots):
            if slot is not None:
                self._scheduler.hold(index, by_key.get(slot.source, EARLIER), slot.hash)
        try:
            while not self._advance():
                pass
        finally:
            self._end()

    # ---- the coordinating thread

    def _advance(self) -> bool:
        """Carry out one action that needs no worker; whether the download is complete."""
        with self._mutex:
            action = self._dispatch()
            while self._workers and not isinstance(action, Verify | Fail | Backoff):
                self._mutex.wait(_TICK_S)
                action = self._dispatch()
        self._attribution.flush()
        match action:
            case Request():  # one piece from one source: no other connection could help, and a thread costs more than it
                self._serve(action, alone=True)
            case Backoff(seconds=seconds):
                self._back_off(seconds)
            case Verify():
                return self._verify()
            case Fail(failures=failures):
                raise all_sources_failed(self._request, self._forms.without_absent(failures))
        return False

    def _back_off(self, seconds: float) -> None:
        if seconds >= _REPORTED_S:
            name = next(iter(self._request.paths), self._request.digest.short)
            why = ", ".join(dict.fromkeys(failure.what for failure in self._scheduler.failures().values()))
            self._context.emit(Info(text=f"{name}: every source failed ({why}); retrying in {seconds:.0f} s"))
        self._context.token.wait(seconds)

    def _dispatch(self) -> Action:
        """End ranges that stalled or were taken over, and start workers; the last action that was not carried out."""
        self._context.token.check(STOPPED)
        if self._error is not None:
            raise self._error
        now, connections = self._context.clock(), self._context.connections
        for claim in self._scheduler.stalled(now):
            self._fail(claim, Failure(code="NETWORK_TIMEOUT", what="stalled", reason=Reason.STALLED))
        for claim in [claim for claim in self._workers if not self._scheduler.active(claim)]:
            del self._workers[claim]
            if claim in self._bodies:
                self._bodies[claim].close()
        allowed = self._allowed(now)
        while len(self._workers) < allowed:
            with ExitStack() as permit:
                if self._first_worker in self._workers.values():
                    if not connections.take():
                        return Idle()
                    permit.callback(connections.give)
                action = self._scheduler.next(now, allowed)
                if not isinstance(action, Request) or (self._pieces <= 1 and len(self._locators) == 1):
                    return action
                self._start(action, permit.pop_all())
        return Idle()

    def _allowed(self, now: float) -> int:
        """The connections allowed at this time; ranges beyond them are ended."""
        rate, limit = self._hasher.rate if self._hasher else None, self._context.limit_rate
        running, before = len(self._workers), self._concurrency.allowed
        share = None if limit is None else limit * running / max(1, self._context.connections.used)
        allowed = self._concurrency.update(now, self.fetched, running, rate, share)
        if allowed < before:  # more connections would only lengthen the time in which a kill loses their unfinished pieces
            for claim in self._scheduler.least_advanced(running - allowed):
                self._scheduler.ended(claim)
        return allowed

    def _start(self, request: Request, permit: ExitStack) -> None:
        """Start a worker; it holds *permit*, which is empty for the blob's own connection, until it ends."""
        if self._hasher is None and self._pieces > 1:
            self._hasher = BackgroundHasher(self._partial)

        def work() -> None:
            try:
                with permit:
                    self._serve(request, alone=False)
            except BaseException as error:
                with self._mutex:
                    self._error = self._error or error
            finally:
                with self._mutex:
                    self._writers.discard(thread)
                    self._mutex.notify_all()

        thread = Thread(target=work, name="transfer", daemon=True)
        if self._first_worker not in self._workers.values():
            self._first_worker = thread
        self._workers[request.claim] = thread
        thread.start()

    def _verify(self) -> bool:
        """Whether the digest matches; if not, pieces are invalidated. Corrupt senders are recorded either way."""
        self._join()
        self._end_hasher()
        actual = self._partial.actual_digest()
        if actual == self._request.digest:
            self._attribution.clear(self._scheduler.senders())
            for sender in self._scheduler.verified():
                failure = Failure(code="CHECKSUM_FAIL", what="sent corrupt data", reason=Reason.CORRUPT_DATA)
                self._attribution.note(sender, failure)
            return True
        what = f"sent corrupt data (sha256:{actual.hex[:12]}…)"
        failure = Failure(code="CHECKSUM_FAIL", what=what, reason=Reason.CORRUPT_DATA, actual=str(actual))
        invalidate, corrupt = self._scheduler.digest_mismatch(failure)
        self._partial.invalidate(list(invalidate))
        for sender in corrupt:
            self._attribution.note(sender, failure, pieces=invalidate)
        return False

    def _end(self) -> None:
        """End and join every thread that may access the partial."""
        with self._mutex:
            self._ended = True
            for body in list(self._bodies.values()):
                body.close()
        self._join()
        self._end_hasher()
        self._attribution.flush()

    def _join(self) -> None:
        with self._mutex:
            writers = list(self._writers)
        for thread in writers:
            thread.join()

    def _end_hasher(self) -> None:
        if self._hasher is not None:
            hasher, self._hasher = self._hasher, None
            hasher.finish()

    # ---- workers

    def _serve(self, request: Request | None, *, alone: bool) -> None:
        """Fetch one range after the other, as long as the scheduler has one for this connection."""
        worker = Worker(self, self._context.policy, self._context.clock)
        while request is not None:
            with self._mutex:  # a range starts inside a piece only where its prefix is the last that was left of it
                piece = self.chunking.index_at(request.start)
                inside = request.start > self.chunking.range(piece, self.size)[0]
                prefix = self._prefixes.pop(piece, None) if inside else None
            failure = worker.run(request, prefix)
            request = self._next(request, failure, worker.prefix, alone=alone)
            self._attribution.flush()

    def _next(
        self, request: Request, failure: Failure | None, prefix: PiecePrefix | None, *, alone: bool
    ) -> Request | None:
        """Report how a range ended; the next one for the same thread and connection."""
        with self._mutex:
            self._bodies.pop(request.claim, None)
            thread = self._workers.pop(request.claim, None)
            if failure is not None:
                self._fail(request.claim, failure, prefix)
            self._scheduler.ended(request.claim)
            if alone or thread is None or self._ended or self._context.token.cancelled:
                return None
            allowed = self._concurrency.allowed
            if len(self._workers) >= allowed:
                return None
            action = self._scheduler.next(self._context.clock(), allowed)
            if not isinstance(action, Request):
                return None
            self._workers[action.claim] = thread
            self._writers.discard(thread)  # until the next response
            return action

    def _fail(self, claim: int, failure: Failure, prefix: PiecePrefix | None = None) -> None:
        """Count and record a failure of a range that is still active. Called with the mutex held."""
        locator, piece = self._scheduler.locator(claim), self._scheduler.current_piece(claim)
        compressed = self._forms.compressed(locator) is not None
        if compressed or not (failure.reason.transient or failure.reason is Reason.RATE_LIMIT):
            prefix = None  # a frame is decompressed whole; and if the object is wrong, so is its prefix
        if self._scheduler.failed(claim, failure, self._context.clock(), prefix.reached if prefix else 0):
            if prefix is not None:
                self._prefixes[piece] = prefix
            exactly = failure.reason in _OF_ONE_OBJECT or (compressed and failure.reason.permanent)
            exhausted = self._scheduler.is_exhausted(locator)
            self._attribution.note(locator, failure, exactly=exactly, exhausted=exhausted, pieces=[piece])

    def open(self, request: Request) -> Body:
        refused, self._refused = self._refused, None
        if refused is not None:
            raise refused
        source = self._context.registry.find(request.locator)
        if compressed := self._forms.compressed(request.locator):
            return compressed.open(source, request.start, request.stop, lambda count: self._received(request.claim, count))
        return source.open(request.locator, start=request.start, stop=request.stop)

    def opened(self, claim: int, body: Body) -> bool:
        with self._mutex:
            if self._ended or not self._scheduler.active(claim):
                return False
            self._bodies[claim] = body
            if thread := self._workers.get(claim):
                self._writers.add(thread)
            return True

    def owns(self, claim: int, piece: int) -> bool:
        with self._mutex:
            return not self._ended and self._scheduler.owns(claim, piece)

    def has_later(self, claim: int, piece: int) -> bool:
        with self._mutex:
            return not self._ended and self._scheduler.has_later(claim, piece)

    def ignores_ranges(self, claim: int) -> None:
        with self._mutex:
            self._scheduler.ignores_ranges(claim)

    def received(self, request: Request, count: int) -> bool:
        # What a frame stands for was counted while it arrived.
        return self._received(request.claim, 0 if self._forms.compressed(request.locator) else count)

    def _received(self, claim: int, count: int) -> bool:
        self._context.token.check(STOPPED)
        with self._mutex:
            self.fetched += count
            active = not self._ended and self._scheduler.received(claim, count, self._context.clock())
        if count:
            self._lock.progress()  # at a low rate a whole piece takes long
            self._context.emit(BytesArrived(digest=self._request.digest, count=count))
        return active

    def write(self, claim: int, piece: int, offset: int, data: memoryview) -> bool:
        with self._mutex:
            if self._ended or not self._scheduler.may_write(claim, piece):
                return False
        self._partial.write(offset, data)
        with self._mutex:
            self._scheduler.written(claim)
        return True

    def complete(self, claim: int, piece: int, hash_: bytes) -> bool:
        verified = self._table.slots[piece] if self._table is not None else None
        with self._mutex:
            if self._ended:
                return False
            locator = self._scheduler.locator(claim)
            if verified is not None and verified.hash != hash_:
                what = f"sent corrupt data in piece {piece}"
                failure = Failure(code="CHECKSUM_FAIL", what=what, reason=Reason.CORRUPT_DATA)
                self._scheduler.piece_mismatch(claim, failure)
                self._attribution.note(locator, failure, pieces=[piece])
                return False
            if not self._scheduler.may_write(claim, piece):
                return False
        self._record(claim, piece, hash_, locator)
        return True

    def _record(self, claim: int, piece: int, hash_: bytes, locator: str) -> None:
        """Record a piece. ``may_write`` has allowed it, so that no other range can take it over meanwhile."""
        self._partial.finish(piece, hash_, source_key(locator))
        with self._mutex:
            self._scheduler.completed(claim, piece, hash_, self._context.clock())
            self._attribution.sent_again(locator, piece)
        if self._hasher is not None:
            self._hasher.advance()

    def whole_file(self, claim: int, body: Body) -> bool:
        """Reflink a local file where the file system can; its pieces are then read from the partial."""
        if body.fd is None or self.size <= TABLE_FROM:
            return False
        with self._mutex:
            locator = self._scheduler.locator(claim)
            if self._ended or not self._scheduler.claim_all(claim):
                return False
        try:
            syscalls.reflink(body.fd, self._partial.fd)
        except OSError:
            return False
        os.ftruncate(self._partial.fd, self.size)
        buffer = aligned_buffer(STEP)
        for index in range(self._pieces):
            hash_ = hash_piece_of(self._partial.fd, *self.chunking.range(index, self.size), buffer)
            if hash_ is None:
                return False
            with self._mutex:
                if self._ended or not self._scheduler.may_write(claim, index):
                    return False
            self._record(claim, index, hash_, locator)
        self._received(claim, self.size)
        return True
