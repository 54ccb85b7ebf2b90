"""Chunking: how a blob is divided, and that files of any chunking are read as they were written."""

from pathlib import Path

import pytest
from builders import some_bytes
from hypothesis import given
from hypothesis import strategies as st
from store_fixtures import flip, put, store_at

from modelstow.cas import BlobState, BlobStore, ChecksumError, Digest
from modelstow.cas.chunking import DEFAULT, Chunking
from modelstow.cas.compressed import HEAD_BYTES, CompressedIndex, chunking_of, compress, decompress, index_bytes
from modelstow.cas.partial import Partial
from modelstow.cas.pieces import PieceTable, PieceTableBuilder, Slot, TableState, piece_hash, proven_table, read_table
from modelstow.cas.scrub import Level, ScrubTarget, hash_file, scrub

TINY = Chunking(64 << 10)
DATA = some_bytes((1 << 20) + 3 * TINY.piece_bytes + 77, 31)
DIGEST = Digest.of(DATA)
COUNT = TINY.count(len(DATA))

chunkings = st.integers(16, 30).map(lambda power: Chunking(1 << power))
worlds = chunkings.flatmap(
    lambda chunking: st.tuples(
        st.just(chunking),
        st.integers(0, 9).flatmap(
            lambda n: st.sampled_from([max(0, n * chunking.piece_bytes + extra) for extra in (-1, 0, 1)])
        ),
    )
)


# ---- laws


@given(worlds)
def test_the_ranges_tile_the_blob(world: tuple[Chunking, int]):
    """Without gap or overlap; the last may be shorter, none is empty."""
    chunking, size = world
    ranges = [chunking.range(index, size) for index in range(chunking.count(size))]

    assert [start for start, _ in ranges] + [size] == [0, *(stop for _, stop in ranges)]
    assert all(0 < stop - start <= chunking.piece_bytes for start, stop in ranges)


@given(worlds, st.data())
def test_the_index_at_an_offset_inverts_the_range(world: tuple[Chunking, int], data: st.DataObject):
    """Each byte is in the range of the piece that its offset names."""
    chunking, size = world
    if size:
        offset = data.draw(st.integers(0, size - 1))
        start, stop = chunking.range(chunking.index_at(offset), size)

        assert start <= offset < stop
        assert chunking.index_at(start) == chunking.index_at(stop - 1) == chunking.index_at(offset)


@given(chunkings)
def test_an_empty_blob_has_no_piece(chunking: Chunking):
    """And one of a byte has one."""
    assert chunking.count(0) == 0 and chunking.count(1) == 1


@pytest.mark.parametrize("piece_bytes", [0, -1, 1, 32 << 10, (64 << 10) + 1, 3 << 20, 2 << 30, (8 << 20) - 1])
def test_only_powers_of_two_from_64_kib_to_1_gib_divide_blobs(piece_bytes: int):
    """Anything else is no chunking, so that no file can name one."""
    with pytest.raises(ValueError, match="power of two"):
        Chunking(piece_bytes)


# ---- tables


@given(chunkings, st.integers(1, 40), st.booleans())
def test_a_table_keeps_the_chunking_that_its_header_names(chunking: Chunking, count: int, whole: bool):
    """Encode and decode are inverse for every chunking."""
    size = count * chunking.piece_bytes - (0 if whole else 1)
    table = PieceTable(DIGEST, size, [Slot(bytes([i]) * 16) for i in range(count)], TableState.PROVEN, chunking)

    assert PieceTable.decode(table.encode(), DIGEST) == table


@pytest.mark.parametrize("piece_bytes", [0, 1, 32 << 10, 3 << 20, 2 << 30])
def test_a_table_of_an_impossible_chunking_is_no_table(piece_bytes: int):
    """Its header is intact otherwise."""
    odd = PieceTable(DIGEST, len(DATA))
    object.__setattr__(odd, "chunking", _Forged(piece_bytes))

    assert PieceTable.decode(odd.encode(), DIGEST) is None


class _Forged:
    def __init__(self, piece_bytes: int) -> None:
        self.piece_bytes = piece_bytes


