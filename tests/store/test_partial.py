"""Partials: what an earlier run left counts as far as its bytes still hash to the journal."""

import errno
import os
from pathlib import Path

import pytest
from builders import PIECE
from store_fixtures import BIG, MIDDLE, SMALL, flip, partial_with, put, store_at

from modelstow.cas import ChecksumError, Digest
from modelstow.cas.pieces import TableState, read_table

DIGEST = Digest.of(BIG)


def held(partial) -> list[int]:
    return [index for index, slot in enumerate(partial.table.slots) if slot is not None]


def reopened(store):
    return store.ingest.open(DIGEST, len(BIG))


def test_a_partial_resumes_the_pieces_that_are_on_record(tmp_path: Path):
    """Nothing was closed or synced before: the process was killed."""
    store = store_at(tmp_path)
    first = partial_with(store, BIG, 0, 2)

    again = reopened(store)

    assert held(again) == [0, 2]
    assert again.held_bytes == PIECE + 12_345 == store.held_in_partial(DIGEST, len(BIG))
    assert again.table.slots[0].source == 7
    put(again, BIG, 1)
    store.ingest.commit(again)
    assert Path(store.layout.blob(DIGEST)).read_bytes() == BIG
    first.close()


def test_a_piece_with_a_flipped_bit_is_dropped(tmp_path: Path):
    """A piece counts only when the bytes on disk still hash to its slot."""
    store = store_at(tmp_path)
    partial_with(store, BIG, 0, 1, 2).close()
    flip(store.layout.partial(DIGEST), PIECE + 1000)

    assert held(reopened(store)) == [0, 2]


