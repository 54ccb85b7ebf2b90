"""The life of a blob: commit, and what may go wrong at each step of it."""

import errno
import os
import stat
from pathlib import Path

import pytest
from store_fixtures import BIG, MIDDLE, SMALL, flip, mounted, partial_with, put, root_only, store_at, umask

from modelstow.cas import EMPTY, BlobState, BlobStore, ChecksumError, Digest
from modelstow.cas.pieces import proven_table

DIGEST = Digest.of(BIG)


def look(store: BlobStore, data: bytes) -> BlobState:
    return store.blobs.stat(Digest.of(data), len(data)).state


def quarantined(store: BlobStore) -> list[Path]:
    return list(store.layout.quarantine.iterdir())


@pytest.mark.parametrize("data", [b"x", SMALL, bytes(1 << 20), MIDDLE, BIG], ids=["1", "11", "1MiB", ">1MiB", ">16MiB"])
def test_a_committed_blob_is_under_its_name_with_its_integrity_stamp(tmp_path: Path, data: bytes):
    """Mode 0444, the mtime of its digest, one link, a table from 1 MiB on, and nothing left in partial/."""
    store = store_at(tmp_path)

    digest = store.ingest.add_bytes(data)

    path = store.layout.blob(digest)
    found = os.stat(path)
    assert digest == Digest.of(data) and Path(path).read_bytes() == data
    assert stat.S_IMODE(found.st_mode) == 0o444 and found.st_nlink == 1
    assert found.st_mtime_ns == digest.mtime * 10**9
    assert os.path.exists(store.layout.table(digest)) == (len(data) > 1 << 20)
    assert (proven_table(store.layout.table(digest), digest, len(data)) is not None) == (len(data) > 1 << 20)
    assert list(store.layout.partials.iterdir()) == []
    assert store.blobs.stat(digest, len(data)).state is BlobState.INTACT
    assert [d for d, _ in store.blobs.entries()] == [digest]


def test_the_store_keeps_no_blob_of_no_bytes(tmp_path: Path):
    """Empty files are created, never linked."""
    store = store_at(tmp_path)

    assert store.ingest.add_bytes(b"") == EMPTY
    assert [digest for digest, _ in store.blobs.entries()] == []


def test_nothing_unproven_carries_a_blobs_name(tmp_path: Path):
    """The name appears with the commit, whole."""
    store = store_at(tmp_path)
    partial = partial_with(store, BIG, 0, 1, 2)

    assert look(store, BIG) is BlobState.ABSENT
    store.ingest.commit(partial)
    assert look(store, BIG) is BlobState.INTACT


def test_the_steps_of_a_commit_come_in_the_order_that_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Mode and mtime, fsync of the file, link, unlink, fsync of the folder, and the table last."""
    store = store_at(tmp_path)
    partial = partial_with(store, BIG, 0, 1, 2)
    steps: list[str] = []
    data, folder = os.fstat(partial.fd).st_ino, os.stat(os.path.dirname(store.layout.blob(DIGEST))).st_ino

    def spy(name: str, describe=lambda *args: ""):
        real = getattr(os, name)

        def call(*args, **more):
            steps.append(f"{name}{describe(*args)}")
            return real(*args, **more)

        monkeypatch.setattr(os, name, call)

    names = {data: " file", folder: " folder"}
    spy("fsync", lambda fd: names.get(os.fstat(fd).st_ino, " other"))
    spy("fchmod"), spy("utime"), spy("link"), spy("unlink"), spy("replace")

    store.ingest.commit(partial)

    assert sorted(steps[:2]) == ["fchmod", "utime"]
    assert steps[2:7] == ["fsync file", "link", "unlink", "fsync folder", "replace"]


def test_a_failed_fsync_discards_the_partial_and_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The page cache is wrong from then on: the file is discarded (F2)."""
    store = store_at(tmp_path)
    partial = partial_with(store, BIG, 0, 1, 2)
    data, asked, real = os.fstat(partial.fd).st_ino, [], os.fsync

    def failing(fd: int) -> None:
        if os.fstat(fd).st_ino == data:
            asked.append(fd)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    monkeypatch.setattr(os, "fsync", failing)

    with pytest.raises(OSError, match="Input/output"):
        store.ingest.commit(partial)

    assert len(asked) == 1
    assert look(store, BIG) is BlobState.ABSENT
    assert list(store.layout.partials.iterdir()) == []
    assert store.ingest.open(DIGEST, len(BIG)).held_bytes == 0


