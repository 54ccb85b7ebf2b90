"""Foreign stamps: blobs that must keep another mtime than their digest's are intact while their table describes them."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from store_fixtures import BIG, SMALL, flip, partial_with, root_only, store_at

from modelstow.backends import Registry
from modelstow.cas import BlobState, BlobStore, Digest, sweep
from modelstow.cas.pieces import ForeignStamp, PieceTable, TableState, proven_table
from modelstow.cas.scrub import Level, ScrubTarget, prove, scrub
from modelstow.reconcile.transfer.concurrency import Connections
from modelstow.reconcile.transfer.context import TransferContext
from modelstow.reconcile.transfer.fetcher import Fetcher
from modelstow.reconcile.transfer.source_health import BadSources, FailureTable
from modelstow.reconcile.transfer.state import BlobRequest

LONG_AGO = 1_700_000_001  # odd, so no digest's
BOTH = pytest.mark.parametrize("data", [SMALL, BIG], ids=["small", "big"])


def stamped(store: BlobStore, data: bytes) -> Path:
    """A blob with a foreign mtime, and the table that says so."""
    digest = Digest.of(data)
    path = touched(store, data)
    stamp = store.blobs.foreign_stamp(digest)
    table = prove(str(path), digest, len(data))
    assert stamp is not None and table is not None
    assert store.blobs.stamp_foreign(digest, replace(table, stamp=stamp))
    return path


def touched(store: BlobStore, data: bytes) -> Path:
    """A blob that is right and has a foreign mtime."""
    path = Path(store.layout.blob(store.ingest.add_bytes(data)))
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


def state(store: BlobStore, data: bytes) -> BlobState:
    return store.blobs.stat(Digest.of(data), len(data)).state


def table_of(store: BlobStore, data: bytes) -> Path:
    return Path(store.layout.table(Digest.of(data)))


# ---- the stamp


@BOTH
def test_a_stamped_blob_is_intact(tmp_path: Path, data: bytes):
    """Small ones too, which have no table otherwise; a store that is opened again reads it from there."""
    store = store_at(tmp_path)
    touched(store, data)
    assert state(store, data) is BlobState.SUSPECT

    stamped(store, data)

    assert state(store, data) is state(store_at(tmp_path), data) is BlobState.INTACT
    assert os.stat(table_of(store, data)).st_mode & 0o777 == 0o444


@BOTH
def test_a_blob_with_the_digest_mtime_needs_no_table(tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch):
    """The one stat says all; nothing is opened."""
    store = store_at(tmp_path)
    store.ingest.add_bytes(data)
    monkeypatch.setattr(os, "open", None)

    assert state(store, data) is BlobState.INTACT


@BOTH
@pytest.mark.parametrize("change", ["write", "write through a link", "truncate", "grow", "touch", "replace", "rewrite"])
def test_a_change_of_a_stamped_blob_makes_it_suspect(tmp_path: Path, data: bytes, change: str):
    """Through whichever link, and also where the content is the same again."""
    store = store_at(tmp_path)
    path = stamped(store, data)
    link = tmp_path / "link"
    os.link(path, link)
    if change.startswith("write"):
        os.chmod(path, 0o644)
        with open(link if change.endswith("link") else path, "r+b") as file:
            file.write(b"?")
    elif change == "truncate":
        os.truncate(path, len(data) - 1)
    elif change == "grow":
        os.truncate(path, len(data) + 1)
    elif change == "touch":
        os.utime(path)
    elif change == "replace":
        (tmp_path / "other").write_bytes(data)
        os.utime(tmp_path / "other", (LONG_AGO, LONG_AGO))
        os.replace(tmp_path / "other", path)
    else:
        path.unlink()
        path.write_bytes(data)

    assert state(store, data) is BlobState.SUSPECT


@BOTH
def test_links_and_modes_leave_a_stamp_as_it_is(tmp_path: Path, data: bytes):
    """They change no byte."""
    store = store_at(tmp_path)
    path = stamped(store, data)
    os.link(path, tmp_path / "link")
    os.chmod(path, 0o600)

    assert state(store, data) is BlobState.INTACT


@BOTH
def test_what_a_verification_found_damaged_is_suspect_whatever_its_stamp(tmp_path: Path, data: bytes):
    """A stamp can be forged."""
    store = store_at(tmp_path)
    stamped(store, data)
    store.blobs.note_suspect(Digest.of(data))

    assert state(store, data) is BlobState.SUSPECT


@BOTH
@pytest.mark.parametrize("damage", ["torn", "flipped", "unproven", "incomplete", "another blob's", "no stamp", "symlink"])
def test_a_table_that_is_not_exactly_this_blobs_vouches_for_nothing(tmp_path: Path, data: bytes, damage: str):
    """Its header and all its slots count."""
    store, digest = store_at(tmp_path), Digest.of(data)
    stamped(store, data)
    path = table_of(store, data)
    raw = path.read_bytes()
    table = PieceTable.decode(raw, digest)
    assert table is not None and table.stamp is not None
    if damage == "torn":
        raw = raw[:-1]
    elif damage == "flipped":
        raw = raw[:60] + bytes([raw[60] ^ 1]) + raw[61:]
    elif damage == "unproven":
        raw = replace(table, state=TableState.COMMITTING).encode()
    elif damage == "incomplete":
        raw = replace(table, slots=[*table.slots[:-1], None]).encode()
    elif damage == "another blob's":
        raw = replace(table, digest=Digest.of(b"other")).encode()
    elif damage == "no stamp":
        raw = replace(table, stamp=None).encode()
    path.unlink()
    path.write_bytes(raw)
    if damage == "symlink":
        path.rename(tmp_path / "table")
        path.symlink_to(tmp_path / "table")

    assert state(store, data) is BlobState.SUSPECT


def test_a_stamp_is_read_back_as_it_was_written():
    """Times before 1970 and inodes of 64 bits too."""
    stamp = ForeignStamp(2**64 - 1, -1, 2**63)
    table = PieceTable(Digest.of(BIG), len(BIG), stamp=stamp)

    again = PieceTable.decode(table.encode(), Digest.of(BIG))

    assert again == table and again is not None and again.stamp == stamp


# ---- writing one


def test_a_file_that_was_modified_just_now_gets_no_stamp(tmp_path: Path):
    """Another write in the same tick of the clock would leave the same mtime."""
    store = store_at(tmp_path)
    path = touched(store, BIG)
    os.utime(path)
    assert store.blobs.foreign_stamp(Digest.of(BIG)) is None

    os.utime(path, (time.time() - 10,) * 2)

    assert store.blobs.foreign_stamp(Digest.of(BIG)) is not None


def test_a_file_that_changed_while_it_was_read_gets_no_table(tmp_path: Path):
    """The stamp is older than the pass, so a write in between shows."""
    store, digest = store_at(tmp_path), Digest.of(SMALL)
    path = touched(store, SMALL)
    stamp, table = store.blobs.foreign_stamp(digest), prove(str(path), digest, len(SMALL))
    assert table is not None
    flip(path, 0)

    assert not store.blobs.stamp_foreign(digest, replace(table, stamp=stamp))
    assert not store.blobs.stamp_foreign(digest, table)
    assert not table_of(store, SMALL).exists()


def test_only_a_proven_table_is_written(tmp_path: Path):
    """Anything else would vouch for bytes that were not verified."""
    store, digest = store_at(tmp_path), Digest.of(SMALL)
    touched(store, SMALL)

    for table in PieceTable(digest, len(SMALL)), PieceTable(digest, len(SMALL), state=TableState.PROVEN):
        with pytest.raises(ValueError, match="not proven"):
            store.blobs.stamp_foreign(digest, table)


def test_a_stamp_clears_the_record_of_a_suspect(tmp_path: Path):
    """As the digest mtime does: the whole was read and is right."""
    store = store_at(tmp_path)
    touched(store, BIG)
    store.blobs.note_suspect(Digest.of(BIG))

    stamped(store, BIG)

    assert state(store, BIG) is BlobState.INTACT


# ---- the table goes with its blob


@BOTH
def test_a_repair_replaces_the_table(tmp_path: Path, data: bytes):
    """The new blob has the digest mtime; a small one has no table again."""
    store = store_at(tmp_path)
    path = stamped(store, data)
    flip(path, 0)

    store.ingest.add_bytes(data)

    table = proven_table(str(table_of(store, data)), Digest.of(data), len(data))
    assert state(store, data) is BlobState.INTACT and path.read_bytes() == data
    assert (table is not None) == (data is BIG) and (table is None or table.stamp is None)
    assert table_of(store, data).exists() == (data is BIG)


@BOTH
@pytest.mark.parametrize("how", ["sweep", "quarantine"])
def test_a_blob_that_goes_takes_its_table_along(tmp_path: Path, data: bytes, how: str):
    """Of whatever size it is."""
    store, digest = store_at(tmp_path), Digest.of(data)
    stamped(store, data)
    if how == "sweep":
        sweep.sweep(store, [digest])
    else:
        store.blobs.quarantine(digest)

    assert state(store, data) is BlobState.ABSENT and not table_of(store, data).exists()


def test_a_commit_that_finds_a_stamped_blob_keeps_both(tmp_path: Path):
    """It is intact, so its links and its stamp stay."""
    store = store_at(tmp_path)
    late = partial_with(store, BIG, 0, 1, 2)
    (tmp_path / "copy").write_bytes(BIG)
    os.utime(tmp_path / "copy", (LONG_AGO, LONG_AGO))
    path = Path(store.layout.blob(Digest.of(BIG)))
    os.rename(tmp_path / "copy", path)
    stamp, table = store.blobs.foreign_stamp(Digest.of(BIG)), prove(str(path), Digest.of(BIG), len(BIG))
    assert table is not None and store.blobs.stamp_foreign(Digest.of(BIG), replace(table, stamp=stamp))
    ino = path.stat().st_ino

    store.ingest.commit(late)

    assert path.stat().st_ino == ino and state(store, BIG) is BlobState.INTACT
    assert list(store.layout.partials.iterdir()) == []


def test_a_scrub_believes_the_pieces_of_a_stamped_table(tmp_path: Path):
    """It is a table like any other."""
    store, digest = store_at(tmp_path), Digest.of(BIG)
    path = stamped(store, BIG)
    target = ScrubTarget(path=str(path), digest=digest, size=len(BIG), table=str(table_of(store, BIG)))
    assert next(scrub([target], Level.FAST)).intact

    flip(path, 5, forge=True)

    assert next(scrub([target], Level.FAST)).bad_pieces == (0,)


# ---- a blob of another member of a shared store


def fetcher(store: BlobStore, folder: Path) -> Fetcher:
    """One without any source."""
    context = TransferContext(
        registry=Registry({}),
        base=folder,
        failures=FailureTable(),
        bad_sources=BadSources(store.layout.state_dir("bad-sources")),
        emit=lambda event: None,
        connections=Connections(1),
    )
    return Fetcher(store=store, context=context)


def obtain(store: BlobStore, folder: Path, data: bytes) -> object:
    request = BlobRequest(digest=Digest.of(data), size=len(data), urls=())
    return fetcher(store, folder).obtain_all([request])[Digest.of(data)]


@contextmanager
def as_user(uid: int) -> Iterator[None]:
    """Another effective user, of the same group."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


