"""Ingest: every way into a store, from bytes to a committed blob.

* ``open`` and ``commit``: bytes whose digest is known before they arrive; a ``Partial`` is written and committed.
* ``copy``: an open file that should be a certain blob.
* ``incoming`` and ``take``: bytes whose digest is known only after the last of them was read.
* ``add_bytes``: bytes in memory.
* ``add_small``: many small files, without lock, partial or journal, and with two syncs for a group of them.

Each verifies that the sha256 of the bytes is the blob's name, and makes the bytes durable before they have it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress

from . import locks, presence
from .blobs import Blobs, BlobState
from .buffers import STEP, aligned_buffer
from .chunking import DEFAULT, Chunking
from .commit import Commit, wrong_content
from .digest import EMPTY, Digest
from .durable import Syncer, write_all
from .errors import ChecksumError
from .layout import TABLE_FROM, Layout
from .partial import NEW, Partial, free_path, read_fully, take_up
from .pieces import PieceHasher, PieceTable, piece_hash

SMALL = TABLE_FROM
"""Most bytes of a small file: it has no piece table, and reading it again costs less than a journal."""
_GROUP, _GROUP_BYTES = 250, 32 << 20  # most files and bytes that are synced together

LockBlob = Callable[[Digest, str], AbstractContextManager[object]]
"""Acquires a blob's lock; the text is what for, as its holder note shows it."""