def test_a_folder_that_cannot_be_synced_fails_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing was acknowledged, so nothing is lost; trying again succeeds."""
    store = store_at(tmp_path)
    partial = partial_with(store, BIG, 0, 1, 2)
    folder, real, failures = os.stat(os.path.dirname(store.layout.blob(DIGEST))).st_ino, os.fsync, [True]

    def failing(fd: int) -> None:
        if os.fstat(fd).st_ino == folder and failures:
            failures.pop()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output"):
        store.ingest.commit(partial)

    store.ingest.add_bytes(BIG)

    assert look(store, BIG) is BlobState.INTACT and Path(store.layout.blob(DIGEST)).read_bytes() == BIG
    assert list(store.layout.partials.iterdir()) == []


def test_a_good_blob_that_is_there_already_is_success(tmp_path: Path):
    """Where file locks are unreliable two processes may fetch it; the first stays, with all its links (C8)."""
    store = store_at(tmp_path)
    late = partial_with(store, BIG, 0, 1, 2)
    other = tmp_path / "other"
    other.write_bytes(BIG)
    os.utime(other, (DIGEST.mtime, DIGEST.mtime))
    os.rename(other, store.layout.blob(DIGEST))
    ino = os.stat(store.layout.blob(DIGEST)).st_ino

    store.ingest.commit(late)

    assert os.stat(store.layout.blob(DIGEST)).st_ino == ino
    assert list(store.layout.partials.iterdir()) == [] and quarantined(store) == []


def test_a_link_that_was_made_before_the_crash_is_success(tmp_path: Path):
    """The blob's name is our own inode already."""
    store = store_at(tmp_path)
    partial = partial_with(store, BIG, 0, 1, 2)
    os.link(partial.path, store.layout.blob(DIGEST))

    store.ingest.commit(partial)

    assert look(store, BIG) is BlobState.INTACT and os.stat(store.layout.blob(DIGEST)).st_nlink == 1
    assert quarantined(store) == []


def test_a_damaged_blob_goes_to_quarantine_before_the_good_one_takes_its_name(tmp_path: Path):
    """Its bytes may be the user's edit."""
    store = store_at(tmp_path)
    store.ingest.add_bytes(BIG)
    flip(store.layout.blob(DIGEST), 5)
    damaged = Path(store.layout.blob(DIGEST)).read_bytes()
    assert look(store, BIG) is BlobState.SUSPECT

    store.ingest.commit(partial_with(store, BIG, 0, 1, 2))

    assert look(store, BIG) is BlobState.INTACT
    assert [path.read_bytes() for path in quarantined(store)] == [damaged]
    assert proven_table(store.layout.table(DIGEST), DIGEST, len(BIG)) is not None


@pytest.mark.parametrize("kind", ["folder", "symlink"])
def test_what_is_no_file_where_a_blob_should_be_goes_to_quarantine(tmp_path: Path, kind: str):
    """It is never followed (F10)."""
    store = store_at(tmp_path)
    mine = tmp_path / "mine"
    mine.write_bytes(SMALL)
    os.utime(mine, (Digest.of(SMALL).mtime,) * 2)
    path = Path(store.layout.blob(Digest.of(SMALL)))
    path.mkdir() if kind == "folder" else path.symlink_to(mine)
    assert look(store, SMALL) is BlobState.SUSPECT

    store.ingest.add_bytes(SMALL)

    assert look(store, SMALL) is BlobState.INTACT and path.is_file() and not path.is_symlink()
    assert len(quarantined(store)) == 1 and mine.read_bytes() == SMALL


