"""Trees with symlinks and inline files beside blobs, from what is desired to what is removed."""

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import ensurer_of, in_memory, leftovers, lock_of
from hypothesis import given
from hypothesis import strategies as st
from publishing import (
    CONFIG,
    HUB,
    KEY,
    VERSIONS,
    WEIGHTS,
    bytes_of,
    content_of,
    desired_of,
    publish,
    publisher_of,
    remove,
    state_of,
)

from modelstow.cas import BlobStore, Digest, Inline, LinkKind, LinkMode, Symlink, syscalls, tree
from modelstow.cas.entries import Other
from modelstow.cas.scrub import Level
from modelstow.reconcile.events.events import Event, FilesLinked
from modelstow.reconcile.inspect.owners import file_owners
from modelstow.reconcile.planning.observer import observe
from modelstow.reconcile.planning.state import ModelState
from modelstow.reconcile.planning.verifier import FindingKind, audit
from modelstow.reconcile.results import IntegrityReport

MODES = [LinkMode.AUTO, LinkMode.COPY, LinkMode.SYMLINK]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def quarantined(root: Path) -> dict[str, bytes]:
    """What was displaced, by name."""
    return {path.name: path.read_bytes() for path in (root / "quarantine").rglob("*") if path.is_file()}


def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trees be changed file by file."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(syscalls, "exchange", refuse)


@pytest.mark.parametrize("mode", MODES)
def test_a_tree_of_all_kinds_is_published_and_the_second_time_is_left_alone(root: Path, mode: LinkMode):
    """Nothing in the store is written again."""
    assert publish(root, HUB, mode=mode)
    if mode is not LinkMode.SYMLINK:
        assert content_of(root) == bytes_of(HUB)
    assert (root / KEY.tree / "snapshots/1111/model.bin").read_bytes() == WEIGHTS
    assert state_of(root, HUB) == (ModelState.COMPLETE, [])
    before = {path: path.lstat().st_ctime_ns for path in root.rglob("*") if "locks" not in path.parts}

    assert not publish(root, HUB, mode=mode)

    assert {path: path.lstat().st_ctime_ns for path in root.rglob("*") if "locks" not in path.parts} == before


def test_a_tree_without_blobs_is_a_tree(root: Path):
    """Such as one of refs alone."""
    content = {"refs/main": Inline(b"1"), "link": Symlink("refs/main")}

    assert state_of(root, content) == (ModelState.NOT_PRESENT, [("LinkTree", "")])
    assert publish(root, content) and content_of(root) == bytes_of(content)
    assert state_of(root, content) == (ModelState.COMPLETE, [])


def test_what_was_placed_is_reported_by_kind(root: Path):
    """One event, as for blobs alone."""
    publish(root, HUB)
    remove(root)
    events: list[Event] = []
    desired = desired_of(root, HUB)

    publisher_of(BlobStore.open(root), events).publish(desired, desired.trees[0], {})

    [linked] = [event for event in events if isinstance(event, FilesLinked)]
    kinds = {LinkKind.HARDLINK: 2, LinkKind.EMPTY: 1, LinkKind.INLINE: 1, LinkKind.LITERAL: 2}
    assert linked.kinds == kinds


def rewrite(path: Path) -> None:
    """Other bytes of the same length, in place."""
    found = path.stat()
    path.write_bytes(b"9999")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def retarget(path: Path) -> None:
    path.unlink()
    path.symlink_to("/elsewhere")


def to_file(path: Path) -> None:
    path.unlink()
    path.write_bytes(b"mine")


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "mine").write_bytes(b"mine")


LINK = "snapshots/1111/config.json"


