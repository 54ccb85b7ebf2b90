"""A blob's pieces as independent zstd frames: what a compressed mirror holds, so that a transfer stays ranged and parallel.

The file is one skippable frame with the index, then one frame a piece; `zstd -d` reads it as it is. The index comes first,
so that one ranged request gets it: its length follows from the blob's size. Nothing here is trusted: a frame must declare
the size of its piece and hold no more, and the blob's sha256 decides in the end.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import xxhash
import zstandard

from .digest import Digest
from .pieces import PIECE, piece_count, piece_range

LEVEL = 1  # higher ones gain a percent or two on weights, at a tenth of the speed
_SKIPPABLE = 0x184D2A50
_FRAME = struct.Struct("<II")  # magic, bytes that follow
_HEAD = struct.Struct("<8sIQ32s")  # magic, piece bytes, blob bytes, sha256
_MAGIC = b"MSTOWPZ1"
_MOST_WINDOW = 16 << 20
_MOST_FRAME = PIECE + (1 << 16)  # what does not compress grows by little


def index_bytes(size: int) -> int:
    """Bytes of the index of a blob of *size* bytes: where the first frame begins."""
    return _FRAME.size + _HEAD.size + 4 * piece_count(size) + 8


@dataclass(frozen=True, slots=True)
class CompressedIndex:
    """Where the frames of a blob's pieces are; ``ends[i]`` is the end of piece i's frame in the file."""

    digest: Digest
    size: int  # bytes of the blob
    ends: tuple[int, ...]

    @classmethod
    def of(cls, digest: Digest, size: int, lengths: Iterable[int]) -> CompressedIndex:
        """From the length of each frame in order."""
        return cls(digest, size, tuple(accumulate(lengths, initial=index_bytes(size)))[1:])

    def frame(self, piece: int) -> tuple[int, int]:
        """First byte and end of a piece's frame."""
        return self.ends[piece - 1] if piece else index_bytes(self.size), self.ends[piece]

    @property
    def total(self) -> int:
        """Bytes of the whole file."""
        return self.ends[-1] if self.ends else index_bytes(self.size)

    def encode(self) -> bytes:
        lengths = [end - start for start, end in map(self.frame, range(len(self.ends)))]
        body = _HEAD.pack(_MAGIC, PIECE, self.size, bytes.fromhex(self.digest.hex))
        body += struct.pack(f"<{len(lengths)}I", *lengths)
        body += xxhash.xxh3_64_digest(body)
        return _FRAME.pack(_SKIPPABLE, len(body)) + body

    @classmethod
    def decode(cls, raw: bytes, digest: Digest, size: int) -> CompressedIndex:
        """Read an index of exactly ``index_bytes(size)`` bytes. Raises ValueError for any but this blob's."""
        head = raw[_FRAME.size : -8]
        if len(raw) != index_bytes(size) or xxhash.xxh3_64_digest(head) != raw[-8:]:
            raise ValueError("the index is damaged")
        if _FRAME.unpack_from(raw) != (_SKIPPABLE, len(raw) - _FRAME.size):
            raise ValueError("it does not begin with an index")
        if _HEAD.unpack_from(head) != (_MAGIC, PIECE, size, bytes.fromhex(digest.hex)):
            raise ValueError("the index is another blob's")
        lengths = struct.unpack_from(f"<{piece_count(size)}I", head, _HEAD.size)
        if any(not 0 < length <= _MOST_FRAME for length in lengths):
            raise ValueError("the index names a frame of an impossible length")
        return cls.of(digest, size, lengths)


def compress(piece: bytes | memoryview) -> bytes:
    """One piece as a frame that declares its size and checks itself. The same bytes for the same piece and library."""
    return zstandard.ZstdCompressor(level=LEVEL, write_checksum=True, write_content_size=True).compress(piece)


def decompress(frame: bytes | memoryview, piece: int, size: int) -> bytes:
    """The bytes of a piece of a blob of *size* bytes. Raises ValueError for a frame that is not exactly that."""
    start, stop = piece_range(piece, size)
    try:
        said = zstandard.get_frame_parameters(frame)
        if said.content_size != stop - start or said.window_size > _MOST_WINDOW:
            raise ValueError("a frame is not of its piece's size")
        # In one call, into a buffer of the size that was just checked: a stream would notice only at its end that a frame
        # holds more than it declares, and a few bytes can hold gigabytes. A cap given to the library would be ignored.
        data = zstandard.ZstdDecompressor(max_window_size=_MOST_WINDOW).decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"a frame cannot be read ({error})") from error
    if len(data) != stop - start:
        raise ValueError("a frame is not of its piece's size")
    return data
