"""Folders of linked blobs: what is placed, what is drained, and what is never touched."""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import pytest
from store_fixtures import MIDDLE, SMALL, age, store_at, umask

from modelstow.cas import EMPTY, BlobStore, Digest, LinkKind, LinkMode, materialise, trash, tree
from modelstow.cas.inventory import EntryColumns, Inventory, InventoryEntry
from modelstow.cas.links import Linker
from modelstow.cas.materialise import TreeEntry
from modelstow.cas.tree import Quarantine

CONTENT = {"a": SMALL, "deep/er/b": MIDDLE, "deep/c": SMALL, "deep/empty": b""}


def populated(
    tmp_path: Path, name: str = "tree", content: dict[str, bytes] = CONTENT
) -> tuple[BlobStore, Path, dict[str, InventoryEntry]]:
    """A store and a folder with *content*, linked."""
    store = store_at(tmp_path)
    for data in content.values():
        if data:
            store.ingest.add_bytes(data)
    root = store.layout.trees / name
    root.mkdir()
    return store, root, materialise.populate(root, items(content), store.layout.blob, Linker(LinkMode.AUTO))


def items(content: dict[str, bytes]) -> dict[str, TreeEntry]:
    return {path: TreeEntry(Digest.of(data), len(data)) for path, data in content.items()}


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def read_inside(root: Path) -> tuple[bytes, ...]:
    """Two files of one folder, even if its name is switched in between."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    found = []
    for name in ("version", "a"):
        fd = os.open(name, os.O_RDONLY, dir_fd=folder)
        found.append(os.read(fd, 100))
        os.close(fd)
    os.close(folder)
    return tuple(found)


def quarantine_of(store: BlobStore) -> Quarantine:
    return Quarantine(store.layout.quarantine, "test")


def test_what_is_populated_is_placed_and_reported(tmp_path: Path):
    """Each path with its digest, kind of link and inode, in the order asked for."""
    _, root, placed = populated(tmp_path)

    assert contents(root) == CONTENT and list(placed) == list(CONTENT)
    assert {path: p.kind for path, p in placed.items()} == {
        "a": LinkKind.HARDLINK,
        "deep/er/b": LinkKind.HARDLINK,
        "deep/c": LinkKind.HARDLINK,
        "deep/empty": LinkKind.EMPTY,
    }
    assert all(placed[path].ino == (root / path).stat().st_ino for path in placed)
    assert placed["deep/empty"].digest == EMPTY


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_folders_of_a_tree_are_0755_whatever_the_umask(tmp_path: Path, mask: int):
    """Others may read what is published (M3)."""
    with umask(mask):
        _, root, _ = populated(tmp_path)

    assert {stat.S_IMODE((root / path).stat().st_mode) for path in ("deep", "deep/er")} == {0o755}


def test_many_files_are_placed_by_two_threads_alike(tmp_path: Path):
    """Order and content are the same as by one."""
    content = {f"d{n % 7}/f{n}": b"%d" % (n % 5) for n in range(2_100)}

    _, root, placed = populated(tmp_path, content=content)

    assert contents(root) == content and list(placed) == list(content)


def test_a_symlink_in_the_destination_is_not_followed(tmp_path: Path):
    """Nothing is written outside (L11)."""
    store, outside, root = store_at(tmp_path), tmp_path / "outside", tmp_path / "tree"
    store.ingest.add_bytes(SMALL)
    outside.mkdir()
    root.mkdir()
    (root / "deep").symlink_to(outside)

    with pytest.raises(OSError):
        materialise.populate(root, items({"deep/c": SMALL}), store.layout.blob, Linker(LinkMode.AUTO))
    with pytest.raises(OSError):
        materialise.populate(root, items({"deep/er/b": SMALL}), store.layout.blob, Linker(LinkMode.AUTO), replace=True)
    assert list(outside.iterdir()) == []


def test_a_symlink_swapped_in_while_a_tree_is_populated_is_not_followed(tmp_path: Path):
    """An attacker swaps a folder for a symlink and back, over and over (L11)."""
    store, outside, root = store_at(tmp_path), tmp_path / "outside", tmp_path / "tree"
    store.ingest.add_bytes(SMALL)
    outside.mkdir()
    (root / "deep").mkdir(parents=True)
    done = Event()

    def attack() -> None:
        (root / "link").symlink_to(outside)
        while not done.is_set():
            for one, other in (("deep", "real"), ("link", "deep"), ("deep", "link"), ("real", "deep")):
                try:
                    os.rename(root / one, root / other)
                except OSError:
                    pass

    thread = Thread(target=attack)
    thread.start()
    try:
        for number in range(300):
            try:
                linker = Linker(LinkMode.AUTO)
                materialise.populate(root, items({f"deep/{number}": SMALL}), store.layout.blob, linker, replace=True)
            except OSError:
                pass
    finally:
        done.set()
        thread.join()

    assert list(outside.iterdir()) == []


def test_publish_lets_a_new_tree_appear_whole(tmp_path: Path):
    """One rename."""
    _, staging, _ = populated(tmp_path, ".v.0123.modelstow")

    assert tree.publish(staging, staging.parent / "v") is False
    assert contents(staging.parent / "v") == CONTENT and not staging.exists()


def test_publish_exchanges_a_tree_in_one_step(tmp_path: Path):
    """The name exists at every moment, and shows the old tree or the new one, never a mixture."""
    _, live, _ = populated(tmp_path, "live", {"version": b"old", "a": b"old"})
    _, staging, _ = populated(tmp_path, ".live.0123.modelstow", {"version": b"new", "a": b"new"})
    os.chmod(live, 0o711)
    seen, done = [], Event()

    def look() -> None:
        while not done.is_set():
            seen.append(read_inside(live))

    thread = Thread(target=look)
    thread.start()
    while not seen:
        thread.join(0.001)
    swapped = tree.publish(staging, live)
    done.set()
    thread.join()

    assert swapped and set(seen) <= {(b"old", b"old"), (b"new", b"new")}
    assert contents(live)["a"] == b"new" and contents(staging)["a"] == b"old"
    assert stat.S_IMODE(live.stat().st_mode) == 0o711, "the folder's mode is the user's"


@pytest.mark.parametrize("kind", ["file", "symlink"])
def test_publish_does_not_exchange_what_is_no_folder(tmp_path: Path, kind: str):
    """It is the user's; it has to be displaced first."""
    _, staging, _ = populated(tmp_path, ".v.0123.modelstow")
    live = staging.parent / "v"
    live.write_text("mine") if kind == "file" else live.symlink_to(tmp_path)

    with pytest.raises(OSError):
        tree.publish(staging, live)
    assert contents(staging) == CONTENT and os.path.lexists(live)