@pytest.mark.parametrize(
    ("path", "damage", "step", "saved"),
    [
        ("refs/main", rewrite, "Replace", {"main": b"9999"}),
        ("refs/main", to_file, "Replace", {"main": b"mine"}),
        ("refs/main", to_folder, "Replace", {"mine": b"mine"}),
        ("refs/main", Path.unlink, "Link", {}),
        (LINK, retarget, "Replace", {}),
        (LINK, to_file, "Replace", {"config.json": b"mine"}),
        (LINK, to_folder, "Replace", {"mine": b"mine"}),
        (LINK, Path.unlink, "Link", {}),
        ("blobs/config", Path.unlink, "Link", {}),
        ("blobs/config", to_file, "Replace", {"config": b"mine"}),
    ],
)
def test_damage_is_seen_and_mended(
    root: Path, path: str, damage: Callable[[Path], None], step: str, saved: dict[str, bytes]
):
    """A plan names the path, and what may be the only copy of its bytes goes to quarantine."""
    publish(root, HUB)
    damage(root / KEY.tree / path)

    state = ModelState.CORRUPT if step == "Replace" else ModelState.PARTIAL
    assert state_of(root, HUB) == (state, [(step, path)])
    assert publish(root, HUB)

    assert content_of(root) == bytes_of(HUB) and state_of(root, HUB) == (ModelState.COMPLETE, [])
    assert quarantined(root) == saved and leftovers(root) == []
    if damage is retarget:
        [moved] = [p for p in (root / "quarantine").rglob("*") if p.is_symlink()]
        assert os.readlink(moved) == "/elsewhere"


@pytest.mark.parametrize("exchanged", [True, False])
@pytest.mark.parametrize(("before", "after"), [("1", "2"), ("2", "1")])
def test_an_upgrade_changes_kinds_and_displaces_nothing_of_ours(
    root: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str, exchanged: bool
):
    """A blob becomes an inline file, a symlink a blob, a folder a symlink, and back; by one step or path by path."""
    publish(root, VERSIONS[before])
    (root / KEY.tree / "mine").write_bytes(b"mine")
    if not exchanged:
        no_exchange(monkeypatch)

    assert publish(root, VERSIONS[after])

    assert content_of(root) == bytes_of({**VERSIONS[after], "mine": b"mine"})
    assert state_of(root, VERSIONS[after]) == (ModelState.COMPLETE, [])
    if exchanged:
        assert quarantined(root) == {}
    remove(root)
    assert content_of(root) == {"mine": b"mine"}


@pytest.mark.parametrize(("path", "new"), [("refs/main", b"a blob"), (LINK, b"a blob"), ("blobs/config", Inline(CONFIG))])
def test_another_kind_at_a_path_is_an_older_version_and_not_damage(root: Path, path: str, new: bytes | Inline):
    """Even if the bytes are the same: the inventory has to say what is there."""
    publish(root, HUB)
    content = {**HUB, path: new}

    if isinstance(new, bytes):
        BlobStore.open(root).ingest.add_bytes(new)
    assert state_of(root, content) == (ModelState.PARTIAL, [("Replace", path)])
    publish(root, content)

    assert content_of(root) == bytes_of(content) and quarantined(root) == {}
    record = BlobStore.open(root).trees.read(KEY.tree)
    assert record is not None and record.files[path].entry == (Digest.of(new) if isinstance(new, bytes) else new)


def test_what_is_no_longer_desired_is_removed_unless_it_was_changed(root: Path, monkeypatch: pytest.MonkeyPatch):
    """Path by path, too."""
    no_exchange(monkeypatch)
    publish(root, {**HUB, "refs/old": Inline(b"old"), "refs/edited": Inline(b"old"), "old": Symlink("blobs")})
    (root / KEY.tree / "refs/edited").write_bytes(b"new")

    publish(root, HUB)

    assert content_of(root) == bytes_of(HUB) and quarantined(root) == {"edited": b"new"}


def test_removing_takes_what_was_placed_and_leaves_what_was_changed_or_is_the_users(root: Path):
    """Edited entries go to quarantine, and nothing that a symlink leads to is touched."""
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"theirs")
    publish(root, {**HUB, "out": Symlink(str(outside)), "refs/edited": Inline(b"ours")})
    (root / KEY.tree / "refs/edited").write_bytes(b"mine too")
    (root / KEY.tree / "snapshots/mine").write_bytes(b"mine")

    remove(root)

    assert content_of(root) == {"snapshots/mine": b"mine"} and quarantined(root) == {"edited": b"mine too"}
    assert (outside / "file").read_bytes() == b"theirs" and BlobStore.open(root).trees.files() == []


def test_removing_a_tree_that_nobody_changed_leaves_nothing(root: Path):
    """By one rename into the trash, and from there."""
    publish(root, HUB)

    remove(root)

    assert not (root / "models/m@1").exists() and list((root / "trash").iterdir()) == [] and quarantined(root) == {}


