"""Blobs that are committed together: each succeeds or fails on its own, and the disk is synced once."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from store_fixtures import partial_with, put, store_at

from modelstow.cas import BlobState, BlobStore, ChecksumError, Digest, LockTimeoutError, syscalls
from modelstow.cas.partial import Partial

DATA = [b"blob %d" % n for n in range(40)]


def filled(store: BlobStore, data: bytes) -> Partial:
    return partial_with(store, data, 0)


def intact(store: BlobStore) -> list[bytes]:
    return [data for data in DATA if store.blobs.stat(Digest.of(data), len(data)).state is BlobState.INTACT]


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot be synced as a whole."""
    monkeypatch.setattr(syscalls, "is_local", lambda fd: False)


@contextmanager
def failing_fsync(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> Iterator[list[int]]:
    """fsync of what *fails*, by its inode, ends with EIO; the inodes that were synced or were to be."""
    asked, real = [], os.fsync

    def fsync(fd: int) -> None:
        inode = os.fstat(fd).st_ino
        asked.append(inode)
        if fails(inode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        yield asked


@pytest.mark.usefixtures("one_by_one")
def test_several_partials_become_blobs_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every file is synced, and every folder once, whatever number of blobs it takes."""
    store = store_at(tmp_path)
    partials = [filled(store, data) for data in DATA]
    folders = {os.path.dirname(store.layout.blob(partial.digest)) for partial in partials}
    files = {os.fstat(partial.fd).st_ino for partial in partials}

    with failing_fsync(monkeypatch, lambda inode: False) as asked:
        assert store.ingest.commit_all(partials) == {}

    assert intact(store) == DATA and list(store.layout.partials.iterdir()) == []
    assert set(asked[: len(DATA)]) == files, "no name before its bytes"
    assert sorted(asked[len(DATA) :]) == sorted(os.stat(folder).st_ino for folder in folders)
    assert len(folders) < len(DATA), "or this showed nothing"


@pytest.mark.usefixtures("one_by_one")
def test_a_file_that_cannot_be_synced_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is thrown away; its neighbours are blobs."""
    store = store_at(tmp_path)
    partials = [filled(store, data) for data in DATA]
    broken = os.fstat(partials[3].fd).st_ino

    with failing_fsync(monkeypatch, lambda inode: inode == broken) as asked:
        failed = store.ingest.commit_all(partials)

    assert list(failed) == [partials[3].digest] and isinstance(failed[partials[3].digest], OSError)
    assert intact(store) == [data for data in DATA if data != DATA[3]]
    assert list(store.layout.partials.iterdir()) == [] and asked.count(broken) == 1


@pytest.mark.usefixtures("one_by_one")
def test_a_folder_that_cannot_be_synced_fails_all_that_went_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is asked once: the second answer would hide the first."""
    store = store_at(tmp_path)
    partials = [filled(store, data) for data in DATA]
    by_folder: dict[str, set[Digest]] = {}
    for partial in partials:
        by_folder.setdefault(os.path.dirname(store.layout.blob(partial.digest)), set()).add(partial.digest)
    folder, digests = max(by_folder.items(), key=lambda item: len(item[1]))
    broken = os.stat(folder).st_ino

    with failing_fsync(monkeypatch, lambda inode: inode == broken) as asked:
        failed = store.ingest.commit_all(partials)

    assert set(failed) == digests and len(digests) > 1 and asked.count(broken) == 1
    assert intact(store) == DATA, "the names are there, though it is not guaranteed that they stay"


def test_wrong_bytes_among_right_ones_stay_a_partial(tmp_path: Path):
    """For the caller to judge; the right ones are blobs."""
    store = store_at(tmp_path)
    wrong = store.ingest.open(Digest.of(b"right"), 5)
    put(wrong, b"wrong", 0)

    failed = store.ingest.commit_all([wrong, filled(store, DATA[0])])

    assert list(failed) == [wrong.digest] and isinstance(failed[wrong.digest], ChecksumError)
    assert intact(store) == [DATA[0]] and os.path.exists(wrong.path)
    wrong.close_or_discard()


def test_a_damaged_blob_among_them_gives_way(tmp_path: Path):
    """Those that are to be replaced are named; the old one goes to quarantine."""
    store = store_at(tmp_path)
    digest = store.ingest.add_bytes(DATA[0])
    old = os.stat(store.layout.blob(digest)).st_ino

    assert store.ingest.commit_all([filled(store, data) for data in DATA[:3]], replace=[digest]) == {}

    assert intact(store) == DATA[:3] and os.stat(store.layout.blob(digest)).st_ino != old
    assert [os.stat(path).st_ino for path in store.layout.quarantine.iterdir()] == [old]


def test_a_partial_that_another_process_restarted_is_not_published(tmp_path: Path):
    """Where file locks are unreliable its name is another process's unfinished file: it is no blob, and stays there."""
    store = store_at(tmp_path)
    mine = filled(store, DATA[0])
    theirs = store.ingest.open(mine.digest, mine.size)

    failed = store.ingest.commit_all([mine])

    assert isinstance(failed[mine.digest], LockTimeoutError) and intact(store) == [] and theirs.owns_path
    theirs.write(0, DATA[0])
    store.ingest.commit(theirs)
    assert intact(store) == DATA[:1]


def test_a_partial_that_cannot_be_removed_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its neighbours are blobs."""
    store = store_at(tmp_path)
    partials = [filled(store, data) for data in DATA[:3]]
    real = os.unlink

    def unlink(path: str) -> None:
        if path == partials[1].path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        real(path)

    monkeypatch.setattr(os, "unlink", unlink)

    assert list(store.ingest.commit_all(partials)) == [partials[1].digest]
    assert set(intact(store)) >= {DATA[0], DATA[2]}


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A file system that is synced as a whole; what happens, in order."""
    happened: list[str] = []
    link = os.link

    def linked(*args: object, **options: object) -> None:
        happened.append("link")
        link(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(syscalls, "is_local", lambda fd: True)
    monkeypatch.setattr(syscalls, "syncfs", lambda fd: happened.append("syncfs"))
    monkeypatch.setattr(syscalls, "check_written", lambda fd: happened.append("check"))
    monkeypatch.setattr(os, "link", linked)
    return happened


def test_many_files_are_synced_by_one_call_before_their_names_and_by_one_after(tmp_path: Path, whole: list[str]):
    """No name before its bytes are durable, and no success before its name is."""
    store, data = store_at(tmp_path), [b"%d" % n for n in range(40)]

    assert store.ingest.commit_all([filled(store, each) for each in data]) == {}

    assert whole == ["syncfs", *["check"] * 40, *["link"] * 40, "syncfs"]


def test_a_file_system_that_cannot_be_synced_fails_the_whole_group_and_is_not_asked_twice(
    tmp_path: Path, whole: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Nothing that could not be synced is kept: a second call would say that all is well."""
    store, data = store_at(tmp_path), [b"%d" % n for n in range(40)]
    asked: list[int] = []

    def syncfs(fd: int) -> None:
        asked.append(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(syscalls, "syncfs", syncfs)
    failed = store.ingest.commit_all([filled(store, each) for each in data])

    assert len(failed) == 40 and len(asked) == 1 and "link" not in whole
    assert list(store.layout.partials.iterdir()) == [] and not list(store.blobs.entries())


def test_a_write_that_failed_before_fails_its_file_alone(tmp_path: Path, whole: list[str], monkeypatch: pytest.MonkeyPatch):
    """The sync of the whole may have been told to another process; the file itself still knows."""
    store, data = store_at(tmp_path), [b"%d" % n for n in range(40)]
    partials = [filled(store, each) for each in data]

    def check(fd: int) -> None:
        if fd == partials[7].fd:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(syscalls, "check_written", check)
    failed = store.ingest.commit_all(partials)

    assert list(failed) == [partials[7].digest]
    assert len(list(store.blobs.entries())) == 39


def test_the_real_calls_sync_a_real_file_system(tmp_path: Path):
    """Forty blobs by syncfs(2) where this file system has it, and one by one where it has not."""
    store, data = store_at(tmp_path), [b"%d" % n for n in range(40)]

    assert store.ingest.commit_all([filled(store, each) for each in data]) == {}

    assert {digest for digest, _ in store.blobs.entries()} == set(map(Digest.of, data))