def test_classifying_distinguishes_managed_modified_and_unmanaged(tmp_path: Path):
    """By the inventory and one stat."""
    _, root, placed = populated(tmp_path)
    (root / "mine").write_text("x")
    (root / "deep/mine").symlink_to("/nowhere")
    (root / "a").unlink()
    (root / "a").write_bytes(SMALL)
    os.utime(root / "deep/er/b")
    (root / "deep/empty").write_text("no more")

    found = tree.classify(root, placed)

    assert found.ours == ["deep/c"]
    assert set(found.edited) == {"a", "deep/er/b", "deep/empty"}
    assert set(found.theirs) == {"mine", "deep/mine"}


def test_strip_takes_what_the_inventory_lists_and_nothing_else(tmp_path: Path):
    """The user's files stay, with the folders that hold them; edited ones go to quarantine."""
    store, root, placed = populated(tmp_path)
    (root / "deep/mine").write_text("keep me")
    (root / "own").mkdir()
    (root / "a").unlink()
    (root / "a").write_text("my edit")
    quarantine = quarantine_of(store)

    gone = tree.remove_managed(root, placed, quarantine)

    assert not gone and contents(root) == {"deep/mine": b"keep me"}
    assert (root / "own").is_dir() and not (root / "deep/er").exists()
    assert Path(quarantine.displaced.quarantined["a"]).read_text() == "my edit"
    assert Digest.of_path(store.layout.blob(Digest.of(MIDDLE))) == Digest.of(MIDDLE)


def test_strip_removes_a_folder_that_holds_nothing_but_ours(tmp_path: Path):
    """And twice is as good as once."""
    store, root, placed = populated(tmp_path)

    assert tree.remove_managed(root, placed, quarantine_of(store)) and not root.exists()
    assert tree.remove_managed(root, placed, quarantine_of(store))
    assert list(store.layout.quarantine.iterdir()) == []


