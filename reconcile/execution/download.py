"""One blob's download: ``Transfer`` decides, this asks, reads, writes and tells it what happened. Boring on purpose."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

from backends import Body, EndedEarly, NotFound, Registry, SourceError, Throttled, TimedOut, redact
from cas import ChecksumError, Digest, SizeMismatchError, Stopped, kernel, locks
from cas.layout import TABLE_FROM
from cas.partial import Partial, read_fully
from cas.pieces import PIECE, PieceTable, piece_count, piece_hash, piece_range, source_key

from ..desired.lockfile import absolute
from ..errors import (
    BLOB_CODES,
    AuthError,
    IncompleteDownloadError,
    ModelstowError,
    NetworkTimeoutError,
    RateLimitError,
    SourceUnavailableError,
)
from ..telemetry.events import BytesArrived, Note, Sink, SourceFailed
from .failures import FailureTable
from .transfer import EARLIER, Ask, Fact, GiveUp, Prove, RetryPolicy, Transfer, Wait

THIS_STORE = "this store"
"""The sender of pieces that were saved from a damaged blob or a copy."""
_READ_STEP = 1 << 20
_SAY_S = 0.5  # a wait from so long on is told
_FLOOR, _WINDOW_S = 1024, 60.0  # bytes a second that a source must give, looked at so often


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One blob to bring home."""

    digest: Digest
    size: int
    urls: tuple[str, ...]
    paths: tuple[str, ...] = ()  # in trees, for messages
    spares: tuple[str, ...] = ()  # files on this disk that may hold its bytes
    anew: bool = False  # fetch it even if it is there
    seen_commit: str = ""  # ``store.commits_seen`` when it was asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What all downloads of one run share. Set *stop* to end them all soon."""

    registry: Registry
    base: Path  # what relative locators are relative to
    failures: FailureTable
    emit: Sink
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    stop: Event = field(default_factory=Event)
    clock: Callable[[], float] = time.monotonic