def test_files_of_the_user_at_paths_of_a_new_tree_are_displaced_unless_they_are_the_same(root: Path):
    """As with blobs: a folder that becomes a tree keeps what is right."""
    publish(root, {"a": b"x"})
    remove(root)
    top = root / KEY.tree
    (top / "refs").mkdir(parents=True)
    (top / "refs/main").write_bytes(b"1111")
    (top / "snapshots/1111").mkdir(parents=True)
    (top / LINK).write_bytes(b"mine")
    (top / "snapshots/1111/model.bin").symlink_to("../../blobs/weights")
    inode = (top / "refs/main").stat().st_ino

    publish(root, HUB)

    assert content_of(root) == bytes_of(HUB) and quarantined(root) == {"config.json": b"mine"}
    assert (top / "refs/main").stat().st_ino == inode


@pytest.mark.parametrize(
    "content",
    [
        {"link": Symlink("."), "link/file": b"x"},
        {"link": Symlink("."), "link/deep/file": Inline(b"x")},
        {"link": Symlink("."), "LINK": b"x"},
        {"../link": Symlink(".")},
        {"/link": Inline(b"")},
    ],
)
def test_a_path_that_a_symlink_could_lead_away_cannot_be_desired(root: Path, content: dict[str, bytes | Symlink | Inline]):
    """No entry is below a symlink, or outside the tree, or another one where case does not count."""
    with pytest.raises(ValueError):
        desired_of(root, content)


def test_one_path_holds_one_entry(root: Path):
    """A blob and something else cannot both be desired there."""
    desired = desired_of(root, HUB).trees[0]

    with pytest.raises(ValueError, match="same file"):
        type(desired)(key=KEY, path=desired.path, files=desired.files, others={"blobs/config": Inline(b"")})


def test_verification_reads_them_too(root: Path):
    """A finding names the digest that the bytes should have, and of a symlink that of its target."""
    publish(root, HUB)
    store, desired = BlobStore.open(root), desired_of(root, HUB)
    clean = audit(store, desired, Level.FAST)
    assert clean.faults == () and clean.files == len(HUB)
    rewrite(root / KEY.tree / "refs/main")
    (root / KEY.tree / LINK).unlink()

    found = audit(store, desired, Level.FAST)

    by_kind = {fault.kind: (fault.digest, fault.paths) for fault in found.faults}
    assert by_kind == {
        FindingKind.DRIFT: (Digest.of(b"1111"), (f"{root / KEY.tree}/refs/main",)),
        FindingKind.MISSING: (Digest.of(b"../../blobs/config"), (f"{root / KEY.tree}/{LINK}",)),
    }
    report = IntegrityReport.of(desired.trees[0], {path for fault in found.faults for path in fault.paths})
    assert (report.failed_files, report.missing_files) == (("refs/main",), (LINK,))
    assert set(report.verified_files) == HUB.keys() - {"refs/main", LINK}


def test_a_tree_on_record_is_verified_and_repaired_by_its_inventory(root: Path, tmp_path: Path):
    """No lockfile names it, only its blobs; it is not taken for drift of what a lockfile names."""
    publish(root, HUB)
    blobs = {path: data for path, data in HUB.items() if isinstance(data, bytes)}
    models = ensurer_of(tmp_path, lock_of({"n@1": {"x": blobs}}))
    rewrite(root / KEY.tree / "refs/main")

    found, outcome = models.verify(None, Level.FAST, repair=True)

    assert [fault.kind for fault in found.faults] == [FindingKind.DRIFT]
    assert outcome is not None and outcome.error is None
    assert content_of(root) == bytes_of(HUB) and quarantined(root) == {"main": b"9999"}


def test_garbage_collection_keeps_the_blobs_of_the_tree_and_no_others(root: Path, tmp_path: Path):
    """An inline file keeps no blob of the same bytes."""
    publish(root, {**HUB, "copy": Inline(b"kept by nobody")})
    BlobStore.open(root).ingest.add_bytes(b"kept by nobody")

    ensurer_of(tmp_path, lock_of({})).collect_garbage()

    names = {path.name for path in (root / "blobs").rglob("*") if path.is_file()}
    assert names == {Digest.of(WEIGHTS).hex, Digest.of(CONFIG).hex} and content_of(root)["copy"] == b"kept by nobody"