def test_replace_makes_a_new_inode_even_of_an_intact_blob(tmp_path: Path):
    """A repair never writes into an inode that trees share."""
    store = store_at(tmp_path)
    store.ingest.add_bytes(BIG)
    before = os.stat(store.layout.blob(DIGEST)).st_ino

    store.ingest.commit(partial_with(store, BIG, 0, 1, 2), replace=True)

    assert os.stat(store.layout.blob(DIGEST)).st_ino != before and look(store, BIG) is BlobState.INTACT
    assert [path.stat().st_ino for path in quarantined(store)] == [before]


def test_wrong_bytes_are_refused(tmp_path: Path):
    """sha256 alone is trust."""
    store = store_at(tmp_path)
    partial = store.ingest.open(DIGEST, len(BIG))
    put(partial, bytes(len(BIG)), 0, 1, 2)

    with pytest.raises(ChecksumError):
        store.ingest.commit(partial)
    assert list(store.blobs.entries()) == []


def test_a_copy_of_what_is_not_the_blob_leaves_nothing(tmp_path: Path):
    """A spare that only looked right."""
    store = store_at(tmp_path)
    (tmp_path / "spare").write_bytes(bytes(len(BIG)))

    with open(tmp_path / "spare", "rb") as file, pytest.raises(ChecksumError):
        store.ingest.copy(file.fileno(), DIGEST, len(BIG))
    with open(tmp_path / "spare", "rb") as file, pytest.raises(ChecksumError):
        store.ingest.copy(file.fileno(), Digest.of(BIG + b"x" * len(BIG)), 2 * len(BIG))
    assert list(store.blobs.entries()) == [] and list(store.layout.partials.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "state"),
    [
        (lambda path: None, BlobState.INTACT),
        (lambda path: os.chmod(path, 0o600), BlobState.INTACT),
        (lambda path: os.link(path, f"{path}.link"), BlobState.INTACT),
        (lambda path: os.utime(path), BlobState.SUSPECT),
        (lambda path: flip(path, 0), BlobState.SUSPECT),
        (lambda path: os.truncate(path, 3), BlobState.SUSPECT),
        (lambda path: os.unlink(path), BlobState.ABSENT),
    ],
    ids=["nothing", "chmod", "link", "touch", "edit", "cut", "unlink"],
)
def test_one_stat_distinguishes_an_edit_from_a_mere_touch(tmp_path: Path, damage, state: BlobState):
    """Any write through any link changes the mtime; chmod, link and unlink keep it."""
    store = store_at(tmp_path)
    store.ingest.add_bytes(SMALL)

    damage(store.layout.blob(Digest.of(SMALL)))

    assert look(store, SMALL) is state


def test_a_blob_of_another_size_is_never_intact(tmp_path: Path):
    """The lock's size is part of the question."""
    store = store_at(tmp_path)
    digest = store.ingest.add_bytes(SMALL)

    assert store.blobs.stat(digest, len(SMALL) + 1).state is BlobState.SUSPECT


def test_a_suspect_stays_one_for_other_processes_until_it_is_committed_again(tmp_path: Path):
    """What a verification found is on record on disk."""
    store = store_at(tmp_path)
    digest = store.ingest.add_bytes(SMALL)
    store.blobs.note_suspect(digest)

    other = BlobStore.open(tmp_path / "root")
    assert other.blobs.stat(digest, len(SMALL)).state is BlobState.SUSPECT
    store.ingest.commit(partial_with(store, SMALL, 0))
    other.blobs.refresh()

    assert other.blobs.stat(digest, len(SMALL)).state is BlobState.INTACT


def test_restamping_gives_a_touched_blob_its_digest_mtime_back(tmp_path: Path):
    """A touched file costs reading, not fetching."""
    store = store_at(tmp_path)
    digest = store.ingest.add_bytes(SMALL)
    os.utime(store.layout.blob(digest))
    os.chmod(store.layout.blob(digest), 0o644)

    assert store.blobs.restamp(digest, os.lstat(store.layout.blob(digest)))

    assert look(store, SMALL) is BlobState.INTACT
    assert stat.S_IMODE(os.stat(store.layout.blob(digest)).st_mode) == 0o444


