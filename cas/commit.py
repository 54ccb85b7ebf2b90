"""How partials become blobs: proven, synced, published. Several at once wait for the disk together."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from .digest import Digest
from .durable import fsync_folder
from .errors import ChecksumError, LockTimeoutError
from .layout import TABLE_FROM
from .look import BlobState
from .partial import Partial
from .pieces import TableState

if TYPE_CHECKING:
    from .store import BlobStore


class Commit:
    """Of one or more partials: each step is taken by all of them before the next. See ``BlobStore.commit_all``.

    A journal is committed for many files at the cost of one: where the first sync has done so, the others find their
    work done.
    """

    def __init__(self, store: BlobStore, *, replace: Container[Digest]) -> None:
        self._store, self._replace = store, replace
        self._failed: dict[Digest, Exception] = {}
        self._synced: dict[str, OSError | None] = {}  # folders

    def run(self, partials: Sequence[Partial]) -> dict[Digest, Exception]:
        """Why some failed. Those are discarded, but for one that is not its name; and one whose folder could not be synced
        keeps its name without a table: a power cut may take it, which costs a fetch."""
        for step in self._verify_and_freeze, self._sync, self._publish, self._sync_folder, self._finalize:
            for partial in partials:
                if partial.digest not in self._failed:
                    self._run_step(step, partial)
        return self._failed

    def _run_step(self, step: Callable[[Partial], None], partial: Partial) -> None:
        try:
            step(partial)
        except ChecksumError as error:
            self._failed[partial.digest] = error
        except BaseException as error:
            with suppress(OSError):  # the next run does so: its neighbours have nothing to do with it
                partial.discard()
            if not isinstance(error, Exception):
                raise
            self._failed[partial.digest] = error

    # ---- the steps

    def _verify_and_freeze(self, partial: Partial) -> None:
        actual = partial.actual_digest()
        if actual != partial.digest:
            raise ChecksumError(
                f"blob {partial.digest.short}… failed verification (got {actual.short}…, {partial.size:,} bytes)",
                expected=str(partial.digest),
                actual=str(actual),
            )
        partial.mark(TableState.COMMITTING)
        os.fchmod(partial.fd, 0o444)
        os.utime(partial.fd, (partial.digest.mtime, partial.digest.mtime))

    def _sync(self, partial: Partial) -> None:
        os.fsync(partial.fd)

    def _publish(self, partial: Partial) -> None:
        target = self._store.layout.blob(partial.digest)
        mine = os.fstat(partial.fd).st_ino
        while True:
            if not partial.owns_path:
                look = self._store.stat(partial.digest, partial.size)
                if look.ino == mine or look.state is BlobState.INTACT:
                    break  # another published it
                what = f"another process began {partial.digest.short} anew while its lock was held here"
                raise LockTimeoutError(what, hint="run it again; this file system may not keep locks")
            try:
                os.link(partial.path, target, follow_symlinks=False)
            except FileExistsError:
                look = self._store.stat(partial.digest, partial.size)
                gives_way = partial.digest in self._replace or look.state is not BlobState.INTACT
                if gives_way and look.ino != mine:
                    # Damaged, to be replaced, or swept since link(2) refused.
                    if self._replaced(partial, target):
                        break
                    continue
            break
        if partial.owns_path:
            os.unlink(partial.path)

    def _replaced(self, partial: Partial, target: str) -> bool:
        """Put the new inode where a damaged one stands, in one step: others link this blob at any moment. False where
        what stood there was no file and was moved away, or is gone."""
        try:
            os.link(target, self._store.name_in_quarantine(partial.digest), follow_symlinks=False)
        except OSError:  # a folder, a file system that links no further, or nothing any more
            self._store.quarantine_blob(partial.digest)
            return False
        os.rename(partial.path, target)
        return True

    def _sync_folder(self, partial: Partial) -> None:
        folder = os.path.dirname(self._store.layout.blob(partial.digest))
        if folder not in self._synced:
            try:
                fsync_folder(folder)
                self._synced[folder] = None
            except OSError as error:  # to be believed: another try would hide it
                self._synced[folder] = error
        if (failure := self._synced[folder]) is not None:
            raise failure

    def _finalize(self, partial: Partial) -> None:
        if partial.size > TABLE_FROM:
            partial.mark(TableState.PROVEN)
            os.chmod(partial.table_path, 0o444)
            os.replace(partial.table_path, self._store.layout.table(partial.digest))
        self._store.clear_suspect(partial.digest)
        partial.close()
