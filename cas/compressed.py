"""Compressed blobs: each piece as an independent zstd frame, so that a compressed transfer stays ranged and parallel.

The file is a skippable frame with the index, followed by one frame for each piece; `zstd -d` reads it as it is. The index
comes first, and its length follows from the blob's size and the chunking, so one ranged request reads it. Nothing here is
trusted: a frame must declare the size of its piece and hold no more, and the sha256 of the blob decides.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import xxhash
import zstandard

from .chunking import DEFAULT, Chunking
from .digest import Digest

LEVEL = 1  # higher ones gain a percent or two on weights, at a tenth of the speed
_SKIPPABLE = 0x184D2A50
_FRAME = struct.Struct("<II")  # magic, bytes that follow
_HEAD = struct.Struct("<8sIQ32s")  # magic, piece bytes, blob bytes, sha256
_MAGIC = b"MSTOWPZ1"
_MAX_WINDOW = 16 << 20
_MAX_OVERHEAD = 1 << 16  # incompressible bytes grow by little
HEAD_BYTES = _FRAME.size + _HEAD.size
"""Bytes from the beginning that hold all of the index but its lengths; ``chunking_of`` reads them."""


def index_bytes(size: int, chunking: Chunking = DEFAULT) -> int:
    """Length of the index of a blob of *size* bytes: where the first frame begins."""
    return HEAD_BYTES + 4 * chunking.count(size) + 8


def chunking_of(head: bytes) -> Chunking:
    """The chunking that the first ``HEAD_BYTES`` bytes of a file name, before their check was read. Raises ValueError."""
    if len(head) < HEAD_BYTES:
        raise ValueError("the index is damaged")
    magic, piece_bytes, _size, _sha256 = _HEAD.unpack_from(head, _FRAME.size)
    if magic != _MAGIC:
        raise ValueError("it does not begin with an index")
    return Chunking(piece_bytes)


@dataclass(frozen=True, slots=True)
class CompressedIndex:
    """Positions of the frames in a compressed blob; ``ends[i]`` is the end of piece i's frame."""

    digest: Digest
    size: int  # bytes of the blob
    ends: tuple[int, ...]
    chunking: Chunking = DEFAULT

    @classmethod
    def of(cls, digest: Digest, size: int, lengths: Iterable[int], chunking: Chunking = DEFAULT) -> CompressedIndex:
        """The index of frames with these lengths, in order."""
        return cls(digest, size, tuple(accumulate(lengths, initial=index_bytes(size, chunking)))[1:], chunking)

    def frame(self, piece: int) -> tuple[int, int]:
        """First byte and end of a piece's frame."""
        return self.ends[piece - 1] if piece else index_bytes(self.size, self.chunking), self.ends[piece]

    @property
    def total(self) -> int:
        """Bytes of the whole file."""
        return self.ends[-1] if self.ends else index_bytes(self.size, self.chunking)

    def encode(self) -> bytes:
        """The beginning of the file, up to the first frame."""
        lengths = [end - start for start, end in map(self.frame, range(len(self.ends)))]
        body = _HEAD.pack(_MAGIC, self.chunking.piece_bytes, self.size, bytes.fromhex(self.digest.hex))
        body += struct.pack(f"<{len(lengths)}I", *lengths)
        body += xxhash.xxh3_64_digest(body)
        return _FRAME.pack(_SKIPPABLE, len(body)) + body

    @classmethod
    def decode(cls, raw: bytes, digest: Digest, size: int) -> CompressedIndex:
        """The index in *raw*, which holds it and nothing else. Raises ValueError unless it is intact and this blob's."""
        head = raw[_FRAME.size : -8]
        if len(raw) < index_bytes(0) or xxhash.xxh3_64_digest(head) != raw[-8:]:
            raise ValueError("the index is damaged")
        if _FRAME.unpack_from(raw) != (_SKIPPABLE, len(raw) - _FRAME.size):
            raise ValueError("it does not begin with an index")
        chunking = chunking_of(raw)
        if _HEAD.unpack_from(head) != (_MAGIC, chunking.piece_bytes, size, bytes.fromhex(digest.hex)):
            raise ValueError("the index is another blob's")
        if len(raw) != index_bytes(size, chunking):
            raise ValueError("the index is damaged")
        lengths = struct.unpack_from(f"<{chunking.count(size)}I", head, _HEAD.size)
        if any(not 0 < length <= chunking.piece_bytes + _MAX_OVERHEAD for length in lengths):
            raise ValueError("the index names a frame of an impossible length")
        return cls.of(digest, size, lengths, chunking)


def compress(piece: bytes | memoryview) -> bytes:
    """One piece as a frame with its size and a checksum. Deterministic for one version of the library."""
    return zstandard.ZstdCompressor(level=LEVEL, write_checksum=True, write_content_size=True).compress(piece)


def decompress(frame: bytes | memoryview, piece: int, size: int, chunking: Chunking = DEFAULT) -> bytes:
    """The bytes of a piece of a blob of *size* bytes. Raises ValueError for a frame that is not exactly that.

    Takes the memory of a piece: refuse a chunking from the network that is too coarse.
    """
    start, stop = chunking.range(piece, size)
    try:
        declared = zstandard.get_frame_parameters(frame)
        if declared.content_size != stop - start or declared.window_size > _MAX_WINDOW:
            raise ValueError("a frame is not of its piece's size")
        # In one call, into a buffer of the size that was just checked: a stream would notice only at its end that a frame
        # holds more than it declares, and a few bytes can hold gigabytes. A cap given to the library would be ignored.
        data = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"a frame cannot be read ({error})") from error
    if len(data) != stop - start:
        raise ValueError("a frame is not of its piece's size")
    return data
