"""Chunking: the division of a blob into pieces of one size."""

from __future__ import annotations

from dataclasses import dataclass

MIN_PIECE_BYTES, MAX_PIECE_BYTES = 64 << 10, 1 << 30


@dataclass(frozen=True, slots=True)
class Chunking:
    """Pieces of ``piece_bytes`` bytes; the last of a blob may be shorter, none is empty.

    Files name the chunking that they were made with (piece tables, compressed blobs), so readers take it from there.
    ``piece_bytes`` is a power of two from 64 KiB to 1 GiB. Raises ValueError for any other.
    """

    piece_bytes: int

    def __post_init__(self) -> None:
        power_of_two = self.piece_bytes & (self.piece_bytes - 1) == 0
        if not (MIN_PIECE_BYTES <= self.piece_bytes <= MAX_PIECE_BYTES and power_of_two):
            raise ValueError(f"a piece of {self.piece_bytes:,} bytes is not a power of two from 64 KiB to 1 GiB")

    def count(self, size: int) -> int:
        """Number of pieces in a blob of *size* bytes; 0 for the empty one."""
        return -(-size // self.piece_bytes)

    def range(self, index: int, size: int) -> tuple[int, int]:
        """First byte and end of piece *index* in a blob of *size* bytes."""
        start = index * self.piece_bytes
        return start, min(start + self.piece_bytes, size)

    def index_at(self, offset: int) -> int:
        """Index of the piece that contains the byte at *offset*."""
        return offset // self.piece_bytes


MAX_FETCHED_PIECE_BYTES = 64 << 20
"""The largest pieces by which a fetch works, but for those of its own journal: a table of larger ones is ignored.

A piece is what each connection loses at a kill, what one wrong bit costs, and what comes before a wrong one is noticed.
"""

DEFAULT = Chunking(8 << 20)
"""The chunking of new tables: a bit flip costs one request of 8 MiB, and 40 GB have a table of 160 KB."""