def test_a_blob_that_was_written_to_since_it_was_read_is_not_restamped(tmp_path: Path):
    """Its digest mtime would hide the write."""
    store = store_at(tmp_path)
    path = Path(store.layout.blob(store.ingest.add_bytes(SMALL)))
    before = os.lstat(path)
    path.chmod(0o644)
    path.write_bytes(bytes(len(SMALL)))

    assert not store.blobs.restamp(Digest.of(SMALL), before)

    assert look(store, SMALL) is BlobState.SUSPECT


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_modes_are_explicit_whatever_the_umask(tmp_path: Path, mask: int):
    """A private store is 0700 and its blobs 0444 (M3)."""
    with umask(mask):
        store = store_at(tmp_path)
        digest = store.ingest.add_bytes(MIDDLE)

    folders = [store.layout.root, store.layout.trees, store.layout.partials, store.layout.state, store.layout.locks]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o700}
    assert stat.S_IMODE(os.stat(store.layout.blob(digest)).st_mode) == 0o444
    assert stat.S_IMODE((store.layout.locks / "store").stat().st_mode) == 0o600


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_a_shared_store_is_the_groups_whatever_the_umask(tmp_path: Path, mask: int):
    """Folders 2775, lock files 0664: the next user must be able to take them (M1, M5)."""
    with umask(mask):
        store = store_at(tmp_path, shared=True)
        digest = store.ingest.add_bytes(MIDDLE)

    folders = [store.layout.root, store.layout.trees, store.layout.partials, store.layout.state, store.layout.locks]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o2775}
    assert stat.S_IMODE(os.stat(store.layout.blob(digest)).st_mode) == 0o444
    assert {stat.S_IMODE(path.stat().st_mode) for path in store.layout.locks.iterdir()} == {0o664}


@root_only
def test_a_full_disk_is_a_clean_error_and_nothing_is_published(tmp_path: Path):
    """ENOSPC in the middle of a blob; what is on record stays for the next run (F1)."""
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=12m", "tmpfs") as folder:
        store = store_at(folder)
        partial = partial_with(store, BIG, 0)

        with pytest.raises(OSError) as caught:
            put(partial, BIG, 1)
        partial.close_or_discard()

        assert caught.value.errno == errno.ENOSPC
        assert list(store.blobs.entries()) == []
        assert store.held_in_partial(DIGEST, len(BIG)) == 8 << 20


@root_only
def test_a_disk_without_inodes_is_a_clean_error(tmp_path: Path):
    """EMFILE's cousin: no room for a name (F1)."""
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=8m,nr_inodes=290", "tmpfs") as folder:
        store = store_at(folder)

        with pytest.raises(OSError) as caught:
            for number in range(100):
                store.ingest.add_bytes(b"%d" % number)

        assert caught.value.errno == errno.ENOSPC
        assert all(Digest.of_path(entry.path) == digest for digest, entry in store.blobs.entries())


def test_a_late_writer_cannot_reach_a_published_blob_through_its_partial(tmp_path: Path):
    """No descriptor of ours outlives the commit (D5)."""
    store = store_at(tmp_path)
    partial = partial_with(store, BIG, 0, 1, 2)

    store.ingest.commit(partial)

    assert partial.fd < 0
    with pytest.raises(OSError):
        partial.write(0, b"late")
    assert Digest.of_path(store.layout.blob(DIGEST)) == DIGEST


def test_a_fetch_is_told_whether_another_process_committed_this_very_blob(tmp_path: Path):
    """Two that force a download at once share one fetch."""
    store = store_at(tmp_path)
    one, other = Digest.of(b"one"), Digest.of(b"other")
    before = store.commits_seen(one)

    with store.lock_blob(one, doing="a test") as lock:
        store.note_commit(lock, one)

    assert before == "" and store.commits_seen(one) != ""
    assert store.commits_seen(other) == ""


def test_foreign_names_next_to_blobs_are_passed_over(tmp_path: Path):
    """Leftovers of other tools are no blobs."""
    store = store_at(tmp_path)
    for name in ("ab/README", f"ab/{'0' * 64}", f"ab/ab{'Z' * 62}", "ab/.nfs0001"):
        (store.layout.blobs / name).write_text("x")

    assert list(store.blobs.entries()) == []