def test_an_open_file_that_a_symlink_leads_to_does_not_keep_a_tree_from_eviction(root: Path, tmp_path: Path):
    """It may be anywhere, and is not the tree's."""
    from modelstow.reconcile.retention.eviction import EvictionTargets

    publish(root, {"refs/main": Inline(b"1"), "a": b"x", "out": Symlink(str(tmp_path / "outside"))})
    (tmp_path / "outside").write_bytes(b"")

    with open(tmp_path / "outside", "wb"):
        gone = ensurer_of(tmp_path, lock_of({})).collect_garbage(goals=EvictionTargets(max_size=0)).trees

    assert gone and content_of(root) == {} and (tmp_path / "outside").exists()


def test_an_inline_file_is_no_blob_and_a_symlink_is_what_it_leads_to(root: Path):
    """As the owners of a file are told."""
    publish(root, HUB)
    store, top = BlobStore.open(root), root / KEY.tree

    assert file_owners(store, top / "refs/main").digest is None
    assert file_owners(store, top / LINK).digest == Digest.of(CONFIG)


def test_paths_that_are_no_blobs_inode_are_named_for_the_stat_snapshot(root: Path):
    """It compares the stat of each, as of copies and empty files."""
    publish(root, HUB)
    desired = desired_of(root, HUB)

    seen = observe(BlobStore.open(root), desired).trees[KEY]

    assert set(seen.own) == {"blobs/empty", *desired.trees[0].others}


def test_recovery_keeps_no_path_that_only_a_symlink_leads_to(root: Path, monkeypatch: pytest.MonkeyPatch):
    """A change broke off after a folder of the old version had become a symlink of the new one."""
    publish(root, VERSIONS["1"])
    store, desired = BlobStore.open(root), desired_of(root, VERSIONS["2"])
    no_exchange(monkeypatch)
    (root / KEY.tree / "blobs/main").write_bytes(b"the user's, and refs/main through the new symlink")
    monkeypatch.setattr(type(store.trees), "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        publisher_of(store, []).publish(desired, desired.trees[0], {})
    monkeypatch.undo()

    publisher_of(store, [])._recovery.recover(KEY, root / KEY.tree)

    record = store.trees.read(KEY.tree)
    assert record is not None and "refs" in record.files and "refs/main" not in record.files
    found = tree.scan(root / KEY.tree)
    assert found is not None and record.files.keys() <= found.files.keys()


def test_a_name_that_a_killed_repair_left_is_not_taken_for_the_users(root: Path):
    """The next change may exchange the whole tree, and moves what is the user's into the new one."""
    publish(root, HUB)
    records = BlobStore.open(root).trees
    record = records.read(KEY.tree)
    assert record is not None
    records.write_intent(record)
    (root / KEY.tree / "refs/main").rename(root / KEY.tree / "refs/.modelstow-0123456789ab")

    publish(root, HUB)

    assert content_of(root) == bytes_of(HUB) and leftovers(root) == []


any_entry = st.sampled_from([b"x", b"", CONFIG, Inline(b"x"), Inline(b""), Symlink("a"), Symlink("/nowhere")])
any_tree = st.dictionaries(st.sampled_from(["a", "b", "d/a", "d/e/b"]), any_entry, min_size=1) | st.just(
    {"a": Inline(b"x"), "d": Symlink("e"), "e/b": b"x"}
)


@given(st.lists(any_tree, min_size=2, max_size=4), st.booleans())
def test_any_tree_can_follow_any_other(versions: list[dict[str, bytes | Other]], exchanged: bool):
    """With the user's file still in it, by one step or path by path; and all can be removed."""
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder, pytest.MonkeyPatch.context() as patch:
        root = Path(folder)
        if not exchanged:
            no_exchange(patch)
        for version in versions:
            publish(root, version)
            (root / KEY.tree / "mine").write_bytes(b"mine")
            assert content_of(root) == bytes_of({**version, "mine": b"mine"})
            assert state_of(root, version) == (ModelState.COMPLETE, [])
            assert not publish(root, version)
        remove(root)
        assert content_of(root) == {"mine": b"mine"}
        assert not exchanged or quarantined(root) == {}
