"""Commit: the steps that make partials blobs, taken by a group at the cost of one file's syncs."""

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
from .pieces import TableState, proven_table


def wrong_content(digest: Digest, actual: Digest, size: int) -> ChecksumError:
    """The error for bytes that are not the blob they should be."""
    return ChecksumError(
        f"blob {digest.short}… failed verification (got {actual.short}…, {size:,} bytes)",
        expected=str(digest),
        actual=str(actual),
    )


class Commit:
    """Commit of one or more partials. All of them take a step before the next begins. See ``Ingest.commit_all``.

    A file system that syncs as a whole is synced once for the content and once for the names of all.
    """

    def __init__(self, layout: Layout, blobs: Blobs, *, replace: Container[Digest]) -> None:
        self._layout, self._blobs, self._replace = layout, blobs, replace
        self._failed: dict[Digest, Exception] = {}
        self._kept: set[Digest] = set()  # blobs of another inode that were intact, and stay

    def run(self, partials: Sequence[Partial]) -> dict[Digest, Exception]:
        """Errors by digest of the partials that failed; the others are durable blobs. Hold the blobs' locks.

        A failed partial is discarded, except after a ChecksumError. One whose folder could not be synced keeps its name in
        ``blobs/`` without a table: a power cut may remove it, which costs a fetch.
        """
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
            with suppress(OSError):  # the next run removes it; the rest of the group is not affected
                partial.discard()
            if not isinstance(error, Exception):
                raise
            self._failed[partial.digest] = error

    # ---- the steps, in the order that survives a power cut

    def _verify_and_freeze(self, partial: Partial) -> None:
        actual = partial.actual_digest()
        if actual != partial.digest:
            raise wrong_content(partial.digest, actual, partial.size)
        partial.mark(TableState.COMMITTING)
        os.fchmod(partial.fd, 0o444)
        os.utime(partial.fd, (partial.digest.mtime, partial.digest.mtime))

    def _sync(self, partial: Partial) -> None:
        self._syncer.sync_file(partial.fd)

    def _publish(self, partial: Partial) -> None:
        target = self._layout.blob(partial.digest)
        ino = os.fstat(partial.fd).st_ino
        while True:
            if not partial.owns_path:
                status = self._blobs.stat(partial.digest, partial.size)
                if status.ino == ino or status.state is BlobState.INTACT:
                    break  # another process published it
                what = f"another process replaced the partial of {partial.digest.short} while its lock was held here"
                raise LockTimeoutError(what, cause=Cause.LOCK_LOST)
            try:
                os.link(partial.path, target, follow_symlinks=False)
            except FileExistsError:
                status = self._blobs.stat(partial.digest, partial.size)
                intact = status.state is BlobState.INTACT
                if status.ino != ino and (partial.digest in self._replace or not intact):
                    # Damaged, to be replaced, or swept since link(2) failed.
                    if self._replaced(partial, target):
                        break
                    continue
                if status.ino != ino:
                    self._kept.add(partial.digest)
            break
        if partial.owns_path:
            os.unlink(partial.path)

    def _replaced(self, partial: Partial, target: str) -> bool:
        """Replace a damaged blob in one step: other processes may link it at any moment. False, to try again, if what has
        the name was no regular file and was moved away, or is gone."""
        try:
            os.link(target, self._blobs.name_in_quarantine(partial.digest), follow_symlinks=False)
        except OSError:  # a folder, a file system that links no further, or nothing any more
            self._blobs.quarantine(partial.digest)
            return False
        if partial.size <= TABLE_FROM:  # the new one has none; a larger one's replaces it
            with suppress(FileNotFoundError):
                os.unlink(self._layout.table(partial.digest))
        os.rename(partial.path, target)
        return True

    def _sync_folder(self, partial: Partial) -> None:
        self._syncer.sync_folder(os.path.dirname(self._layout.blob(partial.digest)))

    def _finalize(self, partial: Partial) -> None:
        if partial.size > TABLE_FROM:
            table = self._layout.table(partial.digest)
            partial.mark(TableState.PROVEN)
            if partial.digest in self._kept and proven_table(table, partial.digest, partial.size) is not None:
                os.unlink(partial.table_path)  # the table of the blob that stays may hold its stamp
            else:
                os.chmod(partial.table_path, 0o444)
                os.replace(partial.table_path, table)
        partial.close()
