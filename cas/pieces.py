"""The piece table: what makes resume, quick verification and repair of the damaged part possible.

A blob's bytes are cut into pieces of 8 MiB (the last may be shorter). Its table is one file of a 128-byte header and a
32-byte slot a piece: xxh3-128 of the piece, who sent it, flags, a check over the slot. While a blob is unfinished the
table is its journal: a slot is written after its data, and counts only when its check holds *and* the bytes on disk
still hash to it. So no fsync is needed on the way; a lie costs a refetch, never a wrong blob, since sha256 decides.

xxh3-128 guards against accidents, not against people, and is believed only for bytes that this store proved itself.
"""

from __future__ import annotations

import enum
import errno
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import xxhash

from .digest import Digest
from .durable import write_all

PIECE = 8 << 20
"""Bytes in a piece."""

_MAGIC = b"MSTOWPT1"
_MOST_PIECES = 1 << 22  # 32 TiB in one file
# Magic, piece bytes, state, blob bytes, sha256; then inode, mtime in ns and size of an adopted file, 0 so far.
_HEADER = struct.Struct("<8sIIQ32sQqQ48x")
_HEADER_BYTES = 128 + 8  # header and its check
_SLOT = struct.Struct("<16sII")
_SLOT_BYTES = 32


class TableState(enum.IntEnum):
    """How far the bytes beside a table are."""

    UNFINISHED = 0
    COMMITTING = 1  # its fsync may have failed in another process: never adopted
    PROVEN = 2  # written by a pass whose sha256 matched


