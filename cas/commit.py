"""How partials become blobs: proven, synced, published. Several at once wait for the disk together."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Sequence
from contextlib import suppress

from .blobs import Blobs, BlobState
from .digest import Digest
from .durable import Syncer
from .errors import Cause, ChecksumError, LockTimeoutError
from .layout import TABLE_FROM, Layout
from .partial import Partial
from .pieces import TableState


class Commit:
    """Of one or more partials: each step is taken by all of them before the next. See ``BlobStore.commit_all``.

    A journal is committed for many files at the cost of one: where the first sync has done so, the others find their
    work done.
    """

    def __init__(self, layout: Layout, blobs: Blobs, *, replace: Container[Digest]) -> None:
        self._layout, self._blobs, self._replace = layout, blobs, replace
        self._failed: dict[Digest, Exception] = {}

    def run(self, partials: Sequence[Partial]) -> dict[Digest, Exception]:
        """Why some failed. Those are discarded, but for one that is not its name; and one whose folder could not be synced
        keeps its name without a table: a power cut may take it, which costs a fetch."""
        with Syncer(str(self._layout.blobs), len(partials)) as self._syncer:
            for step in self._verify_and_freeze, self._sync, self._publish, self._sync_folder, self._finalize:
                for partial in partials:
                    if partial.digest not in self._failed:
                        self._run_step(step, partial)
        self._blobs.clear_suspects(partial.digest for partial in partials if partial.digest not in self._failed)
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
        self._syncer.sync_file(partial.fd)

    def _publish(self, partial: Partial) -> None:
        target = self._layout.blob(partial.digest)
        mine = os.fstat(partial.fd).st_ino
        while True:
            if not partial.owns_path:
                look = self._blobs.stat(partial.digest, partial.size)
                if look.ino == mine or look.state is BlobState.INTACT:
                    break  # another published it
                what = f"another process started {partial.digest.short} again while its lock was held here"
                raise LockTimeoutError(what, cause=Cause.LOCK_LOST)
            try:
                os.link(partial.path, target, follow_symlinks=False)
            except FileExistsError:
                look = self._blobs.stat(partial.digest, partial.size)
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
            os.link(target, self._blobs.name_in_quarantine(partial.digest), follow_symlinks=False)
        except OSError:  # a folder, a file system that links no further, or nothing any more
            self._blobs.quarantine(partial.digest)
            return False
        os.rename(partial.path, target)
        return True

    def _sync_folder(self, partial: Partial) -> None:
        self._syncer.sync_folder(os.path.dirname(self._layout.blob(partial.digest)))

    def _finalize(self, partial: Partial) -> None:
        if partial.size > TABLE_FROM:
            partial.mark(TableState.PROVEN)
            os.chmod(partial.table_path, 0o444)
            os.replace(partial.table_path, self._layout.table(partial.digest))
        partial.close()
