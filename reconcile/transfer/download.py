"""One blob's download: the threads, connections and files around its ``Scheduler``."""

from __future__ import annotations

import os
from threading import Condition, Thread

from modelstow.backends import Body, SourceError
from modelstow.cas import locks, syscalls
from modelstow.cas.buffers import aligned_buffer
from modelstow.cas.hasher import BackgroundHasher
from modelstow.cas.layout import TABLE_FROM
from modelstow.cas.partial import Partial, read_fully
from modelstow.cas.pieces import PIECE, PieceTable, piece_count, piece_hash, piece_range, source_key

from ..desired.lockfile import absolute
from ..events.events import BytesArrived, Info
from .compressed import CompressedBlob, CompressedForms
from .concurrency import ConcurrencyController
from .context import STOPPED, TransferContext
from .retry import Failure, Reason
from .scheduler import EARLIER, Scheduler
from .source_health import FailureAttribution, all_sources_failed
from .state import Action, Backoff, BlobRequest, Fail, Idle, Request, Verify
from .worker import Beginning, TransferSink, Worker, WrongSize

THIS_STORE = "this store"
"""The sender of pieces that were saved from a damaged blob or a copy."""
_OF_ONE_OBJECT = frozenset({Reason.NOT_FOUND, Reason.TRUNCATED, Reason.WRONG_SIZE})
"""Reasons that say nothing of other objects of the same host."""
_SAY_S = 0.5  # a wait from so long on is told
_TICK_S = 0.02  # how often growing, silence and a stop are looked at


