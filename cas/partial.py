"""Partials: unfinished blobs, each a sparse file and the journal of its finished pieces. They survive kill -9."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import threading
from pathlib import Path

from . import presence, syscalls
from .buffers import STEP, aligned_buffer
from .chunking import DEFAULT, Chunking
from .digest import Digest
from .durable import write_all
from .layout import TABLE_FROM, Layout
from .pieces import PieceTable, Slot, TableState, hash_piece_of, read_table
from .untrusted import open_regular

NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
"""How a file in ``partial/`` is made: never through what has its name."""


class Partial:
    """An unfinished blob. Hold the blob's lock while it is open.

    ``write`` and ``finish`` may be called from several threads for different pieces, ``hash_to`` from one at a time. A
    piece is recorded when ``finish`` returns: after a kill it is kept if its bytes still hash to its slot. Nothing is
    durable before ``Ingest.commit``.
    """

    def __init__(self, layout: Layout, digest: Digest, size: int, chunking: Chunking | None = DEFAULT) -> None:
        """Resume the partial of an earlier run with the pieces that are still right, or start an empty one.

        One of another *chunking* is not resumed; None resumes any, and starts with ``DEFAULT``. Raises OSError.
        """
        self.digest, self.size = digest, size
        self.path = layout.partial(digest)
        self.table_path = layout.journal(digest)
        self._quarantine = layout.quarantine
        self._journaled = size > TABLE_FROM
        self._mutex = threading.Lock()
        self._hasher, self._hashed = hashlib.sha256(), 0
        self._buffer: memoryview | None = None
        resumed = self._resume(chunking) if self._journaled else None
        self._table_fd = -1
        self.fd, self.table = resumed or self._start(chunking or DEFAULT)
        try:
            os.ftruncate(self.fd, size)
            if self._journaled:
                self._open_table()
        except BaseException:
            if resumed:
                self.close()
            else:
                self.discard()
            raise

    @property
    def chunking(self) -> Chunking:
        """The division into the pieces that ``finish`` and ``invalidate`` name."""
        return self.table.chunking

    @property
    def held_bytes(self) -> int:
        """Bytes in finished pieces."""
        return self.table.held_bytes

    @property
    def owns_path(self) -> bool:
        """Whether its path still names its file: where file locks are unreliable, another process may have replaced it."""
        try:
            return os.path.samestat(os.lstat(self.path), os.fstat(self.fd))
        except FileNotFoundError:
            return False

    @property
    def hashed_to(self) -> int:
        """Bytes from the start that the sha256 covers."""
        return self._hashed

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write bytes at *offset*. Not synced. Raises OSError (ENOSPC, EIO, …)."""
        write_all(self.fd, data, offset)

    def finish(self, index: int, hash_: bytes, source: int = 0) -> None:
        """Record a piece, all of whose bytes were written. *hash_* is their xxh3-128. Raises OSError."""
        with self._mutex:
            self.table.slots[index] = Slot(hash_, source)
            if self._journaled:
                self.table.write_slot(self._table_fd, index)
        start, stop = self.table.range(index)
        syscalls.start_writeback(self.fd, start, stop - start)

    def salvage(self, path: str, index: int, hash_: bytes, source: int = 0) -> bool:
        """Copy a piece from another file that may hold it, and record it if it has this hash; False if it has not.

        Raises OSError of this partial only.
        """
        start, stop = self.table.range(index)
        buffer = aligned_buffer(min(STEP, stop - start))
        try:
            fd = open_regular(path)
        except OSError:
            return False
        try:
            try:
                if hash_piece_of(fd, start, stop, buffer) != hash_:
                    return False
            except OSError:  # a bad sector, or the end of the file
                return False
            for at in range(start, stop, len(buffer)):
                view = buffer[: stop - at]
                if not read_fully(fd, view, at):
                    return False
                self.write(at, view)
        finally:
            os.close(fd)
        self.finish(index, hash_, source)
        return True

    def invalidate(self, indexes: list[int]) -> None:
        """Remove pieces from the record, to be fetched again; the sha256 restarts at 0. Raises OSError."""
        with self._mutex:
            for index in indexes:
                self.table.slots[index] = None
                if self._journaled:
                    self.table.write_slot(self._table_fd, index)
            self._hasher, self._hashed = hashlib.sha256(), 0

    def contiguous_end(self) -> int:
        """End of the finished pieces that follow each other from the start, in bytes."""
        for index in range(self.chunking.index_at(self._hashed), len(self.table.slots)):
            if self.table.slots[index] is None:
                return self.table.range(index)[0]
        return self.size

    def hash_to(self, stop: int) -> None:
        """Extend the sha256 to *stop*, reading from the file. Raises OSError, also if another process truncated it."""
        if self._buffer is None:
            self._buffer = aligned_buffer(min(STEP, self.size))
        buffer = self._buffer
        while self._hashed < stop:
            count = os.preadv(self.fd, [buffer[: stop - self._hashed]], self._hashed)
            if count == 0:
                raise OSError(errno.EIO, f"was truncated to {self._hashed:,} bytes while it was being written", self.path)
            self._hasher.update(buffer[:count])
            self._hashed += count

    def actual_digest(self) -> Digest:
        """The digest of its bytes. Join every writer first. Raises OSError."""
        self.hash_to(self.size)
        return Digest.of_hex(self._hasher.hexdigest())

    def mark(self, state: TableState) -> None:
        """Set the state in the journal. Not synced. Raises OSError."""
        self.table.state = state
        if self._journaled:
            self.table.write_header(self._table_fd)

    def close(self) -> None:
        """Close the files; what is recorded stays for the next run."""
        for fd in (self.fd, self._table_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self._table_fd = -1

    def discard(self) -> None:
        """Remove it from the disk, unless its path names another process's file by now. Raises OSError."""
        owned = self.fd < 0 or self.owns_path or not presence.exists(self.path)
        self.close()
        for path in (self.path, self.table_path) if owned else ():
            if presence.exists(path):
                os.unlink(path)

    def close_or_discard(self) -> None:
        """Keep it for the next run if it can be resumed, else remove it. Does nothing after a commit or ``discard``."""
        if self.fd >= 0 and self._journaled and self.held_bytes:
            self.close()
        elif self.fd >= 0:
            self.discard()

    def _start(self, chunking: Chunking) -> tuple[int, PieceTable]:
        for path in (self.path, self.table_path):
            free_path(path, self._quarantine)
        return os.open(self.path, NEW, 0o600), PieceTable(self.digest, self.size, chunking=chunking)

    def _resume(self, chunking: Chunking | None) -> tuple[int, PieceTable] | None:
        """The files of an earlier run, or None. Nothing is believed for its name: another user may have put a link, a
        pipe or a file there, and after a failed fsync a file of the right size may have lost its content."""
        table = read_table(self.table_path, self.digest)
        if table is None or table.size != self.size or table.state is not TableState.UNFINISHED:
            return None
        if chunking not in (None, table.chunking):
            return None
        fd = take_up(self.path)
        if fd is None:
            return None
        _drop_wrong_slots(fd, table)
        return fd, table

    def _open_table(self) -> None:
        fd = take_up(self.table_path)
        if fd is None:
            free_path(self.table_path, self._quarantine)
            fd = os.open(self.table_path, NEW, 0o600)
        self._table_fd = fd
        write_all(self._table_fd, self.table.encode(), 0)


def take_up(path: str) -> int | None:
    """Open for writing what an earlier run of this user left at *path*; None where anything else is, or nothing.

    With a second link it may already be a blob, or a file of the user's linked there.
    """
    try:
        fd = open_regular(path, os.O_RDWR)
    except OSError:
        return None
    found = os.fstat(fd)
    if found.st_nlink == 1 and found.st_uid == os.geteuid():
        return fd
    os.close(fd)
    return None


def free_path(path: str, quarantine: Path) -> None:
    """Free a path in ``partial/``. A folder there was not made by this package: it is moved, not deleted."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):
        os.rename(path, quarantine / f"{os.path.basename(path)}-{secrets.token_hex(4)}")


def _drop_wrong_slots(fd: int, table: PieceTable) -> None:
    """Drop each slot whose bytes on disk hash to something else: a power cut loses pages, not sizes."""
    buffer = aligned_buffer(min(STEP, table.size))
    for index, slot in enumerate(table.slots):
        if slot is None:
            continue
        try:
            right = hash_piece_of(fd, *table.range(index), buffer) == slot.hash
        except OSError:  # a bad sector costs its piece; writing the piece again may well heal it
            right = False
        if not right:
            table.slots[index] = None


def read_fully(fd: int, view: memoryview, offset: int) -> bool:
    """Fill *view* from *offset*; False at the end of the file. Raises OSError."""
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            return False
        done += count
    return True
