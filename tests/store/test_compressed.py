"""Compressed pieces: what was packed comes back, any zstd reads the file, and crafted frames cost nothing (N14)."""

from __future__ import annotations

import io
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash
import zstandard
from builders import PIECE, piece_count, piece_range, some_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from modelstow.cas import Digest
from modelstow.cas.compressed import CompressedIndex, compress, decompress, index_bytes

SIZE = 2 * PIECE + 5
DATA = (some_bytes(1 << 16) * (SIZE // (1 << 16) + 1))[:SIZE]
DIGEST = Digest.of(DATA)
NOISE = some_bytes(2 * PIECE + 1, seed=1)
boundaries = st.sampled_from([1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE - 1, 2 * PIECE, 2 * PIECE + 1])


def packed(data: bytes, digest: Digest | None = None) -> tuple[CompressedIndex, bytes]:
    """The file of a blob, and its index."""
    frames = [compress(data[slice(*piece_range(piece, len(data)))]) for piece in range(piece_count(len(data)))]
    index = CompressedIndex.of(digest or Digest.of(data), len(data), map(len, frames))
    return index, index.encode() + b"".join(frames)


def resealed(raw: bytes, at: int, new: bytes) -> bytes:
    """An index with other bytes in its body, and a valid check of them, as a corrupt sender could send."""
    body = bytearray(raw[8:-8])
    body[at : at + len(new)] = new
    return raw[:8] + bytes(body) + xxhash.xxh3_64_digest(bytes(body))


# ---- round trips


@settings(max_examples=14)
@given(boundaries, st.booleans())
def test_what_was_packed_comes_back_piece_by_piece(size: int, compressible: bool):
    """At the boundaries of pieces too, and whether or not it became smaller."""
    data = b"weights!" * (size // 8) + b"x" * (size % 8) if compressible else NOISE[:size]
    index, file = packed(data)

    again = CompressedIndex.decode(file[: index_bytes(size)], index.digest, size)

    assert again == index and again.total == len(file)
    pieces = [decompress(file[slice(*again.frame(piece))], piece, size) for piece in range(piece_count(size))]
    assert b"".join(pieces) == data


def test_the_same_piece_becomes_the_same_frame():
    """So that a push that was interrupted finds what it sent."""
    assert compress(DATA[:PIECE]) == compress(memoryview(DATA)[:PIECE])


def test_a_blob_of_no_bytes_is_an_index_alone():
    """Nothing packs one; the file would be whole all the same."""
    index, file = packed(b"")

    assert len(file) == index_bytes(0) == index.total and CompressedIndex.decode(file, index.digest, 0) == index


def test_bytes_that_do_not_compress_grow_by_little():
    """Or the index of a right file would be refused for its lengths."""
    index, file = packed(NOISE)

    assert len(file) < len(NOISE) * 1.0001 and CompressedIndex.decode(
        file[: index_bytes(len(NOISE))], index.digest, len(NOISE)
    )


def test_plain_zstd_reads_the_file_as_it_is(tmp_path: Path):
    """A machine without modelstow has zstd."""
    path = tmp_path / "blob.pzst"
    path.write_bytes(packed(DATA)[1])

    if program := shutil.which("zstd"):
        with path.open("rb") as file:
            done = subprocess.run([program, "-d", "-c"], stdin=file, capture_output=True, check=True, timeout=60)
        plain = done.stdout
    else:
        reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(path.read_bytes()), read_across_frames=True)
        plain = reader.read()

    assert Digest.of(plain) == DIGEST


# ---- crafted frames


def rle(count: int, *, last: bool = False) -> bytes:
    """A block of zstd that encodes *count* zeros in four bytes."""
    return struct.pack("<I", count << 3 | 1 << 1 | last)[:3] + b"\0"


def frame_of(blocks: bytes, *, claims: int, window: int | None = None) -> bytes:
    """A frame that claims to hold *size* bytes; *window* is the base-2 logarithm of its window, if not the content's."""
    shape = struct.pack("B", 2 << 6) + struct.pack("B", (window - 10) << 3) if window else struct.pack("B", 2 << 6 | 1 << 5)
    return struct.pack("<I", zstandard.MAGIC_NUMBER) + shape + struct.pack("<I", claims) + blocks


ZEROS = rle(1 << 17) * (PIECE // (1 << 17) - 1)
RIGHT = frame_of(ZEROS + rle(1 << 17, last=True), claims=PIECE)
FRAME = compress(DATA[:PIECE])


def test_a_frame_made_by_hand_is_read():
    """Else the ones below would be refused for nothing."""
    assert decompress(RIGHT, 0, SIZE) == bytes(PIECE)
    assert decompress(frame_of(ZEROS + rle(1 << 17, last=True), claims=PIECE, window=20), 0, SIZE) == bytes(PIECE)


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (frame_of(ZEROS + rle(1 << 17, last=True), claims=PIECE, window=27), "size"),
        (frame_of(ZEROS + rle(1 << 17, last=True), claims=PIECE, window=31), "size"),
        (frame_of(ZEROS + rle(1 << 17, last=True), claims=PIECE - 1), "size"),
        (frame_of(ZEROS + rle(1 << 17, last=True), claims=2**32 - 1), "size"),
        (zstandard.ZstdCompressor(write_content_size=False).compress(DATA[:PIECE]), "size"),
        (frame_of(ZEROS + rle(1, last=True), claims=PIECE), "read"),
        (frame_of(ZEROS + rle(1 << 17) + rle(1, last=True), claims=PIECE), "read"),
        (FRAME[:-1], "read"),
        (FRAME[: len(FRAME) // 2], "read"),
        (FRAME[:3], "read"),
        (b"", "read"),
        (FRAME + FRAME, "read"),
        (FRAME + b"\0", "read"),
        (FRAME[:-4] + bytes(4), "read"),
        (FRAME[:100] + bytes([FRAME[100] ^ 1]) + FRAME[101:], "read"),
        (struct.pack("<II", 0x184D2A50, PIECE) + bytes(PIECE), "read"),
        (b"not zstd at all" * 9, "read"),
    ],
    ids=[
        "a window of 128 MiB",
        "a window of 2 GiB",
        "less than the piece",
        "4 GiB",
        "no size",
        "it holds less than it says",
        "it holds more than it says",
        "no end",
        "half of it",
        "half a magic number",
        "nothing",
        "another frame behind it",
        "a byte behind it",
        "a wrong checksum",
        "a flipped bit",
        "a frame to be skipped",
        "something else",
    ],
)
def test_a_frame_that_is_not_exactly_its_piece_is_refused(frame: bytes, why: str):
    """Whatever it declares, and whatever follows it."""
    with pytest.raises(ValueError, match=why):
        decompress(frame, 0, SIZE)


def test_a_frame_is_good_for_no_piece_of_another_size():
    """The last piece is shorter."""
    with pytest.raises(ValueError, match="size"):
        decompress(FRAME, 2, SIZE)


@pytest.mark.parametrize("window", [None, 20])
def test_a_few_kilobytes_that_hold_gigabytes_cost_no_memory(window: int | None):
    """They declare the size of a piece, so only who counts while decoding notices."""
    code = f"""
import resource, sys
sys.path[:0] = {sys.path!r}
from modelstow.cas.compressed import decompress
from test_compressed import PIECE, SIZE, frame_of, rle
bomb = frame_of(rle(1 << 17) * 30_000 + rle(1, last=True), claims=PIECE, window={window})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decompress(bomb, 0, SIZE)
except ValueError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    limit = 3 << 30
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 << 10  # KiB


# ---- crafted indexes

RAW = packed(DATA)[0].encode()
LENGTHS = 52  # their offsets in the body


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (RAW[:-1], "damaged"),
        (RAW + b"\0", "damaged"),
        (b"", "damaged"),
        (RAW[:60] + bytes([RAW[60] ^ 1]) + RAW[61:], "damaged"),
        (resealed(RAW, LENGTHS, struct.pack("<I", 0)), "impossible"),
        (resealed(RAW, LENGTHS, struct.pack("<I", 2**32 - 1)), "impossible"),
        (resealed(RAW, LENGTHS + 8, struct.pack("<I", PIECE + (1 << 16) + 1)), "impossible"),
        (resealed(RAW, 12, struct.pack("<Q", SIZE + 1)), "another blob"),
        (resealed(RAW, 20, bytes(32)), "another blob"),
        (resealed(RAW, 8, struct.pack("<I", 4 << 20)), "damaged"),
        (resealed(RAW, 8, struct.pack("<I", 5 << 20)), "power of two"),
        (struct.pack("<I", 0x184D2A51) + RAW[4:], "begin with an index"),
        (RAW[:4] + struct.pack("<I", 2**31) + RAW[8:], "begin with an index"),
    ],
    ids=[
        "cut",
        "too long",
        "nothing",
        "a flipped bit",
        "a frame of no bytes",
        "a frame of 4 GiB",
        "a frame too long by a byte",
        "another size",
        "another digest",
        "other pieces",
        "pieces of no possible size",
        "another magic number",
        "another length",
    ],
)
def test_an_index_that_is_not_exactly_this_blobs_is_refused(raw: bytes, why: str):
    """Before anything is asked for by it."""
    with pytest.raises(ValueError, match=why):
        CompressedIndex.decode(raw, DIGEST, SIZE)


def test_another_blobs_index_is_refused():
    """A whole one, of the same size."""
    other = packed(NOISE[:SIZE])[0].encode()

    with pytest.raises(ValueError, match="another blob"):
        CompressedIndex.decode(other, DIGEST, SIZE)


@settings(max_examples=200)
@given(st.integers(0, len(RAW) - 1), st.integers(1, 255))
def test_no_changed_byte_of_an_index_is_believed(at: int, change: int):
    """The check covers all of it, and what it does not cover is compared."""
    raw = bytearray(RAW)
    raw[at] ^= change

    with pytest.raises(ValueError, match="index"):
        CompressedIndex.decode(bytes(raw), DIGEST, SIZE)


def test_an_index_with_false_lengths_accepts_no_wrong_bytes():
    """Its lengths are possible ones, so its frames are asked for, and refused."""
    index, file = packed(DATA)
    raw = resealed(RAW, LENGTHS, struct.pack("<I", index.frame(0)[1] - index.frame(0)[0] - 1))
    false = CompressedIndex.decode(raw, DIGEST, SIZE)

    for piece in range(2):
        with pytest.raises(ValueError, match="frame"):
            decompress(file[slice(*false.frame(piece))], piece, SIZE)
