"""Brings one blob home: from what stands on this disk if that proves right, else from its sources.

What stands on this disk is tried first: a touched blob is read, a copy in a tree is taken, the good pieces of a damaged
one are saved. Only the rest is downloaded.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from backends import Body, EndedEarly
from cas import (
    EMPTY,
    BlobState,
    BlobStore,
    ChecksumError,
    Digest,
    LockTimeoutError,
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
from .lane import READ_STEP
from .retry import patiently


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
        digest = wanted.digest
        doing = f"fetching {digest.short}"
        lock = self.store.lock_blob(
            digest,
            doing=doing,
            timeout_s=self.lock_timeout_s,
            stop=self.engine.stop,
            on_wait=lambda holder: self.engine.emit(Waiting(for_whom=holder)),
        )
        with lock:
            self.store.refresh()
            look = self.store.look(digest, wanted.size)
            shared = wanted.anew and self.store.commits_seen(digest) != wanted.seen_commit
            if look.state is BlobState.INTACT and (shared or not wanted.anew):
                self.engine.emit(BlobReused(digest=digest, size=wanted.size))
                return False
            if not wanted.anew and self._at_hand(wanted, look.state, lock):
                self.store.note_commit(lock, digest)
                self.engine.emit(BlobReused(digest=digest, size=wanted.size))
                return look.ino not in (0, self.store.look(digest, wanted.size).ino)
            self._fetch(wanted, look.state, lock)
            self.store.note_commit(lock, digest)
            return look.ino not in (0, self.store.look(digest, wanted.size).ino)

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

    def _target(self, wanted: Wanted) -> scrub.Target:
        layout, digest = self.store.layout, wanted.digest
        path, table = layout.blob(digest), layout.table(digest)
        return scrub.Target(path=path, digest=digest, size=wanted.size, table=table, makes_table=True)

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

    def _fetch(self, wanted: Wanted, state: BlobState, lock: locks.Lock) -> None:
        digest, size = wanted.digest, wanted.size
        if wanted.anew:
            sweep.drop_partial(self.store, digest)
        partial = self.store.partial(digest, size)
        resumed = partial.held_bytes
        mending = state is BlobState.SUSPECT and not wanted.anew
        table = proven_table(self.store.layout.table(digest), digest, size) if mending else None
        run = Download(self.engine, wanted, partial, table, lock)
        try:
            damaged = self._save_pieces(wanted, partial, table) if table is not None else ()
            self.engine.emit(FetchStarted(digest=digest, size=size, held=partial.held_bytes, name=wanted.name))
            run.fill()
            self.before_commit()
            if not lock.is_current():  # somebody else may be writing to the same partial
                what = f"the lock of {digest.short} was removed by somebody while it was held"
                raise LockTimeoutError(what, hint="run it again; lock files below state/locks are never to be deleted")
            if wanted.anew and state is BlobState.INTACT and next(scrub.scrub([self._target(wanted)], Level.FULL)).intact:
                partial.discard()  # the good blob stays where it is, with all its links
            else:
                self.store.commit(partial, replace=state is not BlobState.ABSENT)
        except BaseException as error:
            self.engine.emit(BlobFailed(digest=digest, fetched_bytes=run.fetched))
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                held = partial.held_bytes if partial.fd >= 0 else 0  # what could not be synced was thrown away
                raise self._no_space(size - held) from error
            raise
        finally:
            partial.leave()
        event = BlobFetched(
            digest=digest,
            size=size,
            fetched_bytes=run.fetched,
            resumed_bytes=resumed,
            repaired_pieces=damaged,
            repair=state is BlobState.SUSPECT,
        )
        self.engine.emit(event)

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
                size = _copy_body(body, fd, locator, self.engine.stop)
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


def _copy_body(body: Body, fd: int, locator: str, stop: Event) -> int:
    buffer = memoryview(bytearray(READ_STEP))
    size = 0
    while count := body.read_into(buffer):
        if stop.is_set():
            raise Stopped("stopped")
        done = 0
        while done < count:
            done += os.write(fd, buffer[done:count])
        size += count
    if body.start != 0 or (body.total is not None and body.total != size):
        raise EndedEarly("the body ended early", locator=locator)
    return size
