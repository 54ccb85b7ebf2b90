"""Reading bytes at rest: what is found, by which level, and what is believed afterwards."""

import errno
import os
import threading
from pathlib import Path

import pytest
from builders import PIECE, piece_count, piece_range
from store_fixtures import BIG, MIDDLE, SMALL, flip, store_at

from modelstow.cas import BlobStore, Digest
from modelstow.cas import scrub as scrubs
from modelstow.cas.durable import write_file
from modelstow.cas.pieces import PieceTable, Slot, TableState, piece_hash, proven_table
from modelstow.cas.scrub import Level, ScrubResult, ScrubTarget, scrub

DIGEST = Digest.of(BIG)
both = pytest.mark.parametrize("level", [Level.FAST, Level.FULL])


def target(store: BlobStore, data: bytes, **more) -> ScrubTarget:
    digest = Digest.of(data)
    where = {"path": store.layout.blob(digest), "table": store.layout.table(digest)}
    return ScrubTarget(digest=digest, size=len(data), **{**where, "makes_table": True, **more})


def read(store: BlobStore, data: bytes, level: Level, **more) -> ScrubResult:
    [result] = scrub([target(store, data, **more)], level)
    return result


def table_of(data: bytes, digest: Digest) -> PieceTable:
    """A proven table of bytes, whatever digest it claims."""
    ranges = (piece_range(i, len(data)) for i in range(piece_count(len(data))))
    return PieceTable(digest, len(data), [Slot(piece_hash(data[a:b])) for a, b in ranges], TableState.PROVEN)


@both
@pytest.mark.parametrize("data", [b"x", SMALL, MIDDLE, BIG], ids=["1", "11", ">1MiB", ">16MiB"])
def test_an_intact_blob_is_read_once_and_found_so(tmp_path: Path, data: bytes, level: Level):
    """Every byte, no more."""
    store = store_at(tmp_path)
    store.ingest.add_bytes(data)
    counted: list[int] = []

    [result] = scrub([target(store, data)], level, on_bytes=counted.append)

    assert result.intact and result.bad_pieces == () and not result.problem
    assert result.bytes_read == sum(counted) == len(data)