class Download:
    """One blob's transfer while it lasts."""

    def __init__(
        self, engine: Engine, wanted: Wanted, partial: Partial, table: PieceTable | None, lock: locks.Lock
    ) -> None:
        self.engine, self.wanted, self.partial, self.table, self._lock = engine, wanted, partial, table, lock
        self.fetched = 0
        self._locators = {absolute(url, engine.base): url for url in wanted.urls}
        self._buffer = memoryview(bytearray(min(PIECE, wanted.size)))
        late = frozenset(locator for locator in self._locators if self._is_late(locator))
        self._transfer = Transfer(wanted.size, tuple(self._locators), engine.policy, late)
        self._chaser: _Chaser | None = None
        self._window_began, self._window_bytes = engine.clock(), 0

    def fill(self) -> None:
        """Until every piece is there and the whole is its name. Raises what ``Fetcher.obtain`` raises."""
        by_key = {source_key(locator): locator for locator in self._locators}
        by_key[source_key(THIS_STORE)] = THIS_STORE
        for index, slot in enumerate(self.partial.table.slots):
            if slot is not None:
                self._transfer.hold(index, by_key.get(slot.source, EARLIER), slot.hash)
        try:
            while not self._step():
                pass
        finally:
            self._end_chase()

    def _step(self) -> bool:
        if self.engine.stop.is_set():
            raise Stopped("stopped; what was fetched is kept and the next run continues there")
        match self._transfer.next(self.engine.clock()):
            case Ask() as ask:
                self._chase()
                self._ask(ask)
            case Wait(seconds=seconds):
                name = next(iter(self.wanted.paths), self.wanted.digest.short)
                if seconds >= _SAY_S:
                    self.engine.emit(Note(text=f"{name}: every source failed; asking again in {seconds:.0f} s"))
                self.engine.stop.wait(seconds)
            case Prove():
                return self._prove()
            case GiveUp(failures=failures):
                raise self._given_up(dict(failures))
        return False

    def _prove(self) -> bool:
        self._end_chase()
        actual = self.partial.proof()
        if actual == self.wanted.digest:
            honest = self._transfer.senders() & self._locators.keys()
            self.engine.failures.clear(key for locator in honest for key in self._keys(locator))
            for liar in self._transfer.proven():
                self._note(liar, Fact(code="CHECKSUM_FAIL", what="sent wrong bytes"))
            return True
        fact = Fact(code="CHECKSUM_FAIL", what=f"sent wrong bytes (sha256:{actual.hex[:12]}…)", actual=str(actual))
        struck, liars = self._transfer.wrong(fact)
        self.partial.forget(list(struck))
        for liar in liars:
            self._note(liar, fact)
        return False

    # ---- asking

    def _ask(self, ask: Ask) -> None:
        try:
            body = self.engine.registry.find(ask.locator).open(ask.locator, start=ask.start, stop=ask.stop)
            self._window_began, self._window_bytes = self.engine.clock(), 0
            try:
                self._receive(ask, body)
            finally:
                body.close()
        except SourceError as error:
            fact = Fact(
                code=error.code,
                what=error.what,
                transient=error.transient,
                throttled=isinstance(error, Throttled),
                retry_after=error.retry_after,
                hint=error.hint,
            )
            self._transfer.failed(ask.locator, fact, self.engine.clock())
            self._note(ask.locator, fact, exactly=isinstance(error, NotFound))
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # a source that stumbles over an answer
            fact = Fact(code="SOURCE_UNAVAILABLE", what=f"its answer makes no sense ({type(error).__name__})")
            self._transfer.failed(ask.locator, fact, self.engine.clock())
            self._note(ask.locator, fact)
        except _WrongSize as error:
            fact = Fact(code="SIZE_MISMATCH", what=str(error), actual=error.actual)
            self._transfer.failed(ask.locator, fact, self.engine.clock())
            self._note(ask.locator, fact, exactly=True)

    def _receive(self, ask: Ask, body: Body) -> None:
        size = self.wanted.size
        if body.total is not None and body.total != size:
            raise _WrongSize(size, body.total)
        if body.start > ask.start:
            raise EndedEarly(f"the body begins at {body.start:,}, not at {ask.start:,}", locator=ask.locator)
        if body.fd is not None and self._clone(body.fd, ask.locator):
            return
        at = body.start
        while at < ask.start:  # the range was ignored: count off what is there already
            at += self._read(body, self._buffer[: min(len(self._buffer), ask.start - at)], ask.locator)
        for index in range(ask.start // PIECE, piece_count(size)):
            start, stop = piece_range(index, size)
            if start >= ask.stop:
                return
            view = self._buffer[: stop - start]
            done = 0
            while done < len(view):
                done += self._read(body, view[done : done + _READ_STEP], ask.locator)
            if not self._keep(index, view, ask.locator):
                return
        if body.total is None and (extra := body.read_into(memoryview(bytearray(1)))):
            raise _WrongSize(size, size + extra)

    def _read(self, body: Body, view: memoryview, locator: str) -> int:
        if self.engine.stop.is_set():
            raise Stopped("stopped; what was fetched is kept and the next run continues there")
        count = body.read_into(view)
        if count == 0:
            raise EndedEarly("the body ended early", locator=locator)
        self._watch_rate(count, locator)
        self.fetched += count
        self.engine.emit(BytesArrived(digest=self.wanted.digest, count=count))
        return count

    def _watch_rate(self, count: int, locator: str) -> None:
        """A server that drips would never time out by itself."""
        now = self.engine.clock()
        self._window_bytes += count
        if now - self._window_began >= _WINDOW_S:
            if self._window_bytes < _WINDOW_S * _FLOOR:
                raise TimedOut(f"less than {_FLOOR} bytes a second for {_WINDOW_S:.0f} s", locator=locator)
            self._window_began, self._window_bytes = now, 0

    def _keep(self, index: int, view: memoryview, locator: str) -> bool:
        """Write a whole piece and put it on record; False if it cannot be right."""
        hash_ = piece_hash(view)
        known = self.table.slots[index] if self.table is not None else None
        if known is not None and known.hash != hash_:
            fact = Fact(code="CHECKSUM_FAIL", what=f"sent wrong bytes in piece {index}", actual=None)
            self._transfer.wrong_piece(index, locator, fact)
            self._note(locator, fact)
            return False
        self.partial.write(index * PIECE, view)
        self.partial.finish(index, hash_, source_key(locator))
        self._transfer.hold(index, locator, hash_)
        self._lock.progress()
        if self._chaser is not None:
            self._chaser.advance()
        return True

    def _clone(self, fd: int, locator: str) -> bool:
        """Share a local file's extents where the file system can; its pieces are then read from our own file."""
        if self.partial.held_bytes or self.wanted.size <= TABLE_FROM:
            return False
        try:
            kernel.clone(fd, self.partial.fd)
        except OSError:
            return False
        os.ftruncate(self.partial.fd, self.wanted.size)
        for index in range(piece_count(self.wanted.size)):
            start, stop = piece_range(index, self.wanted.size)
            view = self._buffer[: stop - start]
            if not read_fully(self.partial.fd, view, start) or not self._keep_cloned(index, view, locator):
                return False
        self.fetched += self.wanted.size
        self.engine.emit(BytesArrived(digest=self.wanted.digest, count=self.wanted.size))
        return True

    def _keep_cloned(self, index: int, view: memoryview, locator: str) -> bool:
        hash_ = piece_hash(view)
        self.partial.finish(index, hash_, source_key(locator))
        self._transfer.hold(index, locator, hash_)
        return True

    # ---- the proof that follows the front

    def _chase(self) -> None:
        if self._chaser is None and self.wanted.size > PIECE:
            self._chaser = _Chaser(self.partial)

    def _end_chase(self) -> None:
        if self._chaser is not None:
            self._chaser.finish()
            self._chaser = None

    # ---- reasons

    def _keys(self, locator: str) -> tuple[str, str]:
        """Under what a failure of this locator may be on record: itself, and what fails together with it."""
        try:
            return redact(locator), redact(self.engine.registry.find(locator).origin(locator))
        except SourceError:
            return redact(locator), redact(locator)

    def _is_late(self, locator: str) -> bool:
        return any(key in self.engine.failures for key in self._keys(locator))

    def _note(self, locator: str, fact: Fact, *, exactly: bool = False) -> None:
        if locator not in self._locators:
            return
        key = self._keys(locator)[0 if exactly or fact.code == "CHECKSUM_FAIL" else 1]
        self.engine.failures.note(key, fact.code, fact.what)
        self.engine.emit(SourceFailed(locator=redact(locator), what=fact.what))

    def _given_up(self, failures: dict[str, Fact]) -> ModelstowError | ChecksumError:
        wanted = self.wanted
        rows = [{"source": redact(locator), "code": f.code, "reason": f.what} for locator, f in failures.items()]
        ranked = sorted(failures.values(), key=lambda fact: _code_rank(fact.code))
        code = ranked[0].code if ranked else "SOURCE_UNAVAILABLE"
        names = ", ".join(wanted.paths[:3]) or wanted.digest.short
        reasons = "".join(f"\n  from {row['source']}: {row['reason']}" for row in rows) or "\n  no source is named"
        fields: dict[str, object] = {"file_path": next(iter(wanted.paths), ""), "digest": wanted.digest, "sources": rows}
        if code == "CHECKSUM_FAIL":
            hint = "the remote file differs from the lockfile: run `modelstow lock --upgrade`, or restore the upload"
            what = f"{names}: no source gave the bytes of {wanted.digest.short}… ({wanted.size:,} bytes){reasons}"
            return ChecksumError(what, hint=hint, expected=str(wanted.digest), actual=ranked[0].actual, **fields)
        if code == "SIZE_MISMATCH":
            hint = "the remote file differs from the lockfile: run `modelstow lock --upgrade`, or restore the upload"
            what = f"{names}: the lockfile says {wanted.size:,} bytes{reasons}"
            return SizeMismatchError(what, hint=hint, expected=wanted.size, actual=ranked[0].actual, **fields)
        kind = _KINDS.get(code, SourceUnavailableError)
        what = f"{names}: no source could give {wanted.digest.short}… ({wanted.size:,} bytes){reasons}"
        offline = any("--offline" in fact.what for fact in failures.values())
        hint = "drop --offline, or add a folder that has it" if offline else _HINTS.get(code, _HINTS[""])
        if code in ("AUTH_FAIL", "SOURCE_UNAVAILABLE") and ranked and ranked[0].hint:
            hint = ranked[0].hint  # whether a login, a key or a certificate is wanted, and whose, it knows best
        return kind(what, hint=hint, missing_files=list(wanted.paths), **fields)


_KINDS: dict[str, type[SourceUnavailableError]] = {
    "AUTH_FAIL": AuthError,
    "RATE_LIMIT": RateLimitError,
    "NETWORK_TIMEOUT": NetworkTimeoutError,
    "INCOMPLETE_DOWNLOAD": IncompleteDownloadError,
}
_HINTS = {
    "": "check the network and run the same command again: what was fetched is kept",
    "AUTH_FAIL": "put a login for the host into ~/.netrc, or check the one there",
    "INCOMPLETE_DOWNLOAD": "the source lacks files of the lockfile; add another source, or run `modelstow lock --upgrade`",
}


def _code_rank(code: str) -> int:
    return BLOB_CODES.index(code) if code in BLOB_CODES else len(BLOB_CODES)


class _WrongSize(Exception):
    """A source's object has another length than the lockfile says."""

    def __init__(self, expected: int, actual: int) -> None:
        super().__init__(f"its file has {actual:,} bytes, the lockfile says {expected:,}")
        self.actual = actual


class _Chaser:
    """A thread that follows a partial's front with sha256, so that the proof ends when the last byte arrives."""

    def __init__(self, partial: Partial) -> None:
        self._partial, self._news, self._ended = partial, Event(), False
        self._failure: BaseException | None = None
        self._thread = Thread(target=self._run, name="sha256", daemon=True)
        self._news.set()
        self._thread.start()

    def advance(self) -> None:
        self._news.set()

    def finish(self) -> None:
        """Stop following and join. Raises what reading the file raised."""
        self._ended = True
        self._news.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            while not self._ended:
                self._news.wait()
                self._news.clear()
                # By the step, so that the end of the transfer does not wait for a long catching-up.
                while not self._ended and (front := self._partial.front()) > self._partial.proven_to:
                    self._partial.prove_to(min(front, self._partial.proven_to + PIECE))
        except BaseException as failure:
            self._failure = failure