class Download(TransferSink):
    """One blob's transfer while it lasts. ``fill`` runs in one thread and starts others, which end before it does.

    A lane that waits for an answer when its range was given to another is left behind: it holds no claim, writes
    nothing, and ends when the answer or its time-out comes.
    """

    def __init__(
        self,
        engine: TransferContext,
        wanted: BlobRequest,
        partial: Partial,
        table: PieceTable | None,
        lock: locks.Lock,
        refused: SourceError | WrongSize | None = None,
    ) -> None:
        """*refused*: how the first question was answered, where it was asked already."""
        self._refused = refused
        self.engine, self.wanted, self.partial, self.table, self._lock = engine, wanted, partial, table, lock
        self.size, self.fetched = wanted.size, 0
        self._locators = {absolute(url, engine.base): url for url in wanted.urls}
        packs = {absolute(plain, engine.base): absolute(pack, engine.base) for plain, pack in wanted.compressed.items()}
        self._pairs = CompressedForms(
            packs, lambda pack: CompressedBlob(pack, wanted.digest, wanted.size, engine.policy, engine.clock)
        )
        self._blame = FailureAttribution(
            wanted,
            self._locators,
            self._pairs,
            registry=engine.registry,
            failures=engine.failures,
            bad_sources=engine.bad_sources,
            emit=engine.emit,
        )
        late = self._blame.late()
        self._scheduler = Scheduler(wanted.size, tuple(self._locators), engine.policy, late, self._blame.spent(late))
        # Each connection has a piece in flight, which a kill costs: it should not be all there is.
        self._pace = ConcurrencyController(min(engine.connections.most, max(1, piece_count(wanted.size) // 2)))
        self._hasher_thread: BackgroundHasher | None = None
        self._state = Condition()  # guards everything below and the transfer
        self._bodies: dict[int, Body] = {}  # by claim, while they are read
        self._working: dict[int, Thread] = {}  # by claim: lanes whose range still counts
        self._begun: dict[int, Beginning] = {}  # by piece: what a connection that broke left of it
        self._reading: set[Thread] = set()  # lanes that may touch the partial
        self._own: Thread | None = None  # the lane on the connection that this blob has; others are borrowed
        self._broken: BaseException | None = None
        self._over = False

    def fill(self) -> None:
        """Until every piece is there and the whole is its name.

        Raises ChecksumError, SizeMismatchError, SourceUnavailableError or a subclass, naming every source; Cancelled,
        OSError.
        """
        by_key = {source_key(locator): locator for locator in self._locators}
        by_key[source_key(THIS_STORE)] = THIS_STORE
        for index, slot in enumerate(self.partial.table.slots):
            if slot is not None:
                self._scheduler.hold(index, by_key.get(slot.source, EARLIER), slot.hash)
        try:
            while not self._advance():
                pass
        finally:
            self._end()

    # ---- the thread that decides

    def _advance(self) -> bool:
        with self._state:
            step = self._look()
            while self._working and not isinstance(step, Verify | Fail | Backoff):
                self._state.wait(_TICK_S)
                step = self._look()
        self._blame.tell()
        match step:
            case Request():  # one piece from one source: no other connection could help, and a thread costs more than it
                self._serve(step, alone=True)
            case Backoff(seconds=seconds):
                name = next(iter(self.wanted.paths), self.wanted.digest.short)
                if seconds >= _SAY_S:
                    why = ", ".join(dict.fromkeys(failure.what for failure in self._scheduler.failures().values()))
                    self.engine.emit(Info(text=f"{name}: every source failed ({why}); asking again in {seconds:.0f} s"))
                self.engine.token.wait(seconds)
            case Verify():
                return self._prove()
            case Fail(failures=failures):
                told = {
                    name: failure
                    for name, failure in failures.items()
                    if not (self._pairs.pack(name) and self._pairs.shows_absence(name, failure))
                }
                raise all_sources_failed(self.wanted, told)
        return False

    def _look(self) -> Action:
        """End what is silent or lost, and start what may run; the last step that was not taken."""
        self.engine.token.check(STOPPED)
        if self._broken is not None:
            raise self._broken
        now = self.engine.clock()
        for claim in self._scheduler.stalled(now):
            self._fail(claim, Failure(code="NETWORK_TIMEOUT", what="it fell silent", reason=Reason.STALLED))
        for claim in [claim for claim in self._working if not self._scheduler.active(claim)]:
            del self._working[claim]
            if claim in self._bodies:
                self._bodies[claim].close()
        rate, limit = self._hasher_thread.rate if self._hasher_thread else None, self.engine.limit_rate
        share = None if limit is None else limit * len(self._working) / max(1, self.engine.connections.used)
        before, allowed = self._pace.allowed, self._pace.look(now, self.fetched, len(self._working), rate, share)
        if allowed < before:  # their unfinished pieces would be lost to a kill the longer, and nothing is gained
            for claim in self._scheduler.least_advanced(len(self._working) - allowed):
                self._scheduler.ended(claim)
        while len(self._working) < allowed:
            borrowed = self._own in self._working.values()
            if borrowed and not self.engine.connections.take():
                return Idle()
            step = self._scheduler.next(now, allowed)
            if not isinstance(step, Request):
                if borrowed:
                    self.engine.connections.give()
                return step
            if self.size <= PIECE and len(self._locators) == 1:
                return step
            self._start(step, borrowed=borrowed)
        return Idle()

    def _start(self, ask: Request, *, borrowed: bool) -> None:
        if self._hasher_thread is None and self.size > PIECE:
            self._hasher_thread = BackgroundHasher(self.partial)

        def work() -> None:
            try:
                self._serve(ask, alone=False)
            except BaseException as error:
                with self._state:
                    self._broken = self._broken or error
            finally:
                if borrowed:
                    self.engine.connections.give()
                with self._state:
                    self._reading.discard(thread)
                    self._state.notify_all()

        thread = Thread(target=work, name="lane", daemon=True)
        self._own = self._own if borrowed else thread
        self._working[ask.claim] = thread
        thread.start()

    def _prove(self) -> bool:
        self._join()
        self._end_chase()
        actual = self.partial.actual_digest()
        if actual == self.wanted.digest:
            self._blame.clear(self._scheduler.senders())
            for liar in self._scheduler.verified():
                self._blame.note(liar, Failure(code="CHECKSUM_FAIL", what="sent wrong bytes", reason=Reason.CORRUPT_DATA))
            return True
        what = f"sent wrong bytes (sha256:{actual.hex[:12]}…)"
        failure = Failure(code="CHECKSUM_FAIL", what=what, reason=Reason.CORRUPT_DATA, actual=str(actual))
        struck, liars = self._scheduler.digest_mismatch(failure)
        self.partial.invalidate(list(struck))
        for liar in liars:
            self._blame.note(liar, failure, wrong=struck)
        return False

    def _end(self) -> None:
        """No writer and no reader of the partial is left when this returns."""
        with self._state:
            self._over = True
            for body in list(self._bodies.values()):
                body.close()
        self._join()
        self._end_chase()
        self._blame.tell()

    def _join(self) -> None:
        with self._state:
            reading = list(self._reading)
        for thread in reading:
            thread.join()

    def _end_chase(self) -> None:
        if self._hasher_thread is not None:
            chaser, self._hasher_thread = self._hasher_thread, None
            chaser.finish()

    # ---- the threads that bring it

    def _serve(self, ask: Request | None, *, alone: bool) -> None:
        """Bring one range after the other, as long as there is one for this connection."""
        lane = Worker(self, self.engine.policy, self.engine.clock)
        while ask is not None:
            with self._state:  # a range begins inside a piece only where its beginning is the last that was left of it
                begun = self._begun.pop(ask.start // PIECE, None) if ask.start % PIECE else None
            failure = lane.run(ask, begun)
            ask = self._next(ask, failure, lane.beginning, alone=alone)
            self._blame.tell()

    def _next(self, ask: Request, failure: Failure | None, beginning: Beginning | None, *, alone: bool) -> Request | None:
        with self._state:
            self._bodies.pop(ask.claim, None)
            mine = self._working.pop(ask.claim, None)
            if failure is not None:
                self._fail(ask.claim, failure, beginning)
            self._scheduler.ended(ask.claim)
            if alone or mine is None or self._over or self.engine.token.cancelled:
                return None
            allowed = self._pace.allowed
            if len(self._working) >= allowed:
                return None
            step = self._scheduler.next(self.engine.clock(), allowed)
            if not isinstance(step, Request):
                return None
            self._working[step.claim] = mine
            self._reading.discard(mine)  # until it is answered again
            return step

    def _fail(self, claim: int, failure: Failure, beginning: Beginning | None = None) -> None:
        locator, piece = self._scheduler.locator(claim), self._scheduler.current_piece(claim)
        packed = self._pairs.pack(locator) is not None
        if packed or not (failure.reason.transient or failure.reason is Reason.RATE_LIMIT):
            beginning = None  # a frame is unpacked whole; and what is wrong with the object is wrong with its beginning
        if self._scheduler.failed(claim, failure, self.engine.clock(), beginning.reached if beginning else 0):
            if beginning is not None:
                self._begun[piece] = beginning
            exactly = failure.reason in _OF_ONE_OBJECT or (packed and failure.reason.permanent)
            self._blame.note(
                locator, failure, exactly=exactly, given_up=self._scheduler.is_exhausted(locator), wrong=[piece]
            )

    def open(self, ask: Request) -> Body:
        refused, self._refused = self._refused, None
        if refused is not None:
            raise refused
        source = self.engine.registry.find(ask.locator)
        if packed := self._pairs.pack(ask.locator):
            return packed.open(source, ask.start, ask.stop, lambda count: self._got(ask.claim, count))
        return source.open(ask.locator, start=ask.start, stop=ask.stop)

    def opened(self, claim: int, body: Body) -> bool:
        with self._state:
            if self._over or not self._scheduler.active(claim):
                return False
            self._bodies[claim] = body
            if thread := self._working.get(claim):
                self._reading.add(thread)
            return True

    def takes(self, claim: int, piece: int) -> bool:
        with self._state:
            return not self._over and self._scheduler.owns(claim, piece)

    def lives(self, claim: int, piece: int) -> bool:
        with self._state:
            return not self._over and self._scheduler.has_later(claim, piece)

    def ignores_ranges(self, claim: int) -> None:
        with self._state:
            self._scheduler.ignores_ranges(claim)

    def got(self, ask: Request, count: int) -> bool:
        return self._got(ask.claim, 0 if self._pairs.pack(ask.locator) else count)  # it was told while its frame arrived

    def _got(self, claim: int, count: int) -> bool:
        self.engine.token.check(STOPPED)
        with self._state:
            self.fetched += count
            counts = not self._over and self._scheduler.received(claim, count, self.engine.clock())
        if count:
            self._lock.progress()  # on a slow line a whole piece takes long
            self.engine.emit(BytesArrived(digest=self.wanted.digest, count=count))
        return counts

    def write(self, claim: int, piece: int, offset: int, data: memoryview) -> bool:
        with self._state:
            if self._over or not self._scheduler.may_write(claim, piece):
                return False
        self.partial.write(offset, data)
        with self._state:
            self._scheduler.written(claim)
        return True

    def keep(self, claim: int, piece: int, hash_: bytes) -> bool:
        known = self.table.slots[piece] if self.table is not None else None
        with self._state:
            if self._over:
                return False
            if known is not None and known.hash != hash_:
                failure = Failure(
                    code="CHECKSUM_FAIL", what=f"sent wrong bytes in piece {piece}", reason=Reason.CORRUPT_DATA
                )
                locator = self._scheduler.locator(claim)
                self._scheduler.piece_mismatch(claim, failure)
                self._blame.note(locator, failure, wrong=[piece])
                return False
            if not self._scheduler.may_write(claim, piece):
                return False
            locator = self._scheduler.locator(claim)
        self._record(claim, piece, hash_, locator)
        return True

    def _record(self, claim: int, piece: int, hash_: bytes, locator: str) -> None:
        self.partial.finish(piece, hash_, source_key(locator))
        with self._state:
            self._scheduler.completed(claim, piece, hash_, self.engine.clock())
            self._blame.right(locator, piece)
        if self._hasher_thread is not None:
            self._hasher_thread.advance()

    def whole_file(self, claim: int, body: Body) -> bool:
        """Share a local file's extents where the file system can; its pieces are then read from our own file."""
        if body.fd is None or self.size <= TABLE_FROM:
            return False
        with self._state:
            locator = self._scheduler.locator(claim)
            if self._over or not self._scheduler.claim_all(claim):
                return False
        try:
            syscalls.reflink(body.fd, self.partial.fd)
        except OSError:
            return False
        os.ftruncate(self.partial.fd, self.size)
        buffer = aligned_buffer(min(PIECE, self.size))
        for index in range(piece_count(self.size)):
            start, stop = piece_range(index, self.size)
            view = buffer[: stop - start]
            if not read_fully(self.partial.fd, view, start):
                return False
            with self._state:
                if self._over or not self._scheduler.may_write(claim, index):
                    return False
            self._record(claim, index, piece_hash(view), locator)
        self._got(claim, self.size)
        return True