@both
@pytest.mark.parametrize("at", [0, PIECE - 1, PIECE, 2 * PIECE, len(BIG) - 1])
def test_exactly_the_flipped_piece_is_found_even_when_the_mtime_is_forged(tmp_path: Path, at: int, level: Level):
    """A bit that rots is found by reading, and costs one piece."""
    store = store_at(tmp_path)
    store.ingest.add_bytes(BIG)

    flip(store.layout.blob(DIGEST), at, forge=True)

    result = read(store, BIG, level)
    assert not result.intact and result.bad_pieces == (at // PIECE,)


def test_several_bad_pieces_are_reported_in_order(tmp_path: Path):
    """With pieces of many threads joined."""
    store = store_at(tmp_path)
    data = bytes(20 * PIECE)
    store.ingest.add_bytes(data)
    for piece in (19, 3, 17):
        flip(store.layout.blob(Digest.of(data)), piece * PIECE, forge=True)

    assert read(store, data, Level.FAST).bad_pieces == (3, 17, 19)


def test_a_small_blob_has_sha256_at_every_level(tmp_path: Path):
    """It has no table; a table that was put there by hand is ignored."""
    store = store_at(tmp_path)
    store.ingest.add_bytes(SMALL)
    flip(store.layout.blob(Digest.of(SMALL)), 3, forge=True)
    damaged = Path(store.layout.blob(Digest.of(SMALL))).read_bytes()
    Path(store.layout.table(Digest.of(SMALL))).write_bytes(table_of(damaged, Digest.of(SMALL)).encode())

    assert not read(store, SMALL, Level.FAST).intact


def test_full_finds_what_a_forged_table_would_not(tmp_path: Path):
    """xxh3 guards against accidents, sha256 is trust."""
    store = store_at(tmp_path)
    store.ingest.add_bytes(BIG)
    flip(store.layout.blob(DIGEST), 100, forge=True)
    damaged = Path(store.layout.blob(DIGEST)).read_bytes()
    write_file(Path(store.layout.table(DIGEST)), table_of(damaged, DIGEST).encode())

    assert read(store, BIG, Level.FAST).intact
    assert not read(store, BIG, Level.FULL).intact


@both
def test_a_lost_table_is_recreated_from_a_pass_whose_sha256_matched(tmp_path: Path, level: Level):
    """The fast level then means the full one."""
    store = store_at(tmp_path)
    store.ingest.add_bytes(BIG)
    os.unlink(store.layout.table(DIGEST))

    assert read(store, BIG, level).intact

    assert proven_table(store.layout.table(DIGEST), DIGEST, len(BIG)) is not None


@both
def test_a_lost_table_is_never_made_from_bytes_that_are_wrong(tmp_path: Path, level: Level):
    """It would certify corruption permanently (D9)."""
    store = store_at(tmp_path)
    store.ingest.add_bytes(BIG)
    os.unlink(store.layout.table(DIGEST))
    flip(store.layout.blob(DIGEST), 100, forge=True)

    result = read(store, BIG, level)

    assert not result.intact and result.bad_pieces == (), "no table locates the damage"
    assert not os.path.exists(store.layout.table(DIGEST))


@pytest.mark.parametrize("state", [TableState.UNFINISHED, TableState.COMMITTING])
def test_an_unproven_table_is_not_believed_and_is_recreated(tmp_path: Path, state: TableState):
    """Whatever its slots say."""
    store = store_at(tmp_path)
    store.ingest.add_bytes(BIG)
    flip(store.layout.blob(DIGEST), 100, forge=True)
    table = table_of(Path(store.layout.blob(DIGEST)).read_bytes(), DIGEST)
    table.state = state
    Path(store.layout.table(DIGEST)).write_bytes(table.encode())

    assert not read(store, BIG, Level.FAST).intact
    flip(store.layout.blob(DIGEST), 100, forge=True)
    assert read(store, BIG, Level.FAST).intact
    assert proven_table(store.layout.table(DIGEST), DIGEST, len(BIG)) is not None


def test_only_the_stores_own_blob_makes_a_table(tmp_path: Path):
    """A copy in a tree proves itself, not the blob."""
    store = store_at(tmp_path)
    store.ingest.add_bytes(BIG)
    os.unlink(store.layout.table(DIGEST))

    assert read(store, BIG, Level.FAST, makes_table=False).intact
    assert not os.path.exists(store.layout.table(DIGEST))


@both
@pytest.mark.parametrize("length", [0, 5, PIECE, len(BIG) - 1])
def test_a_file_that_is_too_short_is_not_intact(tmp_path: Path, length: int, level: Level):
    """The pieces that are gone are bad, the others are good."""
    store = store_at(tmp_path)
    store.ingest.add_bytes(BIG)
    os.truncate(store.layout.blob(DIGEST), length)

    result = read(store, BIG, level)

    assert not result.intact and result.bad_pieces == tuple(range(length // PIECE, 3))


@both
def test_a_file_that_is_too_long_is_not_intact(tmp_path: Path, level: Level):
    """Every piece is right, and the whole is wrong all the same."""
    store = store_at(tmp_path)
    store.ingest.add_bytes(BIG)
    os.truncate(store.layout.blob(DIGEST), len(BIG) + 1)

    result = read(store, BIG, level)

    assert not result.intact and "longer" in result.problem


@both
def test_a_file_truncated_while_it_is_read_is_an_error_not_a_crash(tmp_path: Path, level: Level):
    """With mmap this would be SIGBUS (D14)."""
    store = store_at(tmp_path)
    store.ingest.add_bytes(BIG)

    def cut(_: int) -> None:
        os.truncate(store.layout.blob(DIGEST), PIECE + 1)

    [result] = scrub([target(store, BIG)], level, on_bytes=cut, threads=1)

    assert not result.intact and result.bad_pieces == (1, 2)


@both
@pytest.mark.parametrize("kind", ["absent", "folder", "symlink", "fifo"])
def test_what_is_no_file_is_not_intact(tmp_path: Path, kind: str, level: Level):
    """Nothing is followed, nothing is waited for (F10)."""
    store = store_at(tmp_path)
    store.ingest.add_bytes(BIG)
    path = Path(store.layout.blob(DIGEST))
    path.rename(tmp_path / "real")
    if kind == "folder":
        path.mkdir()
    if kind == "symlink":
        path.symlink_to(tmp_path / "real")
    if kind == "fifo":
        os.mkfifo(path)
    results: list[ScrubResult] = []

    thread = threading.Thread(target=lambda: results.append(read(store, BIG, level)), daemon=True)
    thread.start()
    thread.join(2)
    hung = thread.is_alive()
    if hung:
        os.close(os.open(path, os.O_RDWR))  # lets the reader go
        thread.join(5)

    assert not hung and not results[0].intact


@both
def test_a_bad_sector_costs_its_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: Level):
    """EIO on reading is a finding, not the end (F2)."""
    store = store_at(tmp_path)
    store.ingest.add_bytes(BIG)
    real = os.preadv

    def broken(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset == PIECE:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", broken)

    result = read(store, BIG, level)

    assert not result.intact and result.bad_pieces == (1,) and "Input/output" in result.problem


def test_results_come_in_the_order_of_the_targets(tmp_path: Path):
    """However many there are, and whichever thread is done first."""
    store = store_at(tmp_path)
    contents = [b"%d" % number for number in range(150)]
    for number, data in enumerate(contents):
        path = tmp_path / str(number)
        path.write_bytes(data if number % 3 else b"wrong")
    targets = [target(store, data, path=str(tmp_path / str(number))) for number, data in enumerate(contents)]

    results = list(scrub(targets, Level.FAST, threads=4))

    assert [v.target_file for v in results] == targets
    assert [v.intact for v in results] == [number % 3 != 0 for number in range(150)]


def test_a_table_that_cannot_be_kept_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A read-only store is verified all the same; the table only saves time (D20)."""
    store = store_at(tmp_path)
    store.ingest.add_bytes(BIG)
    os.unlink(store.layout.table(DIGEST))

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(scrubs, "write_file", read_only)

    assert read(store, BIG, Level.FAST).intact


@both
def test_a_verification_that_is_given_up_reads_nothing_more(tmp_path: Path, level: Level):
    """The queue may be hundreds of gigabytes, and Ctrl-C must not wait for it."""
    store = store_at(tmp_path)
    store.ingest.add_bytes(BIG)
    read_bytes: list[int] = []

    results = scrub([target(store, BIG)] * 40, level, threads=1, on_bytes=read_bytes.append)
    assert next(results).intact
    results.close()

    assert len(BIG) <= sum(read_bytes) < 20 * len(BIG)