def test_a_page_of_zeros_is_dropped(tmp_path: Path):
    """A power cut leaves sizes right and pages empty."""
    store = store_at(tmp_path)
    partial_with(store, BIG, 0, 1, 2).close()
    with open(store.layout.partial(DIGEST), "r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))

    assert held(reopened(store)) == [1, 2]


def test_a_partial_that_lost_its_tail_keeps_its_head(tmp_path: Path):
    """What was cut off is fetched again, and the size is made right."""
    store = store_at(tmp_path)
    partial_with(store, BIG, 0, 1, 2).close()
    os.truncate(store.layout.partial(DIGEST), PIECE + 5)

    again = reopened(store)

    assert held(again) == [0]
    assert os.path.getsize(again.path) == len(BIG)


def test_a_piece_that_is_dropped_on_resuming_is_dropped_from_the_journal_too(tmp_path: Path):
    """The journal never says more than what was found good."""
    store = store_at(tmp_path)
    partial_with(store, BIG, 0, 1, 2).close()
    flip(store.layout.partial(DIGEST), 0)

    reopened(store).close()

    assert list(read_table(store.layout.partial(DIGEST) + ".pieces", DIGEST).missing()) == [0]


def test_the_files_size_is_never_progress(tmp_path: Path):
    """A whole file without a journal is worth nothing."""
    store = store_at(tmp_path)
    partial_with(store, BIG, 0, 1, 2).close()
    os.unlink(store.layout.partial(DIGEST) + ".pieces")

    assert held(reopened(store)) == []
    assert store.held_in_partial(DIGEST, len(BIG)) == 0


def test_a_partial_with_a_second_link_is_let_go_not_written_to(tmp_path: Path):
    """After a crash between link and unlink its inode is a blob already (D6)."""
    store = store_at(tmp_path)
    partial_with(store, BIG, 0, 1, 2).close()
    blob = store.layout.blob(DIGEST)
    os.link(store.layout.partial(DIGEST), blob)

    again = reopened(store)
    again.write(0, b"other bytes")

    assert held(again) == []
    assert os.fstat(again.fd).st_ino != os.stat(blob).st_ino
    assert Path(blob).read_bytes() == BIG


@pytest.mark.parametrize("state", [TableState.COMMITTING, TableState.PROVEN])
def test_a_partial_that_was_at_committing_is_fetched_again(tmp_path: Path, state: TableState):
    """Its fsync may have failed in another process, so that the cached pages are wrong (D13)."""
    store = store_at(tmp_path)
    first = partial_with(store, BIG, 0, 1, 2)
    first.mark(state)
    first.close()

    assert held(reopened(store)) == []


def test_a_partial_of_another_size_is_not_resumed(tmp_path: Path):
    """One digest has one size; a journal that says another is not this blob's."""
    store = store_at(tmp_path)
    partial_with(store, BIG, 0, 1, 2).close()

    again = store.ingest.open(DIGEST, len(BIG) - 1)

    assert held(again) == [] and os.path.getsize(again.path) == len(BIG) - 1


@pytest.mark.parametrize("what", ["data", "table"])
def test_a_symlink_in_a_partials_place_is_not_followed(tmp_path: Path, what: str):
    """What it points to stays as it is (F10)."""
    store = store_at(tmp_path)
    partial_with(store, BIG, 0, 1, 2).close()
    path = Path(store.layout.partial(DIGEST) + (".pieces" if what == "table" else ""))
    mine = tmp_path / "mine"
    path.rename(mine)
    path.symlink_to(mine)
    before = mine.read_bytes()

    again = reopened(store)
    put(again, BIG, 0)

    assert held(again) == [0]
    assert mine.read_bytes() == before and not path.is_symlink()


@pytest.mark.parametrize("what", ["data", "table"])
def test_a_folder_in_a_partials_place_is_moved_to_quarantine(tmp_path: Path, what: str):
    """It is not ours to delete (F10)."""
    store = store_at(tmp_path)
    path = Path(store.layout.partial(DIGEST) + (".pieces" if what == "table" else ""))
    path.mkdir()
    (path / "mine").write_text("keep me")

    again = reopened(store)
    put(again, BIG, 0, 1, 2)
    store.ingest.commit(again)

    [moved] = store.layout.quarantine.iterdir()
    assert (moved / "mine").read_text() == "keep me"


def test_a_foreign_file_in_a_partials_place_is_replaced(tmp_path: Path):
    """A name proves nothing."""
    store = store_at(tmp_path)
    Path(store.layout.partial(DIGEST)).write_bytes(BIG)
    Path(store.layout.partial(DIGEST) + ".pieces").write_text("not a journal")

    assert held(reopened(store)) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_a_partial_of_another_user_is_not_resumed(tmp_path: Path):
    """Its owner could write into it after the verification."""
    store = store_at(tmp_path)
    partial_with(store, BIG, 0, 1, 2).close()
    os.chown(store.layout.partial(DIGEST), 1001, 1001)

    again = reopened(store)

    assert held(again) == [] and os.fstat(again.fd).st_uid == 0


def test_nothing_is_preallocated(tmp_path: Path):
    """A partial takes the room of what it holds, so a crash releases its reservation automatically."""
    store = store_at(tmp_path)

    partial = partial_with(store, BIG, 2)

    found = os.fstat(partial.fd)
    assert found.st_size == len(BIG) and found.st_blocks * 512 < 1 << 20
    assert found.st_mode & 0o777 == 0o600


def test_a_small_blob_has_no_journal(tmp_path: Path):
    """Ten thousand small files are ten thousand inodes, not twenty."""
    store = store_at(tmp_path)

    partial = partial_with(store, SMALL, 0)

    assert [p.name for p in store.layout.partials.iterdir()] == [Digest.of(SMALL).hex]
    partial.close_or_discard()
    assert list(store.layout.partials.iterdir()) == []


def test_leaving_keeps_what_can_be_resumed_and_nothing_else(tmp_path: Path):
    """A partial without a finished piece is not worth its name."""
    store = store_at(tmp_path)
    empty, some = store.ingest.open(Digest.of(MIDDLE), len(MIDDLE)), partial_with(store, BIG, 1)
    empty.write(0, b"half a piece")

    empty.close_or_discard()
    some.close_or_discard()

    assert sorted(p.name for p in store.layout.partials.iterdir()) == [DIGEST.hex, DIGEST.hex + ".pieces"]


def test_invalidated_pieces_stay_invalid_and_hashing_starts_from_scratch(tmp_path: Path):
    """Suspect pieces are removed from the journal, so that they do not return after a crash."""
    store = store_at(tmp_path)
    wrong = bytearray(BIG)
    wrong[0] ^= 1
    partial = store.ingest.open(DIGEST, len(BIG))
    put(partial, bytes(wrong), 0, 1, 2)
    assert partial.actual_digest() == Digest.of(bytes(wrong))

    partial.invalidate([0])
    partial.close()

    again = reopened(store)
    assert held(again) == [1, 2]
    put(again, BIG, 0)
    assert again.actual_digest() == DIGEST


def test_forgetting_restarts_the_sha256_of_an_open_partial(tmp_path: Path):
    """The same object is right after its bad piece was fetched again."""
    store = store_at(tmp_path)
    wrong = bytearray(BIG)
    wrong[PIECE] ^= 1
    partial = store.ingest.open(DIGEST, len(BIG))
    put(partial, bytes(wrong), 0, 1, 2)
    assert partial.actual_digest() != DIGEST

    partial.invalidate([1])
    put(partial, BIG, 1)

    assert partial.actual_digest() == DIGEST


def test_the_front_is_what_is_there_without_a_gap(tmp_path: Path):
    """Pieces come in any order; the sha256 follows the contiguous front."""
    store = store_at(tmp_path)
    partial = store.ingest.open(DIGEST, len(BIG))
    fronts = [partial.contiguous_end()]
    for index in (2, 0, 1):
        put(partial, BIG, index)
        fronts.append(partial.contiguous_end())

    assert fronts == [0, 0, PIECE, len(BIG)]


def test_a_file_cut_while_it_is_written_is_an_error_not_a_loop(tmp_path: Path):
    """Another process truncated it."""
    store = store_at(tmp_path)
    partial = partial_with(store, BIG, 0, 1, 2)
    os.truncate(partial.path, PIECE)

    with pytest.raises(OSError, match="was truncated"):
        partial.actual_digest()


def test_wrong_bytes_leave_the_partial_for_judging(tmp_path: Path):
    """The corrupt sender is found by the piece; what is right is kept."""
    store = store_at(tmp_path)
    partial = store.ingest.open(DIGEST, len(BIG))
    wrong = bytearray(BIG)
    wrong[-1] ^= 1
    put(partial, bytes(wrong), 0, 1, 2)

    with pytest.raises(ChecksumError) as caught:
        store.ingest.commit(partial)

    assert caught.value.details == {"expected": str(DIGEST), "actual": str(Digest.of(bytes(wrong)))}
    assert not os.path.lexists(store.layout.blob(DIGEST))
    partial.close()
    assert held(reopened(store)) == [0, 1, 2]


def test_a_short_write_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """write(2) may do less than asked (F3)."""
    store = store_at(tmp_path)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:4000], offset))

    partial = partial_with(store, SMALL * 1000, 0)
    store.ingest.commit(partial)

    assert Path(store.layout.blob(Digest.of(SMALL * 1000))).read_bytes() == SMALL * 1000


def test_an_error_on_reading_a_leftover_is_reported_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """EIO while proving is an error of the file system; no blob appears (F2)."""
    store = store_at(tmp_path)
    partial = partial_with(store, BIG, 0, 1, 2)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)

    with pytest.raises(OSError, match="Input/output"):
        store.ingest.commit(partial)
    assert not os.path.lexists(store.layout.blob(DIGEST))


def test_a_bad_sector_under_a_leftover_costs_its_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Else no run could ever fetch this blob again, and each would lose descriptors (F2)."""
    store = store_at(tmp_path)
    partial_with(store, BIG, 0, 1).close_or_discard()
    real, before = os.preadv, len(os.listdir("/proc/self/fd"))

    def broken(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset < PIECE:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", broken)
        again = reopened(store)

    assert held(again) == [1]
    again.close_or_discard()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_partial_that_cannot_be_opened_leaves_no_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A full disk may refuse the journal after the data file was opened."""
    store = store_at(tmp_path)
    before = len(os.listdir("/proc/self/fd"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("modelstow.cas.partial.write_all", full)
        reopened(store)

    assert len(os.listdir("/proc/self/fd")) == before