@given(st.lists(st.integers(1, 200_000), max_size=12))
def test_a_builder_hashes_pieces_whatever_the_parts_are(lengths: list[int]):
    """The boundaries of what arrives are not those of pieces."""
    builder, offset = PieceTableBuilder(DIGEST, len(DATA), TINY), 0
    for length in [*lengths, len(DATA)]:
        builder.update(memoryview(DATA)[offset : offset + length])
        offset = min(len(DATA), offset + length)

    assert [slot and slot.hash for slot in builder.proven().slots] == [
        piece_hash(DATA[slice(*TINY.range(index, len(DATA)))]) for index in range(COUNT)
    ]


# ---- stores


def tiny_partial(store: BlobStore, *indexes: int) -> Partial:
    """An open partial of small pieces, some of which are finished."""
    partial = store.ingest.open(DIGEST, len(DATA), chunking=TINY)
    put(partial, DATA, *indexes)
    return partial


def missing(partial: Partial) -> list[int]:
    return list(partial.table.missing())


def target(store: BlobStore) -> ScrubTarget:
    layout = store.layout
    return ScrubTarget(path=layout.blob(DIGEST), digest=DIGEST, size=len(DATA), table=layout.table(DIGEST))


@pytest.mark.parametrize("chunking", [TINY, None])
def test_a_partial_of_small_pieces_resumes_and_becomes_a_blob(tmp_path: Path, chunking: Chunking | None):
    """A kill costs the pieces that were not finished, and those that are wrong on disk."""
    store = store_at(tmp_path)
    tiny_partial(store, *range(COUNT - 1)).close()
    flip(store.layout.partial(DIGEST), 5 * TINY.piece_bytes + 1)

    again = store.ingest.open(DIGEST, len(DATA), chunking=chunking)

    assert again.chunking == TINY and missing(again) == [5, COUNT - 1]
    assert again.contiguous_end() == 5 * TINY.piece_bytes
    put(again, DATA, 5, COUNT - 1)
    store.ingest.commit(again)
    assert Path(store.layout.blob(DIGEST)).read_bytes() == DATA
    table = proven_table(store.layout.table(DIGEST), DIGEST, len(DATA))
    assert table is not None and table.chunking == TINY and len(table.slots) == COUNT


def test_a_partial_of_another_chunking_is_replaced(tmp_path: Path):
    """A caller that counts in pieces of one size never gets those of another."""
    store = store_at(tmp_path)
    tiny_partial(store, 0, 1, 2).close()

    again = store.ingest.open(DIGEST, len(DATA))

    assert again.chunking == DEFAULT and again.held_bytes == 0


def test_the_record_of_small_pieces_is_counted_in_bytes(tmp_path: Path):
    """Progress is shown from the table alone."""
    store = store_at(tmp_path)
    partial = tiny_partial(store, 0, 7, COUNT - 1)

    assert store.held_in_partial(DIGEST, len(DATA)) == partial.held_bytes == 2 * TINY.piece_bytes + 77
    partial.invalidate([7])
    assert store.held_in_partial(DIGEST, len(DATA)) == TINY.piece_bytes + 77


def test_a_copy_finishes_a_partial_of_small_pieces(tmp_path: Path):
    """What is there is kept; a copy that is wrong loses only what it brought."""
    store = store_at(tmp_path)
    (tmp_path / "right").write_bytes(DATA)
    (tmp_path / "wrong").write_bytes(bytes(len(DATA)))
    tiny_partial(store, 0, 3).close()

    with open(tmp_path / "wrong", "rb") as file, pytest.raises(ChecksumError):
        store.ingest.copy(file.fileno(), DIGEST, len(DATA))
    kept = read_table(store.layout.journal(DIGEST), DIGEST)
    with open(tmp_path / "right", "rb") as file:
        store.ingest.copy(file.fileno(), DIGEST, len(DATA))

    assert kept is not None and [i for i, slot in enumerate(kept.slots) if slot] == [0, 3]
    assert store.blobs.stat(DIGEST, len(DATA)).state is BlobState.INTACT