@root_only
@BOTH
def test_a_touched_blob_of_another_member_is_stamped_not_copied(tmp_path: Path, data: bytes):
    """It is read once; its inode, owner and mtime stay, and every tree shares it still."""
    store = store_at(tmp_path, shared=True)
    path = touched(store, data)
    before = path.stat()
    tmp_path.chmod(0o755)

    with as_user(1001):
        assert state(store, data) is BlobState.SUSPECT
        assert obtain(store, tmp_path, data) is False
        assert state(store, data) is BlobState.INTACT

    after = path.stat()
    assert (after.st_ino, after.st_uid, after.st_mtime_ns) == (before.st_ino, before.st_uid, before.st_mtime_ns)


@BOTH
@pytest.mark.parametrize("why", ["just modified", "no table can be written"])
def test_a_blob_that_cannot_be_stamped_is_copied(tmp_path: Path, data: bytes, why: str, monkeypatch: pytest.MonkeyPatch):
    """The copy carries the digest mtime."""
    store = store_at(tmp_path)
    path = touched(store, data)
    ino = path.stat().st_ino

    def refuse(*args: object) -> bool:
        raise PermissionError

    monkeypatch.setattr(store.blobs, "restamp", refuse)
    if why == "just modified":
        os.utime(path)
    else:
        monkeypatch.setattr(store.blobs, "stamp_foreign", refuse)

    assert obtain(store, tmp_path, data) is True
    assert path.stat().st_ino != ino and state(store, data) is BlobState.INTACT
    assert path.stat().st_mtime == Digest.of(data).mtime


def test_a_damaged_blob_is_not_stamped(tmp_path: Path):
    """What is wrong is fetched again, here without a source."""
    store = store_at(tmp_path)
    flip(touched(store, SMALL), 0)

    assert isinstance(obtain(store, tmp_path, SMALL), Exception)
    assert not table_of(store, SMALL).exists()


@pytest.mark.parametrize("data", [SMALL, BIG])
def test_the_other_tools_file_keeps_its_mode_and_times_when_it_touches_it(tmp_path: Path, data: bytes):
    """A stamped blob that was touched is read and stamped again, never given the digest's mtime."""
    store = store_at(tmp_path)
    foreign = tmp_path / "foreign"
    os.link(stamped(store, data), foreign)
    foreign.chmod(0o644)
    os.utime(foreign, (LONG_AGO + 60, LONG_AGO + 60))
    before = foreign.stat()

    obtain(store, tmp_path, data)

    assert (foreign.stat().st_mode, foreign.stat().st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    assert state(store, data) is BlobState.INTACT
