"""The ways into a store: what is proven, what is durable, and what a failure leaves."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_fixtures import MIDDLE, store_at

from modelstow.cas import EMPTY, BlobState, BlobStore, Digest
from modelstow.cas.ingest import SMALL, Incoming
from modelstow.cas.scrub import hash_file


def intact(store: BlobStore, data: bytes) -> bool:
    return store.blobs.stat(Digest.of(data), len(data)).state is BlobState.INTACT


def test_many_small_files_become_blobs_in_order_and_leave_nothing_else(tmp_path: Path):
    """Several groups, equal files and empty ones among them: one blob a digest, and no partial."""
    store = store_at(tmp_path)
    data = [b"%d" % (number % 700) for number in range(1000)] + [b"", b"x" * SMALL]

    assert list(store.ingest.add_small(data)) == [Digest.of(each) for each in data]

    assert all(intact(store, each) for each in set(data) - {b""})
    assert len(list(store.blobs.entries())) == 701 and list(store.layout.partials.iterdir()) == []
    assert not os.path.exists(store.layout.blob(EMPTY))
    mode = os.stat(store.layout.blob(Digest.of(b"1"))).st_mode
    assert mode & 0o777 == 0o444


def test_a_digest_is_yielded_when_its_group_is_durable(tmp_path: Path):
    """What comes later may fail: what was yielded stays."""
    store = store_at(tmp_path)

    def contents():
        yield from (b"%d" % number for number in range(300))
        raise RuntimeError("the source broke")

    got = []
    with pytest.raises(RuntimeError):
        got.extend(store.ingest.add_small(contents()))

    assert all(intact(store, b"%d" % number) for number in range(250))
    assert list(store.layout.partials.iterdir()) == []


def test_a_damaged_blob_of_that_name_gives_way_and_a_good_one_stays(tmp_path: Path):
    """As for every other way in: the damaged one goes to quarantine."""
    store = store_at(tmp_path)
    good, bad = store.ingest.add_bytes(b"good"), store.ingest.add_bytes(b"bad!")
    inode = os.stat(store.layout.blob(good)).st_ino
    os.chmod(store.layout.blob(bad), 0o644)
    Path(store.layout.blob(bad)).write_bytes(b"rot!")

    assert list(store.ingest.add_small([b"good", b"bad!"])) == [good, bad]

    assert os.stat(store.layout.blob(good)).st_ino == inode and Path(store.layout.blob(bad)).read_bytes() == b"bad!"
    assert len(list(store.layout.quarantine.iterdir())) == 1


def test_where_files_without_names_cannot_be_had_they_get_one_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Some file systems refuse O_TMPFILE."""
    store, real = store_at(tmp_path), os.open

    def refuse(path: str, flags: int, *args: object, **options: object) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)

    assert list(store.ingest.add_small([b"a", b"b"])) == [Digest.of(b"a"), Digest.of(b"b")]
    assert intact(store, b"a") and intact(store, b"b") and list(store.layout.partials.iterdir()) == []


def test_a_full_disk_keeps_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The error comes through; the groups before are kept."""
    store = store_at(tmp_path)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("modelstow.cas.ingest.write_all", full)
    with pytest.raises(OSError, match="No space"):
        list(store.ingest.add_small([b"a"]))
    assert list(store.layout.partials.iterdir()) == [] and not list(store.blobs.entries())


@given(st.lists(st.binary(max_size=3), max_size=8))
def test_whatever_comes_in_is_its_name(tmp_path_factory: pytest.TempPathFactory, data: list[bytes]):
    """A law over small colliding files."""
    store = store_at(tmp_path_factory.mktemp("store"))

    assert list(store.ingest.add_small(data)) == [Digest.of(each) for each in data]
    for digest, entry in store.blobs.entries():
        assert Digest.of(Path(entry.path).read_bytes()) == digest


def write(incoming: Incoming, data: bytes) -> None:
    os.pwrite(incoming.fd, data, 0)


@pytest.mark.parametrize("how", ["symlink", "dangling", "hardlink", "pipe", "folder"])
def test_a_journal_is_never_written_through_what_has_its_name(tmp_path: Path, how: str):
    """Another user may have laid it there for a file of this one (F10)."""
    store, mine = store_at(tmp_path), tmp_path / "bashrc"
    mine.write_text("alias")
    digest = Digest.of(MIDDLE)
    journal = Path(store.layout.journal(digest))
    lay = {
        "symlink": lambda: journal.symlink_to(mine),
        "dangling": lambda: journal.symlink_to(tmp_path / "made"),
        "hardlink": lambda: os.link(mine, journal),
        "pipe": lambda: os.mkfifo(journal),
        "folder": journal.mkdir,
    }
    for enters in ("take", "open"):
        lay[how]()
        if enters == "take":
            with store.ingest.incoming() as incoming:
                write(incoming, MIDDLE)
                store.ingest.take(incoming, hash_file(incoming.fd, len(MIDDLE)))
        else:
            os.unlink(store.layout.blob(digest))
            os.unlink(store.layout.table(digest))
            store.ingest.add_bytes(MIDDLE)
        assert intact(store, MIDDLE) and mine.read_text() == "alias" and not (tmp_path / "made").exists()
    assert list(store.layout.partials.iterdir()) == []


def test_an_incoming_file_of_ones_own_is_continued(tmp_path: Path):
    """By its key."""
    store = store_at(tmp_path)
    with store.ingest.incoming("key") as incoming:
        write(incoming, b"half")
    with store.ingest.incoming("key") as incoming:
        assert incoming.held == 4


@pytest.mark.parametrize("how", ["another user's", "symlink", "hardlink", "pipe", "folder"])
def test_an_incoming_file_that_this_user_did_not_make_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
):
    """Its name can be guessed, and what is in it would be locked as what the source sent (M2, F10)."""
    store, mine = store_at(tmp_path), tmp_path / "mine"
    mine.write_text("mine")
    with store.ingest.incoming("key") as incoming:
        path = Path(incoming.path)
    lay = {
        "another user's": lambda: path.write_text("poison"),
        "symlink": lambda: path.symlink_to(mine),
        "hardlink": lambda: os.link(mine, path),
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
    }
    lay[how]()
    if how == "another user's":
        monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with store.ingest.incoming("key") as incoming:
        assert incoming.held == 0
        write(incoming, b"right")

    assert mine.read_text() == "mine" and list(store.layout.partials.iterdir()) == [path]