@pytest.mark.parametrize("level", [Level.FAST, Level.FULL])
def test_a_scrub_names_the_bad_pieces_of_the_tables_chunking(tmp_path: Path, level: Level):
    """In the second run of a file, too."""
    store = store_at(tmp_path)
    store.ingest.commit(tiny_partial(store, *range(COUNT)))
    assert next(scrub([target(store)], level)).intact
    flip(store.layout.blob(DIGEST), 9 * TINY.piece_bytes, forge=True)

    result = next(scrub([target(store)], level))

    assert (result.intact, result.bad_pieces, result.chunking) == (False, (9,), TINY)


def test_a_repair_replaces_the_bad_piece_alone(tmp_path: Path):
    """The good ones come from the damaged blob."""
    store = store_at(tmp_path)
    store.ingest.commit(tiny_partial(store, *range(COUNT)))
    blob = Path(store.layout.blob(DIGEST))
    flip(blob, 9 * TINY.piece_bytes)
    damaged = blob.read_bytes()

    partial = store.ingest.open(DIGEST, len(DATA), chunking=TINY)
    put(partial, damaged, *(index for index in range(COUNT) if index != 9))
    put(partial, DATA, 9)
    store.ingest.commit(partial)

    assert blob.read_bytes() == DATA and store.blobs.stat(DIGEST, len(DATA)).state is BlobState.INTACT
    assert next(scrub([target(store)], Level.FAST)).intact
    assert [path.read_bytes() for path in store.layout.quarantine.iterdir()] == [damaged]


def test_a_scrub_divides_large_pieces_too(tmp_path: Path):
    """One that is larger than what a thread takes at a time."""
    store, coarse = store_at(tmp_path), Chunking(1 << 30)
    partial = store.ingest.open(DIGEST, len(DATA), chunking=coarse)
    partial.write(0, DATA)
    partial.finish(0, piece_hash(DATA))
    store.ingest.commit(partial)
    flip(store.layout.blob(DIGEST), 0, forge=True)

    assert next(scrub([target(store)], Level.FAST)).bad_pieces == (0,)


def test_a_file_of_unknown_digest_is_committed_with_its_table(tmp_path: Path):
    """The table that one pass made is the journal of the commit."""
    store = store_at(tmp_path)
    with store.ingest.incoming("key") as incoming:
        Path(incoming.path).write_bytes(DATA)
        store.ingest.take(incoming, hash_file(incoming.fd, len(DATA)))

    table = proven_table(store.layout.table(DIGEST), DIGEST, len(DATA))
    assert table is not None and table.chunking == DEFAULT


# ---- compressed blobs


def packed(chunking: Chunking, data: bytes = DATA) -> tuple[CompressedIndex, bytes]:
    """A compressed blob with its index."""
    frames = [compress(data[slice(*chunking.range(i, len(data)))]) for i in range(chunking.count(len(data)))]
    index = CompressedIndex.of(Digest.of(data), len(data), map(len, frames), chunking)
    return index, index.encode() + b"".join(frames)


@pytest.mark.parametrize("chunking", [TINY, Chunking(256 << 10), DEFAULT, Chunking(1 << 30)])
def test_a_compressed_blob_of_any_chunking_is_read_back(chunking: Chunking):
    """Its head says how long the index is, the index where each frame is."""
    index, file = packed(chunking)

    named = chunking_of(file[:HEAD_BYTES])
    again = CompressedIndex.decode(file[: index_bytes(len(DATA), named)], DIGEST, len(DATA))

    assert named == chunking and again == index and again.total == len(file)
    pieces = range(named.count(len(DATA)))
    assert b"".join(decompress(file[slice(*again.frame(i))], i, len(DATA), named) for i in pieces) == DATA


def test_an_index_is_not_read_by_the_length_of_another_chunking():
    """A reader that knows one chunking refuses the others."""
    _, file = packed(TINY)

    with pytest.raises(ValueError, match="index"):
        CompressedIndex.decode(file[: index_bytes(len(DATA))], DIGEST, len(DATA))
