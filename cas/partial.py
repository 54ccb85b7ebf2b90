"""An unfinished blob: a sparse file and the journal of its finished pieces. Survives kill -9, belongs to the digest."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from pathlib import Path
from threading import Lock as Mutex

from . import syscalls
from .buffers import STEP, aligned_buffer
from .digest import Digest
from .durable import write_all
from .layout import TABLE_FROM, Layout
from .pieces import PIECE, PieceTable, Slot, TableState, open_regular, piece_hash, piece_range, read_table


class Partial:
    """The bytes of one blob while they arrive. Open it only under the blob's lock.

    Any number of threads may ``write`` and ``finish`` different pieces; one at a time may ``hash_to``. A piece is on
    record when ``finish`` returns: after a kill it is found again if its bytes still hash to its slot. Nothing is
    durable before ``BlobStore.commit``.
    """

    def __init__(self, layout: Layout, digest: Digest, size: int) -> None:
        """Adopt what an earlier run left, as far as it proves good, or begin anew. Raises OSError."""
        self.digest, self.size = digest, size
        self.path = layout.partial(digest)
        self.table_path = layout.journal(digest)
        self._quarantine = layout.quarantine
        self._journaled = size > TABLE_FROM
        self._mutex = Mutex()
        self._hasher, self._hashed = hashlib.sha256(), 0
        self._buffer: memoryview | None = None
        adopted = self._adopt() if self._journaled else None
        self._table_fd = -1
        if adopted is None:
            self._begin()
        else:
            self.fd, self.table = adopted
        try:
            os.ftruncate(self.fd, size)
            if self._journaled:
                self._open_table()
        except BaseException:
            self.close()
            raise

    @property
    def held_bytes(self) -> int:
        """Bytes in finished pieces."""
        return self.table.held_bytes

    @property
    def owns_path(self) -> bool:
        """Whether its name still is this file's: where locks lie, another may have begun anew."""
        try:
            return os.path.samestat(os.lstat(self.path), os.fstat(self.fd))
        except FileNotFoundError:
            return False

    @property
    def hashed_to(self) -> int:
        """How many bytes from the start the sha256 covers."""
        return self._hashed

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Put bytes at *offset*. Raises OSError (ENOSPC, EIO, …)."""
        write_all(self.fd, data, offset)

    def finish(self, index: int, hash_: bytes, source: int = 0) -> None:
        """Put a piece on record after all its bytes were written. *hash_* is their xxh3-128."""
        with self._mutex:
            self.table.slots[index] = Slot(hash_, source)
            if self._journaled:
                self.table.write_slot(self._table_fd, index)
        start, stop = piece_range(index, self.size)
        syscalls.start_writeback(self.fd, start, stop - start)

    def invalidate(self, indexes: list[int]) -> None:
        """Strike pieces off the record; they are to be fetched again, and the proof starts anew."""
        with self._mutex:
            for index in indexes:
                self.table.slots[index] = None
                if self._journaled:
                    self.table.write_slot(self._table_fd, index)
            self._hasher, self._hashed = hashlib.sha256(), 0

    def contiguous_end(self) -> int:
        """Bytes from the start that stand in finished pieces without a gap."""
        for index in range(self._hashed // PIECE, len(self.table.slots)):
            if self.table.slots[index] is None:
                return index * PIECE
        return self.size

    def hash_to(self, stop: int) -> None:
        """Extend the sha256 to *stop*, from the file itself. Raises OSError, also where somebody cut the file."""
        if self._buffer is None:
            self._buffer = aligned_buffer(min(STEP, self.size))
        buffer = self._buffer
        while self._hashed < stop:
            count = os.preadv(self.fd, [buffer[: stop - self._hashed]], self._hashed)
            if count == 0:
                raise OSError(errno.EIO, f"was cut at {self._hashed:,} bytes while it was being written", self.path)
            self._hasher.update(buffer[:count])
            self._hashed += count

    def actual_digest(self) -> Digest:
        """The digest of the bytes that are there. Every writer must have ended."""
        self.hash_to(self.size)
        return Digest.of_hex(self._hasher.hexdigest())

    def mark(self, state: TableState) -> None:
        """Note in the journal how far this partial is."""
        self.table.state = state
        if self._journaled:
            self.table.write_header(self._table_fd)

    def close(self) -> None:
        """Let go of the files; what is on record stays for the next run."""
        for fd in (self.fd, self._table_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self._table_fd = -1

    def discard(self) -> None:
        """Remove it from the disk, unless it is another's by now."""
        owned = self.fd < 0 or self.owns_path or not os.path.lexists(self.path)
        self.close()
        for path in (self.path, self.table_path) if owned else ():
            if os.path.lexists(path):
                os.unlink(path)

    def close_or_discard(self) -> None:
        """End a run: keep what can be resumed, remove the rest. Nothing is left to do after a commit or ``discard``."""
        if self.fd >= 0 and self._journaled and self.held_bytes:
            self.close()
        elif self.fd >= 0:
            self.discard()

    def _begin(self) -> None:
        for path in (self.path, self.table_path):
            _clear(path, self._quarantine)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self.fd = os.open(self.path, flags, 0o600)
        self.table = PieceTable(self.digest, self.size)

    def _adopt(self) -> tuple[int, PieceTable] | None:
        """Open an earlier run's files, or None. The name alone is worth nothing: anybody may have put a link, a pipe or a
        file of his own there, and what failed to sync before may be lost under a size that is right."""
        table = read_table(self.table_path, self.digest)
        if table is None or table.size != self.size or table.state is not TableState.UNFINISHED:
            return None
        try:
            fd = open_regular(self.path, os.O_RDWR)
        except OSError:
            return None
        found = os.fstat(fd)
        # With a second link this inode may already be a blob: opening it for writing would be fatal.
        if found.st_nlink != 1 or found.st_uid != os.geteuid():
            os.close(fd)
            return None
        _keep_what_hashes(fd, table)
        return fd, table

    def _open_table(self) -> None:
        self._table_fd = os.open(self.table_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        write_all(self._table_fd, self.table.encode(), 0)


def _clear(path: str, quarantine: Path) -> None:
    """Free a name of ours; a folder that somebody put there is not ours to delete."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):
        os.rename(path, quarantine / f"{os.path.basename(path)}-{secrets.token_hex(4)}")


def _keep_what_hashes(fd: int, table: PieceTable) -> None:
    """Strike off every slot whose bytes on disk are not those that were written (a power cut loses pages, not sizes)."""
    buffer = aligned_buffer(min(PIECE, table.size))
    for index, slot in enumerate(table.slots):
        if slot is None:
            continue
        start, stop = piece_range(index, table.size)
        view = buffer[: stop - start]
        try:
            holds = read_fully(fd, view, start) and piece_hash(view) == slot.hash
        except OSError:  # a bad sector costs its piece; to write it anew may well heal it
            holds = False
        if not holds:
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
