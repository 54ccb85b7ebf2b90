"""Blobs that are filled and wait for their commit together: small ones wait longer for the disk than for their bytes."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock

from modelstow.cas import BlobState, BlobStatus, BlobStore, Digest, LockTimeoutError, NoSpaceError, locks, scrub
from modelstow.cas.errors import FULL
from modelstow.cas.partial import Partial
from modelstow.cas.scrub import Level

from ..events.events import BlobFailed, BlobFetched
from .context import TransferContext
from .state import BlobRequest

_ENOUGH = 1 << 16  # descriptors
_TOGETHER, _TOGETHER_S = 1 << 20, 0.25  # bytes that make a batch full, and the seconds that any of it may wait


def subject_of(store: BlobStore, wanted: BlobRequest) -> scrub.ScrubTarget:
    """The blob as it stands in the store, to be read."""
    path, table = store.layout.blob(wanted.digest), store.layout.table(wanted.digest)
    return scrub.ScrubTarget(path=path, digest=wanted.digest, size=wanted.size, table=table, makes_table=True)


@dataclass(slots=True)
class PendingCommit:
    """A blob that is here and proven but for the commit. Its lock is held."""

    wanted: BlobRequest
    lock: locks.Lock
    look: BlobStatus  # before
    partial: Partial
    resumed: int  # bytes that an earlier run had left
    fetched: int = 0  # bytes that came, those that were wrong too
    damaged: tuple[int, ...] = ()  # pieces of the blob before

    def close_or_discard(self) -> None:
        """Let go of it, whether it was committed or not."""
        with self.lock, suppress(OSError):  # what is left of the partial, the next run removes
            self.partial.close_or_discard()


class GroupCommit:
    """What one worker has filled. Another thread may commit it, when the worker is at something that takes long."""

    def __init__(self, store: BlobStore, engine: TransferContext, before_commit: Callable[[], object]) -> None:
        self._store, self._engine, self._before_commit = store, engine, before_commit
        self.outcomes: dict[Digest, bool | Exception] = {}
        """Of each blob: whether its inode is another now than before, or why it failed."""
        self._filled: list[PendingCommit] = []
        self._bytes, self._began, self._mutex = 0, 0.0, Lock()
        # Each holds two descriptors: its partial's and its lock's. Half of what a process may open is left to others.
        may_open = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = max(1, (_ENOUGH if may_open == resource.RLIM_INFINITY else may_open) // (4 * engine.connections.most))

    def add(self, filled: PendingCommit) -> None:
        """Keep it until there is enough to be worth a commit, and commit then."""
        with self._mutex:
            if not self._filled:
                self._began, self._bytes = self._engine.clock(), 0
            self._filled.append(filled)
            self._bytes += filled.wanted.size
        if self._bytes >= _TOGETHER or len(self._filled) >= self._most:
            self.commit()

    def commit_due(self) -> None:
        """Commit what has waited long enough, unless it is being committed."""
        if self._filled and self._engine.clock() - self._began >= _TOGETHER_S and self._mutex.acquire(blocking=False):
            try:
                self._commit()
            finally:
                self._mutex.release()

    def commit(self) -> None:
        """Make blobs of what is there. Durable on return, or an outcome says why not."""
        with self._mutex:
            self._commit()

    def _commit(self) -> None:
        if self._filled:
            ready, failed = self._ready()
            replace = [each.wanted.digest for each in ready if each.look.state is not BlobState.ABSENT]
            failed |= self._store.ingest.commit_all([each.partial for each in ready], replace=replace)
            while self._filled:
                each = self._filled[-1]
                try:
                    self.outcomes[each.wanted.digest] = self._ended(each, failed.get(each.wanted.digest))
                except Exception as error:
                    self.outcomes[each.wanted.digest] = error
                self._filled.pop().close_or_discard()

    def drop(self) -> None:
        """Let go of what is there without a commit: a mebibyte is lost at most."""
        with self._mutex:
            for each in self._filled:
                self.note_failed(each)
                each.close_or_discard()
            self._filled.clear()

    def _ready(self) -> tuple[list[PendingCommit], dict[Digest, Exception]]:
        ready: list[PendingCommit] = []
        failed: dict[Digest, Exception] = {}
        for each in self._filled:
            try:
                self._before_commit()
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
        return ready, failed

    def _is_there(self, filled: PendingCommit) -> bool:
        """Whether the blob was fetched anew beside one that is as good, by its content."""
        if filled.look.state is not BlobState.INTACT:
            return False
        return next(scrub.scrub([subject_of(self._store, filled.wanted)], Level.FULL)).intact

    def _ended(self, filled: PendingCommit, error: Exception | None) -> bool | Exception:
        wanted, before = filled.wanted, filled.look.ino
        if error is not None:
            self.note_failed(filled)
            return self.explained(error, filled)
        event = BlobFetched(
            digest=wanted.digest,
            size=wanted.size,
            fetched_bytes=filled.fetched,
            resumed_bytes=filled.resumed,
            repaired_pieces=filled.damaged,
            repair=filled.look.state is BlobState.SUSPECT,
        )
        self._engine.emit(event)
        self._store.note_commit(filled.lock, wanted.digest)
        return before != 0 and before != self._store.blobs.stat(wanted.digest, wanted.size).ino

    def note_failed(self, filled: PendingCommit) -> None:
        """Tell that nothing will come of it in this run."""
        self._engine.emit(BlobFailed(digest=filled.wanted.digest, fetched_bytes=filled.fetched))

    def explained(self, error: Exception, filled: PendingCommit) -> Exception:
        """The error, but a full disk with its figures."""
        if not isinstance(error, OSError) or error.errno not in FULL:
            return error
        held = filled.partial.held_bytes if filled.partial.fd >= 0 else 0  # what could not be synced was thrown away
        root, needed = self._store.layout.root, filled.wanted.size - held
        free = shutil.disk_usage(root).free
        hint = "free some room and run it again: what was fetched is kept; `modelstow gc` removes what nothing keeps"
        what = f"the disk of {root} filled up: {needed:,} bytes more are needed, {free:,} are free"
        told = NoSpaceError(what, hint=hint, bytes_needed=needed, bytes_available=free, path=str(root))
        told.__cause__ = error
        return told