@pytest.mark.parametrize("where", ["root", "inside"])
def test_strip_does_not_reach_through_a_symlink(tmp_path: Path, where: str):
    """The target of the link is not ours, whatever its files are called (L11)."""
    store, root, placed = populated(tmp_path)
    outside = tmp_path / "outside"
    root.rename(outside)
    if where == "root":
        root.symlink_to(outside)
    else:
        root.mkdir()
        (root / "deep").symlink_to(outside / "deep")
    (outside / "a").unlink()
    (outside / "a").write_text("not an edit of ours")
    before = contents(outside)

    with suppress(OSError):  # to refuse is right too
        tree.remove_managed(root, placed, quarantine_of(store))

    assert contents(outside) == before


def test_drain_moves_the_users_files_into_the_new_tree(tmp_path: Path):
    """Folders of theirs too, empty ones included; ours stay for readers that are inside."""
    store, old, placed = populated(tmp_path, "old")
    _, live, _ = populated(tmp_path, "live", {"a": b"new", "deep/c": SMALL, "clash": b"new too"})
    (old / "mine/deeper").mkdir(parents=True)
    (old / "mine/deeper/file").write_text("keep me")
    (old / "adapter").mkdir()
    (old / "deep/er/own").symlink_to("/nowhere")
    (old / "clash").write_text("mine, but its name is taken")
    (old / "a").unlink()
    (old / "a").write_text("my edit")
    quarantine = quarantine_of(store)

    tree.drain(old, live, placed, quarantine)
    tree.drain(old, live, placed, quarantine)

    assert contents(live) == {"a": b"new", "deep/c": SMALL, "clash": b"new too", "mine/deeper/file": b"keep me"}
    assert os.readlink(live / "deep/er/own") == "/nowhere" and (live / "adapter").is_dir()
    assert contents(old) == {path: data for path, data in CONTENT.items() if path != "a"}
    saved = {path: Path(to).read_text() for path, to in quarantine.displaced.quarantined.items()}
    assert saved == {"a": "my edit", "clash": "mine, but its name is taken"}


@pytest.mark.parametrize("blocker", ["file", "symlink"])
def test_drain_moves_what_has_no_place_in_the_new_tree_to_quarantine(tmp_path: Path, blocker: str):
    """The new tree has a file, or the user put a symlink, where the user's folder was."""
    store, old, placed = populated(tmp_path, "old")
    _, live, _ = populated(tmp_path, "live", {"a": SMALL})
    outside = tmp_path / "outside"
    outside.mkdir()
    (old / "mine").mkdir()
    (old / "mine/file").write_text("keep me")
    (live / "mine").write_text("ours") if blocker == "file" else (live / "mine").symlink_to(outside)
    quarantine = quarantine_of(store)

    tree.drain(old, live, placed, quarantine)

    assert Path(quarantine.displaced.quarantined["mine/file"]).read_text() == "keep me"
    assert list(outside.iterdir()) == []


def test_trash_is_emptied_by_age_and_loses_nothing_of_the_users(tmp_path: Path):
    """What a reader put there meanwhile goes to quarantine."""
    store, root, placed = populated(tmp_path)
    record = Inventory(tree="models/tree", files=placed)
    assert trash.put(store.layout, root, record)
    [(note, seen, old)] = trash.content(store.layout)
    assert seen == record and old < 60 and not root.exists()
    folder = note.with_name(note.name.removesuffix(".inventory"))
    (folder / "mine").write_text("keep me")

    trash.empty(store.layout, older_than_s=3600)
    assert folder.is_dir()
    age(note, 3700)
    trash.empty(store.layout, older_than_s=3600)

    assert list(store.layout.trash.iterdir()) == []
    assert [p.read_text() for p in store.layout.quarantine.rglob("mine")] == ["keep me"]
    assert not [p for p in store.layout.quarantine.rglob("*") if p.is_file() and p.name != "mine"]


def test_a_crash_before_the_rename_into_trash_leaves_nothing_behind(tmp_path: Path):
    """The note is written first; without its folder it just goes."""
    store, root, placed = populated(tmp_path)
    (store.layout.trash / "1-2.inventory").write_bytes(Inventory(tree="models/tree", files=placed).encode())

    trash.empty(store.layout)

    assert list(store.layout.trash.iterdir()) == [] and contents(root) == CONTENT


