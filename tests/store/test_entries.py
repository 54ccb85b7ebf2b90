"""Entries that are no blobs: symlinks and small files that a tree gives in full."""

import errno
import os
import stat
from pathlib import Path

import pytest
from store_fixtures import MIDDLE, SMALL, store_at, umask

from modelstow.cas import EMPTY, BlobStore, Digest, Inline, LinkKind, LinkMode, Symlink, entries, materialise, tree
from modelstow.cas.entries import MAX_INLINE, MAX_TARGET, Other
from modelstow.cas.inventory import EntryColumns, InventoryEntry
from modelstow.cas.links import Linker
from modelstow.cas.materialise import TreeEntry
from modelstow.cas.tree import Quarantine

OTHERS: dict[str, Other] = {
    "refs/main": Inline(b"0123abcd"),
    "refs/none": Inline(b""),
    "snapshots/1/a": Symlink("../../blobs/a"),
    "absolute": Symlink("/nowhere"),
}
BLOBS = {"blobs/a": SMALL, "blobs/b": MIDDLE, "empty": b""}
KINDS = {
    "blobs/a": LinkKind.HARDLINK,
    "blobs/b": LinkKind.HARDLINK,
    "empty": LinkKind.EMPTY,
    "refs/main": LinkKind.INLINE,
    "refs/none": LinkKind.INLINE,
    "snapshots/1/a": LinkKind.LITERAL,
    "absolute": LinkKind.LITERAL,
}


def stored(tmp_path: Path) -> tuple[BlobStore, Path]:
    """A store with the blobs, and an empty folder for a tree."""
    store = store_at(tmp_path)
    for data in filter(None, BLOBS.values()):
        store.ingest.add_bytes(data)
    root = store.layout.trees / "tree"
    root.mkdir()
    return store, root


def items() -> dict[str, TreeEntry]:
    blobs = {path: TreeEntry(Digest.of(data), len(data)) for path, data in BLOBS.items()}
    return blobs | {path: TreeEntry.of(other) for path, other in OTHERS.items()}


def populated(tmp_path: Path, mode: LinkMode = LinkMode.AUTO) -> tuple[BlobStore, Path, dict[str, InventoryEntry]]:
    store, root = stored(tmp_path)
    return store, root, materialise.populate(root, items(), store.layout.blob, Linker(mode))


def assert_there(root: Path) -> None:
    for path, data in BLOBS.items():
        assert (root / path).read_bytes() == data
    assert {path: entries.read(f"{root}/{path}") for path in OTHERS} == OTHERS


@pytest.mark.parametrize("target", ["", "a\0b", "x" * (MAX_TARGET + 1), "é" * MAX_TARGET, "\ud800"])
def test_a_target_that_no_symlink_can_have_is_refused(target: str):
    """No bytes, a zero byte, too many bytes, no bytes of any name."""
    with pytest.raises(ValueError):
        Symlink(target)


def test_an_inline_file_is_small():
    """What is more is a blob."""
    assert Inline(bytes(MAX_INLINE)).content == bytes(MAX_INLINE)
    with pytest.raises(ValueError, match="1,048,576 bytes at most, not 1,048,577"):
        Inline(bytes(MAX_INLINE + 1))