class Ingest:
    """The writer of a store's blobs. *lock* is for methods that acquire a blob's lock themselves. Safe for threads."""

    def __init__(self, layout: Layout, blobs: Blobs, lock: LockBlob) -> None:
        self._layout, self._blobs, self._lock = layout, blobs, lock

    # ---- the digest is known

    def open(self, digest: Digest, size: int, *, chunking: Chunking | None = DEFAULT) -> Partial:
        """The partial of a blob, with the pieces that an earlier run left. Hold the blob's lock. Raises OSError.

        A partial of another *chunking* is replaced by an empty one; None takes what is there, or ``DEFAULT``.
        """
        return Partial(self._layout, digest, size, chunking)

    def commit(self, partial: Partial, *, replace: bool = False) -> None:
        """Make a partial a blob, if its sha256 is its name. Durable on return. Hold the blob's lock, and join every writer.

        An intact blob of that name is kept, unless *replace* is set; a damaged one, or with *replace* any, is moved to
        quarantine first. Raises ChecksumError, which leaves the partial as it is, for the caller to judge its pieces;
        LockTimeoutError, OSError, which discard it: what could not be synced is never trusted again.
        """
        for error in self.commit_all([partial], replace=[partial.digest] if replace else ()).values():
            raise error

    def commit_all(self, partials: Sequence[Partial], *, replace: Container[Digest] = ()) -> dict[Digest, Exception]:
        """Commit several partials with the syncs of one. Errors by digest of those that failed; the others are durable.

        *replace*: digests whose blobs are replaced even if intact. Otherwise as ``commit``.
        """
        return Commit(self._layout, self._blobs, replace=replace).run(partials)

    def copy(self, source_fd: int, digest: Digest, size: int) -> None:
        """Commit a copy of an open file that should be this blob. Hold the blob's lock. Durable on return.

        Only pieces that the partial lacks are read. Raises ChecksumError if the file is another (pieces of earlier runs
        are kept), OSError.
        """
        partial = self.open(digest, size, chunking=None)
        copied = list(partial.table.missing())
        try:
            buffer = aligned_buffer(min(STEP, size))
            for index in copied:
                _copy_piece(source_fd, partial, index, buffer)
            self.commit(partial)
        except ChecksumError:
            partial.invalidate(copied)
            raise
        finally:
            partial.close_or_discard()

    def add_bytes(self, data: bytes) -> Digest:
        """Commit bytes in memory and return their digest. Durable on return. Acquires the blob's lock.

        Raises OSError, LockTimeoutError.
        """
        digest = Digest.of(data)
        if not data:
            return digest
        with self._lock(digest, "adding"):
            if self._blobs.stat(digest, len(data)).state is not BlobState.INTACT:
                partial = self.open(digest, len(data), chunking=None)
                try:
                    partial.write(0, data)
                    view = memoryview(data)
                    for index in range(len(partial.table.slots)):
                        start, stop = partial.table.range(index)
                        partial.finish(index, piece_hash(view[start:stop]))
                    self.commit(partial)
                finally:
                    partial.close_or_discard()
        return digest

    # ---- the digest is known after the last byte

    def incoming(self, key: str = "") -> Incoming:
        """A file for bytes of unknown digest. A later run with the same *key* resumes it; without a key it is temporary."""
        return Incoming(self._layout, key)

    def take(self, incoming: Incoming, table: PieceTable) -> None:
        """Commit an incoming file; one over 1 MiB is renamed, not copied. Hold the blob's lock. Durable on return.

        *table* is that of ``scrub.hash_file``. Raises ChecksumError if the file changed since, OSError.
        """
        digest, size = table.digest, table.size
        if not size or self._blobs.stat(digest, size).state is BlobState.INTACT:
            incoming.done = True
            return
        if size <= TABLE_FROM:
            self.copy(incoming.fd, digest, size)
            incoming.done = True
            return
        path, journal = self._layout.partial(digest), self._layout.journal(digest)
        free_path(journal, self._layout.quarantine)
        with open(os.open(journal, NEW, 0o600), "wb") as file:
            file.write(table.encode())
        if presence.is_folder(path):
            free_path(path, self._layout.quarantine)
        os.rename(incoming.path, path)
        incoming.done = True
        partial = self.open(digest, size, chunking=table.chunking)
        try:
            self.commit(partial)
        finally:
            partial.close_or_discard()

    def add_small(self, contents: Iterable[bytes]) -> Iterator[Digest]:
        """Commit files of at most ``SMALL`` bytes each. Yields their digests in order; a blob is durable when yielded.

        They are synced in groups of up to 250. A kill leaves nothing behind if the file system has O_TMPFILE. Raises
        OSError, LockTimeoutError; blobs that were yielded before stay.
        """
        group: list[tuple[Digest, bytes]] = []
        held, most = 0, _most_open()
        for data in contents:
            group.append((Digest.of(data), data))
            held += len(data)
            if len(group) >= most or held >= _GROUP_BYTES:
                yield from self._commit_group(group)
                group, held = [], 0
        yield from self._commit_group(group)

    def commit_small(self, contents: Mapping[Digest, bytes]) -> dict[Digest, Exception]:
        """Commit files of at most ``SMALL`` bytes each as one group. Errors by digest; the others are durable.

        ChecksumError: the bytes are others, or something that is not intact has the blob's name. OSError: of the whole
        group; a blob may have its name then without being durable. Hold the blobs' locks if others may fetch the same.
        """
        failed: dict[Digest, Exception] = {}
        for digest, data in contents.items():
            if (actual := Digest.of(data)) != digest:
                failed[digest] = wrong_content(digest, actual, len(data))
        right = {digest: data for digest, data in contents.items() if digest not in failed}
        try:
            return failed | {digest: ChecksumError(f"blob {digest.short}… is damaged") for digest in self._publish(right)}
        except OSError as error:
            return failed | dict.fromkeys(right, error)

    def _commit_group(self, group: Sequence[tuple[Digest, bytes]]) -> list[Digest]:
        fresh = {
            digest: data
            for digest, data in dict(group).items()
            if digest != EMPTY and self._blobs.stat(digest, len(data)).state is not BlobState.INTACT
        }
        if fresh:
            damaged = self._publish(fresh)
            for digest in damaged:  # rare, and needs a lock, a partial and the quarantine
                self.add_bytes(fresh[digest])
        return [digest for digest, _ in group]

    def _publish(self, fresh: dict[Digest, bytes]) -> list[Digest]:
        """Write, sync and link new blobs. The digests whose names are taken by something that is not intact."""
        damaged: list[Digest] = []
        with ExitStack() as stack, Syncer(str(self._layout.blobs), len(fresh)) as syncer:
            files = {digest: stack.enter_context(_TempFile(self._layout)) for digest in fresh}
            for digest, file in files.items():
                write_all(file.fd, fresh[digest], 0)
                if os.pread(file.fd, len(fresh[digest]) + 1, 0) != fresh[digest]:
                    raise OSError(errno.EIO, "the file system did not keep what was written", str(self._layout.partials))
                os.fchmod(file.fd, 0o444)
                os.utime(file.fd, (digest.mtime, digest.mtime))
            for file in files.values():
                syncer.sync_file(file.fd)
            for digest, file in files.items():
                try:
                    file.link(self._layout.blob(digest))
                except FileExistsError:
                    if self._blobs.stat(digest, len(fresh[digest])).state is not BlobState.INTACT:
                        damaged.append(digest)
            for digest in files:
                syncer.sync_folder(os.path.dirname(self._layout.blob(digest)))
        self._blobs.clear_suspects(fresh.keys() - set(damaged))
        return damaged