def test_a_scan_sees_every_file_and_follows_nothing(tmp_path: Path):
    """Inode numbers without a stat a file."""
    _, root, placed = populated(tmp_path)
    (root / "loop").symlink_to(root)

    found = tree.scan(root)

    assert found is not None and set(found.files) == {*placed, "loop"} and found.folders == {"deep", "deep/er"}
    assert all(found.files[path] == placed[path].ino for path in placed)
    assert tree.scan(tmp_path / "absent") is None and tree.scan(root / "a") is None


def test_a_scan_goes_as_deep_as_folders_do(tmp_path: Path):
    """The user's own may be deeper than Python recurses, and gc scans them all."""
    here, depth = os.getcwd(), 1_500
    os.chdir(tmp_path)
    try:
        for _ in range(depth):
            os.mkdir("x")
            os.chdir("x")
        found = tree.scan(tmp_path)
    finally:
        for _ in range(depth):  # clearing the test's folder would recurse
            os.chdir("..")
            os.rmdir("x")
        os.chdir(here)

    assert found is not None and len(found.folders) == depth


def test_an_error_while_linking_names_the_whole_path(tmp_path: Path):
    """The calls are relative to an open folder; people need to know which."""
    store, root, _ = populated(tmp_path)
    missing = {"deep/er/new": TreeEntry(Digest.of(b"not in the store"), 5)}

    with pytest.raises(FileNotFoundError) as caught:
        materialise.populate(root, missing, store.layout.blob, Linker(LinkMode.HARDLINK, strict=True))

    assert str(root / "deep/er") in str(caught.value)


# ---- a new tree by hardlinks alone


def expected(store: BlobStore, content: dict[str, bytes]) -> EntryColumns:
    """What the links of *content* will be."""
    entries = {}
    for path, data in content.items():
        digest = Digest.of(data)
        kind = LinkKind.HARDLINK if data else LinkKind.EMPTY
        entries[path] = InventoryEntry(digest, kind, os.stat(store.layout.blob(digest)).st_ino if data else 0)
    return EntryColumns.of(entries)


def test_a_new_tree_is_linked_as_expected(tmp_path: Path):
    """Then what was expected is the record, without another copy of it."""
    store, _, _ = populated(tmp_path)
    root, entries = store.layout.trees / "new", expected(store, CONTENT)
    root.mkdir()

    assert materialise.link_all(root, entries, store.layout.blobs) is entries

    assert contents(root) == CONTENT
    assert all(tree.as_placed(f"{root}/{path}", entry) for path, entry in entries.items())


def test_a_blob_that_was_replaced_meanwhile_is_recorded_by_its_new_inode(tmp_path: Path):
    """The folder is listed after linking: what is recorded is what was linked."""
    store, _, _ = populated(tmp_path)
    root, entries = store.layout.trees / "new", expected(store, CONTENT)
    root.mkdir()
    blob = Path(store.layout.blob(Digest.of(SMALL)))
    blob.unlink()
    store.ingest.add_bytes(SMALL)

    linked = materialise.link_all(root, entries, store.layout.blobs)

    assert linked is not None and linked is not entries
    assert linked["a"].ino == linked["deep/c"].ino == blob.stat().st_ino != entries["a"].ino
    assert linked["deep/er/b"] == entries["deep/er/b"]


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EMLINK, errno.EPERM, errno.ENOSYS])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_where_hardlinks_cannot_be_had_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, after: int
):
    """The caller then places files one by one into the same folder."""
    store, _, _ = populated(tmp_path)
    root, entries = store.layout.trees / "new", expected(store, CONTENT)
    root.mkdir()
    made, link = [], os.link

    def refuse(*args, **options):
        if len(made) == after:
            raise OSError(number, os.strerror(number), args[0], None, args[1])
        made.append(args)
        link(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "link", refuse)
        assert materialise.link_all(root, entries, store.layout.blobs) is None

    assert contents(root) == {}
    materialise.populate(root, items(CONTENT), store.layout.blob, Linker(LinkMode.AUTO))
    assert contents(root) == CONTENT