def piece_count(size: int) -> int:
    """How many pieces a blob of *size* bytes has; an empty one has none."""
    return -(-size // PIECE)


def piece_range(index: int, size: int) -> tuple[int, int]:
    """First byte and end of a piece within a blob of *size* bytes."""
    return index * PIECE, min((index + 1) * PIECE, size)


def piece_hash(data: bytes | memoryview) -> bytes:
    """xxh3-128 of one piece, 16 bytes."""
    return xxhash.xxh3_128_digest(data)


class PieceHasher:
    """xxh3-128 of a piece that comes in parts: fed while they are still in the processor's cache."""

    def __init__(self) -> None:
        self._hasher = xxhash.xxh3_128()

    def update(self, data: memoryview) -> None:
        self._hasher.update(data)

    def digest(self) -> bytes:
        """16 bytes, as ``piece_hash`` of the whole."""
        return self._hasher.digest()


def hash_piece_of(fd: int, start: int, stop: int, buffer: memoryview) -> bytes | None:
    """xxh3-128 of a part of an open file, read through *buffer*; None where the file ends before. Raises OSError.

    By steps of the buffer's size: 1 MiB is still in the processor's cache when it is hashed, 8 MiB are not.
    """
    hasher = xxhash.xxh3_128()
    while start < stop:
        count = os.preadv(fd, [buffer[: stop - start]], start)
        if count == 0:
            return None
        hasher.update(buffer[:count])
        start += count
    return hasher.digest()


class PieceTableBuilder:
    """Makes a table from bytes that stream past in order; good only if the same pass proves their sha256."""

    def __init__(self, digest: Digest, size: int) -> None:
        self._table, self._at, self._hasher = PieceTable(digest, size), 0, xxhash.xxh3_128()

    def update(self, data: memoryview) -> None:
        while data:
            room = PIECE - self._at % PIECE
            self._hasher.update(data[:room])
            self._at += min(room, len(data))
            data = data[room:]
            if self._at % PIECE == 0 or self._at == self._table.size:
                self._table.slots[(self._at - 1) // PIECE] = Slot(self._hasher.digest())
                self._hasher = xxhash.xxh3_128()

    def proven(self) -> PieceTable:
        """The table, after the whole was found to be its digest."""
        self._table.state = TableState.PROVEN
        return self._table

    def build(self, digest: Digest) -> PieceTable:
        """The table of a partial that was nameless until its last byte was read."""
        self._table.digest = digest
        return self._table


def source_key(name: str) -> int:
    """A 32-bit name for a source, as kept in a slot; 0 stands for none."""
    return xxhash.xxh3_64_intdigest(name.encode()) & 0xFFFFFFFF or 1


@dataclass(frozen=True, slots=True)
class Slot:
    """One finished piece."""

    hash: bytes  # xxh3-128, 16 bytes
    source: int = 0  # source_key of who sent it


@dataclass(slots=True)
class PieceTable:
    """A table in memory. ``slots[i]`` is None where piece i is not finished."""

    digest: Digest
    size: int  # bytes in the blob
    slots: list[Slot | None] = field(default_factory=list)
    state: TableState = TableState.UNFINISHED

    def __post_init__(self) -> None:
        if not self.slots:
            self.slots = [None] * piece_count(self.size)

    @property
    def complete(self) -> bool:
        return all(slot is not None for slot in self.slots)

    @property
    def held_bytes(self) -> int:
        """Bytes in finished pieces."""
        ranges = (piece_range(index, self.size) for index, slot in enumerate(self.slots) if slot is not None)
        return sum(stop - start for start, stop in ranges)

    def missing(self) -> Iterator[int]:
        return (index for index, slot in enumerate(self.slots) if slot is None)

    def header(self) -> bytes:
        raw = _HEADER.pack(_MAGIC, PIECE, self.state, self.size, bytes.fromhex(self.digest.hex), 0, 0, 0)
        return raw + xxhash.xxh3_64_digest(raw)

    def packed(self, index: int) -> bytes:
        slot = self.slots[index]
        if slot is None:
            return b"\0" * _SLOT_BYTES
        raw = _SLOT.pack(slot.hash, slot.source, 1)
        return raw + _slot_check(raw, index, self.digest)

    def encode(self) -> bytes:
        return self.header() + b"".join(self.packed(index) for index in range(len(self.slots)))

    def write_slot(self, fd: int, index: int) -> None:
        """Journal one slot; call only after the piece's bytes were written."""
        write_all(fd, self.packed(index), _HEADER_BYTES + index * _SLOT_BYTES)

    def write_header(self, fd: int) -> None:
        write_all(fd, self.header(), 0)

    @classmethod
    def decode(cls, raw: bytes, digest: Digest) -> PieceTable | None:
        """Read a table; None unless its header is whole and this blob's. Slots that do not check are not finished."""
        if len(raw) < _HEADER_BYTES:
            return None
        head, check = raw[: _HEADER.size], raw[_HEADER.size : _HEADER_BYTES]
        magic, piece, state, size, sha, *_adopted = _HEADER.unpack(head)
        if xxhash.xxh3_64_digest(head) != check or magic != _MAGIC or piece != PIECE or sha.hex() != digest.hex:
            return None
        if state not in TableState.__members__.values():
            return None
        if piece_count(size) > _MOST_PIECES:
            return None  # before a forged size is believed and a slot made for every piece of it
        table = cls(digest, size, state=TableState(state))
        for index in range(len(table.slots)):
            at = _HEADER_BYTES + index * _SLOT_BYTES
            packed = raw[at : at + _SLOT_BYTES]
            if len(packed) == _SLOT_BYTES and packed[24:] == _slot_check(packed[:24], index, digest):
                hash_, source, _flags = _SLOT.unpack(packed[:24])
                table.slots[index] = Slot(hash_, source)
        return table


def read_table(path: str, digest: Digest) -> PieceTable | None:
    """The table at *path*, or None where there is no readable one of this blob."""
    try:
        fd = open_regular(path)
    except OSError:
        return None
    with os.fdopen(fd, "rb") as file:
        return PieceTable.decode(file.read(), digest)


def open_regular(path: str, flags: int = os.O_RDONLY) -> int:
    """Open a file that should be one: no symlink, no folder, and no pipe to wait at. Raises OSError."""
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return fd


def proven_table(path: str, digest: Digest, size: int) -> PieceTable | None:
    """The table of a committed blob if it can be believed: proven, complete, of this size."""
    table = read_table(path, digest)
    if table is None or table.state is not TableState.PROVEN or table.size != size or not table.complete:
        return None
    return table


def _slot_check(raw: bytes, index: int, digest: Digest) -> bytes:
    # The index and the digest are in the check, so that a slot copied from elsewhere is not believed.
    return xxhash.xxh3_64_digest(raw + index.to_bytes(8, "little") + digest.hex.encode())