def _most_open() -> int:
    """The most files in a group: each is open until it is synced, and other threads need descriptors too."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _GROUP if soft == resource.RLIM_INFINITY else max(1, min(_GROUP, (soft - 24) // 2))


def _copy_piece(source_fd: int, partial: Partial, index: int, buffer: memoryview) -> None:
    """Copy one piece through *buffer*. Raises ChecksumError where the source ends before it, OSError."""
    hasher, (start, stop) = PieceHasher(), partial.table.range(index)
    while start < stop:
        view = buffer[: stop - start]
        if not read_fully(source_fd, view, start):
            raise ChecksumError(f"the file ended early while it was copied as {partial.digest.short}…")
        partial.write(start, view)
        hasher.update(view)
        start += len(view)
    partial.finish(index, hasher.digest())


class _TempFile:
    """A temporary file in ``partial/``, without a name (O_TMPFILE) where possible, so that a kill leaves nothing behind."""

    def __init__(self, layout: Layout) -> None:
        self._folder = str(layout.partials)

    def __enter__(self) -> _TempFile:
        self._path, flags = "", os.O_RDWR | os.O_CLOEXEC
        if hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd"):
            with suppress(OSError):
                self.fd = os.open(self._folder, flags | os.O_TMPFILE, 0o600)
                return self
        self._path = f"{self._folder}/incoming-{secrets.token_hex(16)}"
        self.fd = os.open(self._path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        return self

    def link(self, target: str) -> None:
        """Link it as *target*. Raises FileExistsError, OSError."""
        if self._path:
            os.link(self._path, target, follow_symlinks=False)
        else:
            # An absolute path leaves the descriptor unused; with one, CPython calls linkat(2) with AT_SYMLINK_FOLLOW.
            os.link(f"/proc/self/fd/{self.fd}", target, src_dir_fd=self.fd, follow_symlinks=True)

    def __exit__(self, *error: object) -> None:
        os.close(self.fd)
        if self._path:
            os.unlink(self._path)


class Incoming:
    """A file for bytes whose digest is not known yet; a context manager, which holds a lock on the file.

    With a key the file stays for a later run unless ``done`` is set; its ``path`` and ``fd`` are valid inside the block.
    """

    def __init__(self, layout: Layout, key: str) -> None:
        self._folder, self._resumes = layout.partials, bool(key)
        name = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:32] if key else secrets.token_hex(16)
        self.path = f"{self._folder}/incoming-{name}"
        self.fd, self.done = -1, False

    def __enter__(self) -> Incoming:
        self.fd = self._open()
        if not locks.try_lock(self.fd, shared=False):  # another process reads the same source: the work is done twice
            os.close(self.fd)
            self._resumes, self.path = False, f"{self._folder}/incoming-{secrets.token_hex(16)}"
            self.fd = self._open()
            locks.try_lock(self.fd, shared=False)
        return self

    def _open(self) -> int:
        """The file of an earlier run, or an empty one. Its name can be guessed, so nothing is believed for it."""
        fd = take_up(self.path)
        if fd is not None:
            return fd
        try:
            return os.open(self.path, NEW, 0o600)
        except FileExistsError:  # another user's, who may be at work, or no file at all
            self._resumes, self.path = False, f"{self._folder}/incoming-{secrets.token_hex(16)}"
            return os.open(self.path, NEW, 0o600)

    @property
    def held(self) -> int:
        """Bytes in the file, those of an earlier run included."""
        return os.fstat(self.fd).st_size

    def __exit__(self, *error: object) -> None:
        if self.done or not self._resumes or not self.held:
            with suppress(FileNotFoundError):
                # The inode may be a blob by now, and the path another file.
                if os.path.samestat(os.lstat(self.path), os.fstat(self.fd)):
                    os.unlink(self.path)
        os.close(self.fd)
