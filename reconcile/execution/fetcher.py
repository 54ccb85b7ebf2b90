"""Brings one blob home: from what stands on this disk if that proves right, else from its sources.

What stands on this disk is tried first: a touched blob is read, a copy in a tree is taken, the good pieces of a damaged
one are saved. Only the rest is downloaded.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from backends import Body, EndedEarly
from cas import (
    EMPTY,
    BlobState,
    BlobStore,
    ChecksumError,
    Digest,
    LockTimeoutError,
    Look,
    NoSpaceError,
    Stopped,
    locks,
    scrub,
    sweep,
)
from cas.partial import Partial, read_fully
from cas.pieces import PIECE, PieceTable, open_regular, piece_hash, piece_range, proven_table, source_key
from cas.scrub import Level

from ..telemetry.events import BlobFailed, BlobFetched, BlobReused, FetchStarted, Waiting
from .download import THIS_STORE, Download
from .engine import Engine, Wanted
from .intake import MOST_STEP, Intake
from .retry import patiently

_TOGETHER, _TOGETHER_S = 1 << 20, 1.0  # bytes that are committed together at most, and seconds that they may take


@dataclass(slots=True)
class _Filled:
    """A blob that is here and proven but for the commit. Its lock is held."""

    wanted: Wanted
    lock: locks.Lock
    look: Look  # before
    partial: Partial
    run: Download
    resumed: int  # bytes that an earlier run had left
    damaged: tuple[int, ...] = ()  # pieces of the blob before

    def leave(self) -> None:
        """Let go of it, whether it was committed or not."""
        self.partial.leave()
        self.lock.close()


@dataclass(slots=True, kw_only=True)
class Fetcher:
    """Brings blobs into a store. One object serves any number of threads. ``before_commit`` may raise to forbid one."""

    store: BlobStore
    engine: Engine
    lock_timeout_s: float = 300.0
    before_commit: Callable[[], object] = lambda: None

    def obtain(self, wanted: Wanted) -> bool:
        """Make sure that the blob is in the store, proven. True if its inode is another now than before.

        Durable on return. Raises ChecksumError, SizeMismatchError, SourceUnavailableError and its kin, naming every
        source and its reason; LockTimeoutError, Stopped, OSError.
        """
        outcome = self.obtain_all([wanted])[wanted.digest]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def obtain_all(self, blobs: Iterable[Wanted]) -> dict[Digest, bool | Exception]:
        """What ``obtain`` returns or raises for each of several blobs. Raises Stopped.

        They are brought one after the other, and small ones are committed together: waiting for the disk would take
        longer than their bytes. Who holds a lock waits for none meanwhile.
        """
        outcomes: dict[Digest, bool | Exception] = {}
        filled: list[_Filled] = []
        try:
            began, bytes_, busy = 0.0, 0, []
            for wanted in blobs:
                bytes_ += wanted.size
                if filled and (bytes_ > _TOGETHER or self.engine.clock() - began > _TOGETHER_S):
                    self._commit(filled, outcomes)
                if not filled:
                    began, bytes_ = self.engine.clock(), wanted.size
                if not self._bring(wanted, filled, outcomes, waits=False):
                    busy.append(wanted)
            self._commit(filled, outcomes)
            for wanted in busy:
                self._bring(wanted, filled, outcomes, waits=True)
                self._commit(filled, outcomes)
        finally:
            for each in filled:
                self._emit_failed(each)
                each.leave()
        return outcomes

    def _bring(
        self, wanted: Wanted, filled: list[_Filled], outcomes: dict[Digest, bool | Exception], *, waits: bool
    ) -> bool:
        """All but the commit, for which it is added to *filled*; False if another holds its lock and nobody *waits*."""
        try:
            lock = self._lock(wanted, waits=waits)
            if lock is None:
                return False
            with ExitStack() as held:
                held.enter_context(lock)
                found = self._begin(wanted, lock)
                if isinstance(found, _Filled):
                    held.pop_all()
                    filled.append(found)
                else:
                    outcomes[wanted.digest] = found
        except Stopped:
            raise
        except Exception as error:
            outcomes[wanted.digest] = error
        return True

    def _lock(self, wanted: Wanted, *, waits: bool) -> locks.Lock | None:
        doing = f"fetching {wanted.digest.short}"

        def tell(holder: locks.Holder | None) -> None:
            neighbour = holder is not None and holder.mine and holder.doing != doing  # another blob by the same lock
            if waits and not neighbour:
                self.engine.emit(Waiting(for_whom=str(holder or "another process")))

        try:
            return self.store.lock_blob(
                wanted.digest,
                doing=doing,
                timeout_s=self.lock_timeout_s if waits else 0.0,
                stop=self.engine.stop,
                on_wait=tell,
            )
        except LockTimeoutError:
            if waits:
                raise
            return None

    def _begin(self, wanted: Wanted, lock: locks.Lock) -> bool | _Filled:
        digest = wanted.digest
        self.store.refresh()
        look = self.store.look(digest, wanted.size)
        shared = wanted.anew and self.store.commits_seen(digest) != wanted.seen_commit
        if look.state is BlobState.INTACT and (shared or not wanted.anew):
            self.engine.emit(BlobReused(digest=digest, size=wanted.size))
            return False
        if not wanted.anew and self._at_hand(wanted, look.state, lock):
            self.store.note_commit(lock, digest)
            self.engine.emit(BlobReused(digest=digest, size=wanted.size))
            return self._is_new(wanted, look)
        return self._fill(wanted, look, lock)

    def _is_new(self, wanted: Wanted, before: Look) -> bool:
        return before.ino != 0 and before.ino != self.store.look(wanted.digest, wanted.size).ino

    # ---- what is on this disk

    def _at_hand(self, wanted: Wanted, state: BlobState, lock: locks.Lock) -> bool:
        """Prove what stands on this disk already, by reading it; False if nothing of it is right as a whole."""
        if state is BlobState.SUSPECT and self._prove_in_place(wanted, lock):
            return True
        for spare in wanted.spares:
            try:
                fd = open_regular(spare)
            except OSError:
                continue
            try:
                if os.fstat(fd).st_size == wanted.size:
                    self.store.copy_in(fd, wanted.digest, wanted.size)
                    return True
            except ChecksumError:
                continue
            finally:
                os.close(fd)
        return False

    def _prove_in_place(self, wanted: Wanted, lock: locks.Lock) -> bool:
        """A touched or restored blob costs reading, not fetching. One that a verification convicted is read in full."""
        convicted = wanted.digest.hex in self.store.suspects()
        level = Level.FULL if convicted else Level.FAST
        verdict = next(scrub.scrub([self._target(wanted)], level, on_bytes=lambda count: lock.progress()))
        if not verdict.intact:
            return False
        try:
            self.store.certify(wanted.digest)
        except PermissionError:  # another member's of a shared store: ours takes its place
            fd = open_regular(self.store.layout.blob(wanted.digest))
            try:
                self.store.copy_in(fd, wanted.digest, wanted.size)
            finally:
                os.close(fd)
        return True

    def _target(self, wanted: Wanted) -> scrub.Subject:
        layout, digest = self.store.layout, wanted.digest
        path, table = layout.blob(digest), layout.table(digest)
        return scrub.Subject(path=path, digest=digest, size=wanted.size, table=table, makes_table=True)

    def _save_pieces(self, wanted: Wanted, partial: Partial, table: PieceTable) -> tuple[int, ...]:
        """Copy the good pieces of a damaged blob and of copies into *partial*; which were damaged in the blob."""
        buffer = memoryview(bytearray(min(PIECE, wanted.size)))
        damaged = []
        for index in list(partial.table.missing()):
            slot = table.slots[index]
            for path in (self.store.layout.blob(wanted.digest), *wanted.spares):
                start, stop = piece_range(index, wanted.size)
                view = buffer[: stop - start]
                if slot is not None and _read_piece(path, view, start) and piece_hash(view) == slot.hash:
                    partial.write(start, view)
                    partial.finish(index, slot.hash, source_key(THIS_STORE))
                    break
                if path == self.store.layout.blob(wanted.digest):
                    damaged.append(index)
        return tuple(damaged)

    # ---- what comes from sources

    def _fill(self, wanted: Wanted, look: Look, lock: locks.Lock) -> _Filled:
        digest, size = wanted.digest, wanted.size
        if wanted.anew:
            sweep.drop_partial(self.store, digest)
        partial = self.store.partial(digest, size)
        resumed = partial.held_bytes
        mending = look.state is BlobState.SUSPECT and not wanted.anew
        table = proven_table(self.store.layout.table(digest), digest, size) if mending else None
        filled = _Filled(wanted, lock, look, partial, Download(self.engine, wanted, partial, table, lock), resumed)
        try:
            filled.damaged = self._save_pieces(wanted, partial, table) if table is not None else ()
            self.engine.emit(FetchStarted(digest=digest, size=size, held=partial.held_bytes, name=wanted.name))
            filled.run.fill()
        except BaseException as error:
            self._emit_failed(filled)
            partial.leave()
            if isinstance(error, Exception):
                raise self._explained(error, filled) from error
            raise
        return filled

    def _commit(self, filled: list[_Filled], outcomes: dict[Digest, bool | Exception]) -> None:
        """Make blobs of what was filled, and let go of it."""
        ready: list[_Filled] = []
        failed: dict[Digest, Exception] = {}
        for each in filled:
            try:
                self.before_commit()
                if not each.lock.is_current():  # somebody else may be writing to the same partial
                    what = f"the lock of {each.wanted.digest.short} was removed by somebody while it was held"
                    hint = "run it again; lock files below state/locks are never to be deleted"
                    raise LockTimeoutError(what, hint=hint)
                if self._is_there(each):
                    each.partial.discard()  # the good blob stays where it is, with all its links
                else:
                    ready.append(each)
            except Exception as error:
                failed[each.wanted.digest] = error
        replace = [each.wanted.digest for each in ready if each.look.state is not BlobState.ABSENT]
        failed |= self.store.commit_all([each.partial for each in ready], replace=replace)
        while filled:
            each = filled[-1]
            outcomes[each.wanted.digest] = self._ended(each, failed.get(each.wanted.digest))
            filled.pop().leave()

    def _is_there(self, filled: _Filled) -> bool:
        """Whether the blob was fetched anew beside one that is as good, by its content."""
        suspected = filled.look.state is not BlobState.INTACT
        return not suspected and next(scrub.scrub([self._target(filled.wanted)], Level.FULL)).intact

    def _ended(self, filled: _Filled, error: Exception | None) -> bool | Exception:
        wanted = filled.wanted
        if error is not None:
            self._emit_failed(filled)
            return self._explained(error, filled)
        event = BlobFetched(
            digest=wanted.digest,
            size=wanted.size,
            fetched_bytes=filled.run.fetched,
            resumed_bytes=filled.resumed,
            repaired_pieces=filled.damaged,
            repair=filled.look.state is BlobState.SUSPECT,
        )
        self.engine.emit(event)
        self.store.note_commit(filled.lock, wanted.digest)
        return self._is_new(wanted, filled.look)

    def _emit_failed(self, filled: _Filled) -> None:
        self.engine.emit(BlobFailed(digest=filled.wanted.digest, fetched_bytes=filled.run.fetched))

    def _explained(self, error: Exception, filled: _Filled) -> Exception:
        """A full disk, with the figures."""
        if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return error
        held = filled.partial.held_bytes if filled.partial.fd >= 0 else 0  # what could not be synced was thrown away
        told = self._no_space(filled.wanted.size - held)
        told.__cause__ = error
        return told

    def _no_space(self, needed: int) -> NoSpaceError:
        root = self.store.layout.root
        free = shutil.disk_usage(root).free
        hint = "free some room and run it again: what was fetched is kept; `modelstow gc` removes what nothing keeps"
        what = f"the disk of {root} filled up: {needed:,} bytes more are needed, {free:,} are free"
        return NoSpaceError(what, hint=hint, bytes_needed=needed, bytes_available=free, path=str(root))

    def pull(self, locator: str) -> tuple[Digest, int]:
        """Fetch a file that nobody has named yet, name it, keep it. Always from byte 0: what has no name cannot be resumed.

        Raises SourceError, OSError, Stopped.
        """
        return patiently(lambda: self._pull_once(locator), self.engine.policy, self.engine.stop, self.engine.clock)

    def _pull_once(self, locator: str) -> tuple[Digest, int]:
        source = self.engine.registry.find(locator)
        path = f"{self.store.layout.partials}/incoming-{secrets.token_hex(8)}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            body = source.open(locator)
            try:
                size = self._copy_body(body, fd, locator)
            finally:
                body.close()
            table = scrub.name_file(fd, size)
            digest = table.digest
            with self.store.lock_blob(digest, doing=f"keeping {digest.short}", stop=self.engine.stop):
                if size and self.store.look(digest, size).state is not BlobState.INTACT:
                    self.store.take_in(path, table)
            return digest, size
        finally:
            os.close(fd)
            with suppress(FileNotFoundError):
                os.unlink(path)

    def _copy_body(self, body: Body, fd: int, locator: str) -> int:
        buffer = memoryview(bytearray(MOST_STEP))
        intake, size = Intake(body, locator, self.engine.policy, self.engine.clock), 0
        while count := intake.read(buffer):
            if self.engine.stop.is_set():
                raise Stopped("stopped")
            done = 0
            while done < count:
                done += os.write(fd, buffer[done:count])
            size += count
        if body.start != 0 or (body.total is not None and body.total != size):
            raise EndedEarly("the body ended early", locator=locator)
        return size

    def read(self, digest: Digest) -> bytes:
        """A small file that was pulled."""
        return b"" if digest == EMPTY else Path(self.store.layout.blob(digest)).read_bytes()


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
