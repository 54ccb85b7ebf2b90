"""Piece tables: hashes of a blob's pieces, for resuming, quick verification, and repair of only what is damaged.

A table is one file: a header of 128 bytes with its check, and a slot of 32 bytes for each piece, which holds the piece's
xxh3-128, its sender, flags, and a check of the slot. While a blob is unfinished its table is the journal of the partial:
a slot is written after its piece, and counts only if its check holds *and* the bytes on disk still hash to it. So no
fsync is needed until the commit; a wrong slot costs another fetch of its piece and never makes a wrong blob, since the
sha256 decides.

xxh3-128 guards against accidents, not against attackers, and is believed only for bytes that this store verified itself.
"""

from __future__ import annotations

import enum
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import xxhash

from .chunking import DEFAULT, Chunking
from .digest import Digest
from .durable import write_all
from .untrusted import open_regular

_MAGIC = b"MSTOWPT1"
_MAX_PIECES = 1 << 22  # a table of 128 MiB
# Magic, bytes in a piece, state, bytes in the blob, sha256; inode, mtime in ns and size of a foreign stamp, or zeros.
_HEADER = struct.Struct("<8sIIQ32sQqQ48x")
_HEADER_BYTES = 128 + 8  # header and its check
_SLOT = struct.Struct("<16sII")
_SLOT_BYTES = 32
_MAX_BYTES = _HEADER_BYTES + _SLOT_BYTES * _MAX_PIECES
_RACY_NS = 2_000_000_000  # the coarsest mtime of a file system that is in use: FAT's


class TableState(enum.IntEnum):
    """Stage of the blob that a table describes."""

    UNFINISHED = 0
    COMMITTING = 1  # its fsync may have failed in another process: never resumed
    PROVEN = 2  # written by a pass whose sha256 matched


def piece_hash(data: bytes | memoryview) -> bytes:
    """xxh3-128 of one piece, 16 bytes."""
    return xxhash.xxh3_128_digest(data)


class PieceHasher:
    """Incremental xxh3-128 of one piece, fed while its parts are still in the processor's cache."""

    def __init__(self) -> None:
        self._hasher = xxhash.xxh3_128()

    def update(self, data: memoryview) -> None:
        self._hasher.update(data)

    def digest(self) -> bytes:
        """16 bytes, equal to ``piece_hash`` of all parts together."""
        return self._hasher.digest()