def test_reading_a_path_gives_what_is_there_and_follows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Folders, pipes, large files and those that may not be read are nothing that could be an entry of this kind."""
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "large").write_bytes(bytes(MAX_INLINE + 1))
    (tmp_path / "secret").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    real = os.open

    def refusing(path, *how, **more):
        if str(path).endswith("secret"):  # root may read everything
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, *how, **more)

    monkeypatch.setattr(os, "open", refusing)

    names = ("file", "link", "large", "secret", "pipe", ".", "absent")
    found = {name: entries.read(f"{tmp_path}/{name}") for name in names}

    assert found.pop("file") == Inline(b"x") and found.pop("link") == Symlink("file")
    assert set(found.values()) == {None}


def test_the_digest_of_an_entry_is_that_of_its_bytes():
    """Of a symlink it is that of its target, as in git."""
    assert entries.digest_of(Inline(SMALL)) == entries.digest_of(Digest.of(SMALL)) == Digest.of(SMALL)
    assert entries.digest_of(Symlink("a/b")) == Digest.of(b"a/b")


@pytest.mark.parametrize("mode", LinkMode)
def test_entries_of_every_kind_are_placed_and_reported(tmp_path: Path, mode: LinkMode):
    """How blobs are linked makes no difference to the others."""
    _, root, placed = populated(tmp_path, mode)

    assert_there(root)
    assert {path: placed[path].kind for path in (*OTHERS, "empty")} == {p: KINDS[p] for p in (*OTHERS, "empty")}
    assert {path: placed[path].entry for path in OTHERS} == OTHERS
    assert all(tree.as_placed(f"{root}/{path}", entry) for path, entry in placed.items())


def test_a_new_tree_of_hardlinks_has_the_others_too(tmp_path: Path):
    """What was expected is the record; an inline file is 0644 whatever the umask, as an empty one is."""
    store, root = stored(tmp_path)
    expected = EntryColumns.of(
        {
            path: InventoryEntry(
                item.digest,
                KINDS[path],
                os.stat(store.layout.blob(item.digest)).st_ino if KINDS[path] is LinkKind.HARDLINK else 0,
                other=item.other,
            )
            for path, item in items().items()
        }
    )

    with umask(0o077):
        assert materialise.link_all(root, expected, store.layout.blobs) is expected

    assert_there(root)
    assert all(tree.as_placed(f"{root}/{path}", entry) for path, entry in expected.items())
    assert {stat.S_IMODE((root / path).stat().st_mode) for path in ("refs/main", "refs/none", "empty")} == {0o644}


def test_an_entry_replaces_a_file_in_one_step(tmp_path: Path):
    """Whatever kind either is of; nothing is left next to it, and no symlink that is replaced is followed."""
    store, root = stored(tmp_path)
    outside = tmp_path / "outside"
    outside.write_text("mine")
    for path in items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).symlink_to(outside)

    materialise.populate(root, items(), store.layout.blob, Linker(LinkMode.AUTO), replace=True)
    materialise.populate(root, items(), store.layout.blob, Linker(LinkMode.AUTO), replace=True)

    assert_there(root)
    found = tree.scan(root)
    assert found is not None and found.files.keys() == items().keys()
    assert outside.read_text() == "mine"


def test_nothing_is_placed_through_a_symlink_of_the_tree(tmp_path: Path):
    """An entry below it is an error, and the folder that it leads to stays empty."""
    store, root = stored(tmp_path)
    linker, blob = Linker(LinkMode.AUTO), store.layout.blob
    (tmp_path / "outside").mkdir()
    link, file = TreeEntry.of(Symlink(str(tmp_path / "outside"))), TreeEntry.of(Inline(b"x"))

    with pytest.raises(OSError):
        materialise.populate(root, {"deep": link, "deep/file": file}, blob, linker)
    materialise.populate(root, {"link": link}, blob, linker)
    with pytest.raises(OSError):
        materialise.populate(root, {"link/file": file}, blob, linker, replace=True)

    assert list((tmp_path / "outside").iterdir()) == []


def test_a_changed_entry_is_the_users_and_an_equal_one_is_ours(tmp_path: Path):
    """Content counts, since it is small: another target or other bytes are an edit, another inode is none."""
    store, root, placed = populated(tmp_path)
    for path in ("absolute", "snapshots/1/a", "refs/main", "refs/none"):
        (root / path).unlink()
    (root / "absolute").symlink_to("/elsewhere")
    (root / "snapshots/1/a").write_bytes(SMALL)
    (root / "refs/main").write_bytes(b"0123abcd")
    (root / "refs/none").write_text("no more")
    (root / "refs/mine").symlink_to("main")
    quarantine = Quarantine(store.layout.quarantine, "test")

    found = tree.classify(root, placed)
    gone = tree.remove_managed(root, placed, quarantine)

    assert set(found.edited) == {"absolute", "snapshots/1/a", "refs/none"} and found.theirs == ["refs/mine"]
    assert not gone and [str(p.relative_to(root)) for p in root.rglob("*")] == ["refs", "refs/mine"]
    assert quarantine.displaced.quarantined.keys() == set(found.edited)


def test_entries_that_are_no_blobs_have_the_digest_of_zero_bytes_on_record(tmp_path: Path):
    """So that they keep no blob."""
    _, _, placed = populated(tmp_path)

    assert {placed[path].digest for path in OTHERS} == {EMPTY}
