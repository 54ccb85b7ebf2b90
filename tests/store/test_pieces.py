"""Piece tables: what is believed of them, and what is not."""

import errno
import io
import os
from pathlib import Path

import pytest
from builders import PIECE, piece_count, piece_range, some_bytes
from hypothesis import given
from hypothesis import strategies as st

from modelstow.cas import Digest
from modelstow.cas.pieces import PieceTable, Slot, TableState, piece_hash, proven_table, read_table, source_key

HEADER, SLOT = 136, 32
ONE, OTHER = Digest.of(b"one"), Digest.of(b"other")
SIZE = 3 * PIECE + 5
sizes = st.integers(0, 9).flatmap(lambda n: st.sampled_from([max(0, n * PIECE - 1), n * PIECE, n * PIECE + 1]))
slots = st.none() | st.builds(Slot, st.binary(min_size=16, max_size=16), st.integers(0, 2**32 - 1))


def full_table(digest: Digest = ONE, size: int = SIZE, state: TableState = TableState.PROVEN) -> PieceTable:
    return PieceTable(digest, size, [Slot(bytes([i]) * 16, i) for i in range(piece_count(size))], state)


@given(sizes)
def test_the_pieces_of_a_blob_cover_it_without_gap_or_overlap(size: int):
    """The last piece may be shorter, none is empty."""
    ranges = [piece_range(index, size) for index in range(piece_count(size))]

    assert sum(stop - start for start, stop in ranges) == size
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges)][: len(ranges)]
    assert all(0 < stop - start <= PIECE for start, stop in ranges)


@given(st.lists(slots, min_size=4, max_size=4), st.sampled_from(TableState))
def test_a_table_reads_back_as_it_was_written(rows: list[Slot | None], state: TableState):
    """Encode and decode are inverse, unfinished slots included."""
    table = PieceTable(ONE, SIZE, rows, state)

    assert PieceTable.decode(table.encode(), ONE) == table
    assert list(table.missing()) == [index for index, row in enumerate(rows) if row is None]


@given(st.integers(0, HEADER + 4 * SLOT - 1), st.integers(0, 7))
def test_no_flipped_bit_makes_a_table_say_something_else(at: int, bit: int):
    """A damaged header is no table; a damaged slot is an unfinished piece, and costs no other."""
    table = full_table()
    raw = bytearray(table.encode())
    raw[at] ^= 1 << bit

    decoded = PieceTable.decode(bytes(raw), ONE)

    if at < HEADER:
        assert decoded is None
    else:
        damaged = (at - HEADER) // SLOT
        assert decoded is not None and list(decoded.missing()) == [damaged]
        assert [row for i, row in enumerate(decoded.slots) if i != damaged] == [
            row for i, row in enumerate(table.slots) if i != damaged
        ]


@given(st.integers(0, HEADER + 4 * SLOT))
def test_a_table_that_was_cut_short_is_believed_as_far_as_it_goes(length: int):
    """A torn journal costs pieces, never an error."""
    decoded = PieceTable.decode(full_table().encode()[:length], ONE)

    whole = max(0, length - HEADER) // SLOT
    assert (decoded is None) == (length < HEADER)
    if decoded is not None:
        assert list(decoded.missing()) == list(range(whole, 4))


def test_a_slot_copied_from_another_table_is_not_believed():
    """The digest is in a slot's check."""
    raw = bytearray(full_table(ONE).encode())
    other = full_table(OTHER).encode()
    raw[HEADER : HEADER + SLOT] = other[HEADER : HEADER + SLOT]

    decoded = PieceTable.decode(bytes(raw), ONE)

    assert decoded is not None and list(decoded.missing()) == [0]


def test_a_slot_copied_from_another_index_is_not_believed():
    """The index is in a slot's check."""
    raw = bytearray(full_table().encode())
    raw[HEADER : HEADER + SLOT] = raw[HEADER + SLOT : HEADER + 2 * SLOT]

    decoded = PieceTable.decode(bytes(raw), ONE)

    assert decoded is not None and list(decoded.missing()) == [0]


def test_a_table_of_another_blob_is_no_table():
    """A table is bound to its blob's digest."""
    assert PieceTable.decode(full_table(OTHER).encode(), ONE) is None


def test_a_slot_of_zeros_is_an_unfinished_piece():
    """What a power cut leaves of a page that was never written proves nothing."""
    raw = full_table().encode()[:HEADER] + bytes(4 * SLOT)

    decoded = PieceTable.decode(raw, ONE)

    assert decoded is not None and list(decoded.missing()) == [0, 1, 2, 3]


@pytest.mark.parametrize("state", [TableState.UNFINISHED, TableState.COMMITTING])
def test_a_blobs_table_counts_only_when_it_was_proven(tmp_path: Path, state: TableState):
    """Neither a journal nor a half-made commit vouches for a committed blob."""
    (tmp_path / "t").write_bytes(full_table(state=state).encode())

    assert read_table(str(tmp_path / "t"), ONE) is not None
    assert proven_table(str(tmp_path / "t"), ONE, SIZE) is None


def test_a_proven_table_with_a_gap_or_of_another_size_is_not_believed(tmp_path: Path):
    """It must speak of every byte of this very blob."""
    path = tmp_path / "t"
    path.write_bytes(full_table().encode())
    assert proven_table(str(path), ONE, SIZE) == full_table()
    assert proven_table(str(path), ONE, SIZE - 1) is None

    gap = full_table()
    gap.slots[2] = None
    path.write_bytes(gap.encode())

    assert proven_table(str(path), ONE, SIZE) is None


def test_a_file_that_is_longer_than_any_table_is_none(tmp_path: Path):
    """A right table with a hole of a terabyte behind it; it is not read to its end."""
    path = tmp_path / "t"
    path.write_bytes(full_table().encode())
    assert read_table(str(path), ONE) == full_table()

    os.truncate(path, 1 << 40)

    assert read_table(str(path), ONE) is None


def test_no_readable_table_is_none_whatever_is_there(tmp_path: Path):
    """Absence, a symlink, text and a folder are all no table, and no error (F10)."""
    (tmp_path / "real").write_bytes(full_table().encode())
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "text").write_text("not a table")
    (tmp_path / "folder").mkdir()

    assert [read_table(str(tmp_path / name), ONE) for name in ("absent", "link", "text", "folder")] == [None] * 4


def test_a_table_with_a_bad_sector_is_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A table only saves work: without one the blob is read in full."""
    (tmp_path / "t").write_bytes(full_table().encode())

    def failing(fd: int, mode: str) -> io.BytesIO:
        os.close(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdopen", failing)

    assert read_table(str(tmp_path / "t"), ONE) is None


def test_a_source_has_the_same_key_everywhere_and_never_none():
    """Zero means no source."""
    keys = {source_key(f"https://host/{n}") for n in range(1000)}

    assert len(keys) == 1000 and 0 not in keys and all(key < 2**32 for key in keys)
    assert piece_hash(some_bytes(100)) == piece_hash(memoryview(some_bytes(100)))