def hash_piece_of(fd: int, start: int, stop: int, buffer: memoryview) -> bytes | None:
    """xxh3-128 of bytes ``[start, stop)`` of an open file; None if the file ends before *stop*. Raises OSError.

    Reads by the length of *buffer*: 1 MiB is still in the processor's cache when it is hashed, 8 MiB are not.
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
    """Incremental table of bytes that arrive in order. Valid only if the same pass verifies their sha256."""

    def __init__(self, digest: Digest, size: int, chunking: Chunking = DEFAULT) -> None:
        self._table = PieceTable(digest, size, chunking=chunking)
        self._offset, self._hasher = 0, xxhash.xxh3_128()

    def update(self, data: memoryview) -> None:
        table, piece_bytes = self._table, self._table.chunking.piece_bytes
        while data:
            room = piece_bytes - self._offset % piece_bytes
            self._hasher.update(data[:room])
            self._offset += min(room, len(data))
            data = data[room:]
            if self._offset % piece_bytes == 0 or self._offset == table.size:
                table.slots[table.chunking.index_at(self._offset - 1)] = Slot(self._hasher.digest())
                self._hasher = xxhash.xxh3_128()

    def proven(self) -> PieceTable:
        """The table, once the sha256 of the whole was found to be the digest."""
        self._table.state = TableState.PROVEN
        return self._table

    def build(self, digest: Digest) -> PieceTable:
        """The table of bytes whose digest was unknown until the last of them was read."""
        self._table.digest = digest
        return self._table


def source_key(name: str) -> int:
    """32-bit key of a source, as kept in a slot; never 0, which stands for none."""
    return xxhash.xxh3_64_intdigest(name.encode()) & 0xFFFFFFFF or 1


@dataclass(frozen=True, slots=True)
class Slot:
    """One finished piece."""

    hash: bytes  # xxh3-128, 16 bytes
    source: int = 0  # source_key of its sender


@dataclass(frozen=True, slots=True)
class ForeignStamp:
    """Integrity stamp of a blob that does not carry its digest mtime: what stat shows while nothing has written to it.

    Like the digest mtime it can be forged, so it is no proof.
    """

    ino: int
    mtime_ns: int
    size: int  # bytes

    @classmethod
    def of(cls, found: os.stat_result) -> ForeignStamp:
        """What stat shows, for comparison with a recorded stamp."""
        return cls(found.st_ino, found.st_mtime_ns, found.st_size)

    @classmethod
    def take(cls, found: os.stat_result) -> ForeignStamp | None:
        """The stamp to record for a file whose content is about to be verified; take it before the first read.

        None if the file was modified within the last two seconds (by this clock): a later write may leave the same mtime.
        """
        return None if abs(time.time_ns() - found.st_mtime_ns) < _RACY_NS else cls.of(found)


@dataclass(slots=True)
class PieceTable:
    """A piece table in memory. ``slots[i]`` is None where piece i is not finished."""

    digest: Digest
    size: int  # bytes in the blob
    slots: list[Slot | None] = field(default_factory=list)
    state: TableState = TableState.UNFINISHED
    chunking: Chunking = DEFAULT
    stamp: ForeignStamp | None = None

    def __post_init__(self) -> None:
        if not self.slots:
            self.slots = [None] * self.chunking.count(self.size)

    @property
    def complete(self) -> bool:
        return all(slot is not None for slot in self.slots)

    @property
    def held_bytes(self) -> int:
        """Bytes in finished pieces."""
        ranges = (self.range(index) for index, slot in enumerate(self.slots) if slot is not None)
        return sum(stop - start for start, stop in ranges)

    def range(self, index: int) -> tuple[int, int]:
        """First byte and end of a piece."""
        return self.chunking.range(index, self.size)

    def missing(self) -> Iterator[int]:
        """Indexes of the pieces that are not finished, in order."""
        return (index for index, slot in enumerate(self.slots) if slot is None)

    def header(self) -> bytes:
        """The encoded header with its check."""
        stamp = (self.stamp.ino, self.stamp.mtime_ns, self.stamp.size) if self.stamp else (0, 0, 0)
        sha256 = bytes.fromhex(self.digest.hex)
        raw = _HEADER.pack(_MAGIC, self.chunking.piece_bytes, self.state, self.size, sha256, *stamp)
        return raw + xxhash.xxh3_64_digest(raw)

    def packed(self, index: int) -> bytes:
        """The encoded slot of a piece; zeros if it is not finished."""
        slot = self.slots[index]
        if slot is None:
            return b"\0" * _SLOT_BYTES
        raw = _SLOT.pack(slot.hash, slot.source, 1)
        return raw + _slot_check(raw, index, self.digest)

    def encode(self) -> bytes:
        """The whole file."""
        return self.header() + b"".join(self.packed(index) for index in range(len(self.slots)))

    def write_slot(self, fd: int, index: int) -> None:
        """Journal one slot in place; call only after the piece's bytes were written. Not synced. Raises OSError."""
        write_all(fd, self.packed(index), _HEADER_BYTES + index * _SLOT_BYTES)

    def write_header(self, fd: int) -> None:
        """Write the header in place. Not synced. Raises OSError."""
        write_all(fd, self.header(), 0)

    @classmethod
    def decode(cls, raw: bytes, digest: Digest) -> PieceTable | None:
        """The table of *digest* in *raw*; None unless its header is intact and for that blob.

        A slot whose check is wrong (torn, zeros, copied from another table) is a piece that is not finished.
        """
        table = cls._decode_header(raw, digest)
        for index in range(len(table.slots) if table is not None else 0):
            assert table is not None
            at = _HEADER_BYTES + index * _SLOT_BYTES
            packed = raw[at : at + _SLOT_BYTES]
            if len(packed) == _SLOT_BYTES and packed[24:] == _slot_check(packed[:24], index, digest):
                hash_, source, _flags = _SLOT.unpack(packed[:24])
                table.slots[index] = Slot(hash_, source)
        return table

    @classmethod
    def _decode_header(cls, raw: bytes, digest: Digest) -> PieceTable | None:
        if len(raw) < _HEADER_BYTES:
            return None
        head, check = raw[: _HEADER.size], raw[_HEADER.size : _HEADER_BYTES]
        magic, piece_bytes, state, size, sha256, *stamp = _HEADER.unpack(head)
        if xxhash.xxh3_64_digest(head) != check or magic != _MAGIC or sha256.hex() != digest.hex:
            return None
        try:
            chunking, state = Chunking(piece_bytes), TableState(state)
        except ValueError:
            return None
        if chunking.count(size) > _MAX_PIECES:
            return None  # before a forged size is believed and a slot made for each of its pieces
        return cls(digest, size, state=state, chunking=chunking, stamp=ForeignStamp(*stamp) if any(stamp) else None)


def read_table(path: str, digest: Digest) -> PieceTable | None:
    """The table of *digest* at *path*; None if there is none, or none that can be read."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            raw = file.read(_MAX_BYTES + 1)  # whatever is at its name does not fill the memory
    except OSError:
        return None
    return PieceTable.decode(raw, digest) if len(raw) <= _MAX_BYTES else None


def proven_table(path: str, digest: Digest, size: int) -> PieceTable | None:
    """The table of a committed blob of *size* bytes; None unless it is proven and complete."""
    table = read_table(path, digest)
    if table is None or table.state is not TableState.PROVEN or table.size != size or not table.complete:
        return None
    return table


def _slot_check(raw: bytes, index: int, digest: Digest) -> bytes:
    # The index and the digest are in the check, so that a slot copied from elsewhere is not believed.
    return xxhash.xxh3_64_digest(raw + index.to_bytes(8, "little") + digest.hex.encode())
