"""Group commit: small blobs are committed together, since each waits longer for the disk than for its bytes."""

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

_UNLIMITED = 1 << 16  # descriptors to count on where there is no limit
_TOGETHER = 1 << 20  # bytes of a full group
TOGETHER_S = 0.25
"""The longest that a blob waits for others to be committed with."""


def scrub_target(store: BlobStore, request: BlobRequest) -> scrub.ScrubTarget:
    """The blob in the store, for a scrub."""
    path, table = store.layout.blob(request.digest), store.layout.table(request.digest)
    return scrub.ScrubTarget(path=path, digest=request.digest, size=request.size, table=table, makes_table=True)


@dataclass(slots=True)
class PendingCommit:
    """A blob that is complete and verified, but not committed. It owns its lock and its partial."""

    request: BlobRequest
    lock: locks.Lock
    before: BlobStatus  # in the store, before it was fetched
    partial: Partial
    resumed: int  # bytes that were held before
    fetched: int = 0  # bytes received, corrupt ones too
    damaged: tuple[int, ...] = ()  # pieces of the blob that it replaces

    def close_or_discard(self) -> None:
        """Close partial and lock, after a commit or without one. What can be resumed is kept."""
        with self.lock, suppress(OSError):  # the next run removes what is left of the partial
            self.partial.close_or_discard()


def most_open() -> int:
    """Descriptors that this process may have open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _UNLIMITED if limit == resource.RLIM_INFINITY else limit


def affordable_connections() -> int:
    """Connections that the limit of descriptors allows: a worker has up to eight open, the rest of a run two dozen."""
    return max(1, (most_open() - 24) // 8)


class GroupCommit:
    """The group of pending commits of one ``Fetcher.obtain_all``. Safe for threads.

    Another thread commits what has waited long enough while the thread that adds to it does something that takes long.
    """

    def __init__(self, store: BlobStore, context: TransferContext, before_commit: Callable[[], object]) -> None:
        self._store, self._context, self._before_commit = store, context, before_commit
        self.outcomes: dict[Digest, bool | Exception] = {}
        """For each blob whether its inode has changed, or its error."""
        self._pending: list[PendingCommit] = []
        self._bytes, self._began_at, self._mutex = 0, 0.0, Lock()
        # Each has two descriptors open, its partial's and its lock's. Half of the process's limit is left to others.
        self._most = max(1, most_open() // (4 * context.connections.most))

    def add(self, pending: PendingCommit) -> None:
        """Take over a pending commit; commit the group if it is full."""
        with self._mutex:
            if not self._pending:
                self._began_at, self._bytes = self._context.clock(), 0
            self._pending.append(pending)
            self._bytes += pending.request.size
        if self._bytes >= _TOGETHER or len(self._pending) >= self._most:
            self.commit()

    def commit_due(self) -> None:
        """Commit the group if it has waited long enough and no other thread is committing it."""
        if self._pending and self._context.clock() - self._began_at >= TOGETHER_S and self._mutex.acquire(blocking=False):
            try:
                self._commit()
            finally:
                self._mutex.release()

    def commit(self) -> None:
        """Commit the group. On return each of its blobs is durable, or has an error in ``outcomes``."""
        with self._mutex:
            self._commit()

    def _commit(self) -> None:
        if self._pending:
            ready, failed = self._ready()
            replace = [each.request.digest for each in ready if each.before.state is not BlobState.ABSENT]
            failed |= self._store.ingest.commit_all([each.partial for each in ready], replace=replace)
            while self._pending:
                each = self._pending[-1]
                try:
                    self.outcomes[each.request.digest] = self._conclude(each, failed.get(each.request.digest))
                except Exception as error:
                    self.outcomes[each.request.digest] = error
                self._pending.pop().close_or_discard()

    def drop(self) -> None:
        """Close the group without a commit: at most a mebibyte is lost."""
        with self._mutex:
            for each in self._pending:
                self.note_failed(each)
                each.close_or_discard()
            self._pending.clear()

    def _ready(self) -> tuple[list[PendingCommit], dict[Digest, Exception]]:
        ready: list[PendingCommit] = []
        failed: dict[Digest, Exception] = {}
        for each in self._pending:
            try:
                self._before_commit()
                if not each.lock.is_current():  # another process may be writing to the same partial
                    what = f"the lock of {each.request.digest.short} was removed while it was held"
                    hint = "run it again; lock files below state/locks are never to be deleted"
                    raise LockTimeoutError(what, hint=hint)
                if self._is_intact(each):
                    each.partial.discard()  # the intact blob keeps its inode, with all its links
                else:
                    ready.append(each)
            except Exception as error:
                failed[each.request.digest] = error
        return ready, failed

    def _is_intact(self, pending: PendingCommit) -> bool:
        """Whether the store has an intact blob, by its content, although it was fetched again."""
        if pending.before.state is not BlobState.INTACT:
            return False
        return next(scrub.scrub([scrub_target(self._store, pending.request)], Level.FULL)).intact

    def _conclude(self, pending: PendingCommit, error: Exception | None) -> bool | Exception:
        request, ino_before = pending.request, pending.before.ino
        if error is not None:
            self.note_failed(pending)
            return self.explain(error, pending)
        event = BlobFetched(
            digest=request.digest,
            size=request.size,
            fetched_bytes=pending.fetched,
            resumed_bytes=pending.resumed,
            repaired_pieces=pending.damaged,
            repair=pending.before.state is BlobState.SUSPECT,
        )
        self._context.emit(event)
        self._store.note_commit(pending.lock, request.digest)
        return ino_before != 0 and ino_before != self._store.blobs.stat(request.digest, request.size).ino

    def note_failed(self, pending: PendingCommit) -> None:
        """Report that this run does not commit it."""
        self._context.emit(BlobFailed(digest=pending.request.digest, fetched_bytes=pending.fetched))

    def explain(self, error: Exception, pending: PendingCommit) -> Exception:
        """The error; for a full disk, one that says how much is free and how much is needed."""
        if not isinstance(error, OSError) or error.errno not in FULL:
            return error
        held = pending.partial.held_bytes if pending.partial.fd >= 0 else 0  # what could not be synced was discarded
        root, needed = self._store.layout.root, pending.request.size - held
        free = shutil.disk_usage(root).free
        hint = "free some space and run it again: what was fetched is kept; `modelstow gc` removes what nothing keeps"
        what = f"the disk of {root} is full: {needed:,} bytes more are needed, {free:,} are free"
        full = NoSpaceError(what, hint=hint, bytes_needed=needed, bytes_available=free, path=str(root))
        full.__cause__ = error
        return full
