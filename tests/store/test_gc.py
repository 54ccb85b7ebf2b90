"""What keeps what, and who goes: garbage collection and eviction over real stores."""

import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from builders import Cli, assert_sound, blobs_of, ensurer_of, lock_of, memory, some_bytes, tree_of, write_lock
from store_fixtures import age, flip, partial_with, root_only, umask

from modelstow import ModelState, SourceUnavailableError
from modelstow.backends.memory import MemorySource
from modelstow.cas import BlobStore, Digest, LinkMode, NoSpaceError, StoreFormatError, StoreStateError, leases
from modelstow.cas import inventory as inventories
from modelstow.cas.inventory import Inventory, InventoryEntry
from modelstow.cas.links import LinkKind
from modelstow.cas.scrub import Level
from modelstow.reconcile.desired.selectors import VariantId
from modelstow.reconcile.retention import pins, roots
from modelstow.reconcile.retention.collector import EvictionTargets, GcResult

pytestmark = pytest.mark.slow

DAY = 86_400
KB = 1_000
BIG = some_bytes(20_000_000, 5)


def name(data: bytes) -> str:
    return Digest.of(data).hex


def names(*contents: bytes) -> set[str]:
    return {name(data) for data in contents}


def kept(folder: Path) -> set[str]:
    """The blobs of the store below *folder*."""
    return set(blobs_of(folder / "root"))


def world(folder: Path, models: dict[str, dict[str, bytes]], **more):
    """An ensurer over ``{"m@1": {"path": content}}`` whose memory source has every file."""
    lock = lock_of({key: {"v": files} for key, files in models.items()})
    return ensurer_of(folder, lock, memory({p: d for files in models.values() for p, d in files.items()}), **more)


def used(models, model: str, ago_s: float) -> None:
    """Say that a tree was used so long ago."""
    key = models.desired([model]).trees[0].key
    for folder in ("inventories", "used"):
        age(models.settings.root / "state" / folder / inventories.tree_id(key.tree), ago_s)


def collect(models, **more) -> GcResult:
    """A dry run, then the same for real; both must agree."""
    would = models.collect_garbage(dry_run=True, **more)
    before = blobs_of(models.settings.root)
    did = models.collect_garbage(**more)

    assert would.dry_run and not did.dry_run
    assert (would.blobs, would.trees, would.partials) == (did.blobs, did.trees, did.partials)
    assert would.reclaimed_bytes == did.reclaimed_bytes
    assert (would.kept_blobs, would.kept_bytes) == (did.kept_blobs, did.kept_bytes)
    assert set(before) - set(blobs_of(models.settings.root)) == {digest.hex for digest in did.blobs}
    assert_sound(models.settings.root)
    return did


# ---- what keeps a blob


def test_nothing_that_a_tree_holds_is_collected(tmp_path: Path):
    """Not even where no lockfile was registered."""
    models = world(tmp_path, {"m@1": {"a": b"a", "b": b"b", "none": b""}})
    models.ensure("m")

    done = collect(models)

    assert done.blobs == [] and (done.kept_blobs, done.kept_bytes) == (2, 2)
    assert models.status("m").state is ModelState.COMPLETE


def test_what_nothing_keeps_is_collected_and_counted(tmp_path: Path):
    """Blobs and their tables; a second gc has nothing to do."""
    models = world(tmp_path, {"m@1": {"a": BIG, "b": b"bb"}})
    path = models.ensure("m")
    shutil.rmtree(path)

    done = collect(models)

    assert {digest.hex for digest in done.blobs} == names(BIG, b"bb") and done.reclaimed_bytes == len(BIG) + 2
    assert kept(tmp_path) == set() and not list((tmp_path / "root/blobs").rglob("*.pieces"))
    assert collect(models).reclaimed_bytes == 0


def test_a_registered_lockfile_keeps_its_blobs_without_a_tree(tmp_path: Path):
    """reconcile registers it; ensure does not."""
    models = world(tmp_path, {"m@1": {"a": b"a"}})
    models.reconcile()
    shutil.rmtree(models.local_path("m"))

    assert collect(models).blobs == []
    (tmp_path / "models.lock").unlink()
    assert len(collect(models).blobs) == 1


def test_a_lockfile_whose_folder_cannot_be_seen_is_unverifiable_and_keeps_its_blobs(tmp_path: Path):
    """Another container, an unmounted disk (D1)."""
    models = world(tmp_path, {"m@1": {"a": b"a"}})
    here = tmp_path / "project"
    here.mkdir()
    from dataclasses import replace

    (tmp_path / "models.lock").rename(here / "models.lock")
    models.settings = replace(models.settings, lockfile=here / "models.lock")
    models.reconcile()
    shutil.rmtree(models.local_path("m"))

    shutil.rmtree(here)
    assert collect(models).blobs == [], "its folder is gone"
    here.mkdir()
    (here / "placeholder").mkdir()
    [root] = roots.read(BlobStore.open_existing(tmp_path / "root")).lockfiles
    if root.parent != (here.stat().st_dev, here.stat().st_ino):
        assert collect(models).blobs == [], "its folder is another"
    assert roots.forget(BlobStore.open_existing(tmp_path / "root"), root.id)
    assert len(collect(models).blobs) == 1


def test_a_lockfile_is_dead_when_it_is_gone_from_the_same_folder(tmp_path: Path):
    """Then it keeps nothing, and its root goes."""
    models = world(tmp_path, {"m@1": {"a": b"a"}})
    models.reconcile()
    shutil.rmtree(models.local_path("m"))
    (tmp_path / "models.lock").unlink()

    assert len(collect(models).blobs) == 1
    assert roots.read(BlobStore.open_existing(tmp_path / "root")).lockfiles == ()


@pytest.mark.parametrize("how", ["gone", "another"])
def test_an_outside_tree_whose_parent_cannot_be_seen_keeps_its_blobs(tmp_path: Path, how: str):
    """A root is dead only if the folder above is there and is the same (D1)."""
    models = world(tmp_path, {"m@1": {"a": b"a"}})
    disk = tmp_path / "disk"
    disk.mkdir()
    models.ensure("m", into=disk / "tree")

    disk.rename(tmp_path / "elsewhere")
    if how == "another":
        disk.mkdir()  # an empty mount point

    assert collect(models).blobs == []
    if how == "another":
        disk.rmdir()
    (tmp_path / "elsewhere").rename(disk)
    assert collect(models).blobs == []
    shutil.rmtree(disk / "tree")
    assert len(collect(models).blobs) == 1, "the same folder, without the tree"


@root_only
def test_an_unmounted_disk_keeps_its_blobs(tmp_path: Path):
    """The mount point is there, and is another folder (D1)."""
    models = world(tmp_path, {"m@1": {"a": b"a"}})
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    try:
        models.ensure("m", into=disk / "tree")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)

    assert collect(models).blobs == []


def test_trees_are_found_by_walking_models_inventory_or_not(tmp_path: Path):
    """A record that was lost does not cost a blob."""
    models = world(tmp_path, {"m@1": {"a": b"a", "b": BIG}})
    models.ensure("m")
    for path in (tmp_path / "root/state/inventories").iterdir():
        path.unlink()

    assert collect(models).blobs == []


@pytest.mark.parametrize("mode", [LinkMode.COPY, LinkMode.SYMLINK])
def test_trees_of_other_links_keep_their_blobs_too(tmp_path: Path, mode: LinkMode):
    """The inventory lists them; where it was lost, a copy's digest mtime shows what it is."""
    from dataclasses import replace

    models = world(tmp_path, {"m@1": {"a": b"a"}})
    models.settings = replace(models.settings, link_mode=mode)
    models.ensure("m")

    assert collect(models).blobs == []
    if mode is LinkMode.COPY:
        for path in (tmp_path / "root/state/inventories").iterdir():
            path.unlink()
        assert collect(models).blobs == []


def test_a_symlinked_tree_without_a_record_keeps_its_blobs(tmp_path: Path):
    """Its links would dangle: trees inside ROOT are found inventory or not."""
    from dataclasses import replace

    models = world(tmp_path, {"m@1": {"a": b"a"}})
    models.settings = replace(models.settings, link_mode=LinkMode.SYMLINK)
    path = models.ensure("m")
    for record in (tmp_path / "root/state/inventories").iterdir():
        record.unlink()

    models.collect_garbage()

    assert (path / "a").read_bytes() == b"a"


def test_a_pin_keeps_blobs_without_tree_or_lockfile(tmp_path: Path):
    """Pins are next to the blobs, so that losing state/ loses none."""
    models = world(tmp_path, {"m@1": {"a": b"a"}})
    path = models.ensure("m")
    store = BlobStore.open(tmp_path / "root")
    pins.pin(store, VariantId("m@1", "v"), [Digest.of(b"a")])
    shutil.rmtree(path)

    assert collect(models).blobs == []
    shutil.rmtree(tmp_path / "root/state")
    models.collect_garbage(state_lost=True)
    assert kept(tmp_path) == names(b"a")
    assert pins.unpin(BlobStore.open(tmp_path / "root"), VariantId("m@1", "v"))
    assert len(collect(models).blobs) == 1


def test_a_lease_keeps_blobs_while_it_is_held(tmp_path: Path):
    """gc keeps its hands off a program's tree, even one that was taken away."""
    models = world(tmp_path, {"m@1": {"a": b"a"}})

    with models.lease("m") as path:
        shutil.rmtree(path)
        assert collect(models).blobs == []

    assert len(collect(models).blobs) == 1


def test_unfinished_work_keeps_its_blobs_for_a_week(tmp_path: Path):
    """What a killed run had fetched is not garbage that night (D4)."""
    models = world(tmp_path, {"m@1": {"a": b"a"}})
    store = BlobStore.open(tmp_path / "root")
    digest = store.ingest.add_bytes(b"a")
    leases.take(store, doing="reconcile", digests=[digest]).close()
    [lease] = store.layout.leases.iterdir()

    age(lease, 6 * DAY)
    assert collect(models).blobs == []
    age(lease, 8 * DAY)
    assert collect(models).blobs == [digest]
    assert list(store.layout.leases.iterdir()) == []


def test_a_failed_ensure_keeps_what_it_fetched_until_it_succeeds(tmp_path: Path):
    """One of two blobs cannot be had; the other is kept; when both came, the lease is gone."""
    files = {"a": b"a", "b": b"b"}
    models = ensurer_of(tmp_path, lock_of({"m@1": {"v": files}}), memory({"a": b"a"}))
    with pytest.raises(SourceUnavailableError):
        models.ensure("m")

    assert collect(models).blobs == [] and kept(tmp_path) == names(b"a")
    again = ensurer_of(tmp_path, lock_of({"m@1": {"v": files}}), memory(files))
    again.ensure("m")

    assert not list((tmp_path / "root/state/leases").iterdir())
    assert collect(again).blobs == []


def test_an_announced_change_keeps_old_and_new(tmp_path: Path):
    """A tree whose publishing was interrupted is a root of both its contents."""
    models = world(tmp_path, {"m@1": {"a": b"old"}})
    models.ensure("m")
    store = BlobStore.open(tmp_path / "root")
    new = store.ingest.add_bytes(b"new")
    key = models.desired(["m"]).trees[0].key
    change = Inventory(tree=key.tree, files={"a": InventoryEntry(new, LinkKind.HARDLINK, 0)})
    store.trees.write_intent(change)

    assert collect(models).blobs == []


def test_an_announced_tree_that_never_came_keeps_its_blobs_for_a_week(tmp_path: Path):
    """Then it is abandoned, and dry run and gc agree on that."""
    models = world(tmp_path, {"m@1": {"a": b"a"}})
    store = BlobStore.open(tmp_path / "root")
    digest = store.ingest.add_bytes(b"a")
    change = Inventory(tree="models/m@1/v", files={"a": InventoryEntry(digest, LinkKind.HARDLINK, 0)})
    store.trees.write_intent(change)
    [record] = store.layout.inventories.iterdir()

    age(record, 6 * DAY)
    assert collect(models).blobs == []
    age(record, 8 * DAY)
    assert collect(models).blobs == [digest]


# ---- what stops gc


def test_nothing_is_deleted_after_state_was_lost_until_reconcile(tmp_path: Path):
    """It is not known what keeps which blob (D2)."""
    models = world(tmp_path, {"m@1": {"a": b"a"}})
    models.reconcile()
    garbage = BlobStore.open(tmp_path / "root").ingest.add_bytes(b"garbage")
    shutil.rmtree(tmp_path / "root/state")

    for dry_run in (True, False):
        with pytest.raises(StoreStateError, match="was lost") as caught:
            models.collect_garbage(dry_run=dry_run)
        assert "reconcile" in caught.value.hint and "--state-lost" in caught.value.hint
    models.ensure("m")
    with pytest.raises(StoreStateError):
        models.collect_garbage()
    assert kept(tmp_path) == names(b"a", b"garbage")

    models.reconcile()
    assert collect(models).blobs == [garbage]


def test_gc_works_on_after_state_was_lost_with_the_roots_that_are_left(tmp_path: Path):
    """Trees inside the store are found by walking it."""
    models = world(tmp_path, {"m@1": {"a": b"a"}})
    models.reconcile()
    garbage = BlobStore.open(tmp_path / "root").ingest.add_bytes(b"garbage")
    shutil.rmtree(tmp_path / "root/state")

    assert models.collect_garbage(dry_run=True, state_lost=True).blobs == [garbage]
    assert not (tmp_path / "root/state/epoch").exists()
    assert models.collect_garbage(state_lost=True).blobs == [garbage]
    assert collect(models).blobs == []


def test_another_stores_state_is_a_lost_one(tmp_path: Path):
    """A restored or swapped state/ carries another epoch."""
    models = world(tmp_path, {"m@1": {"a": b"a"}})
    models.reconcile()
    (tmp_path / "root/state/epoch").write_text("0" * 32)

    with pytest.raises(StoreStateError, match="was lost"):
        models.collect_garbage()


def _garble(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5] + b"xxxx\n")


@pytest.mark.parametrize("folder", ["state/inventories", "state/roots", "pins"])
@pytest.mark.parametrize("damage", [_garble, lambda path: path.write_bytes(b"")], ids=["garbled", "emptied"])
@pytest.mark.parametrize("goals", [EvictionTargets(), EvictionTargets(max_size=0)], ids=["gc", "evict"])
def test_a_root_that_cannot_be_read_stops_gc_with_nothing_deleted(
    tmp_path: Path, folder: str, damage: Callable[[Path], None], goals: EvictionTargets
):
    """It is not known what it keeps."""
    models = world(tmp_path, {"m@1": {"a": b"a"}, "n@1": {"b": b"b"}})
    models.reconcile()
    store = BlobStore.open(tmp_path / "root")
    store.ingest.add_bytes(b"garbage")
    pins.pin(store, VariantId("n@1", "v"), [Digest.of(b"b")])
    damage(sorted((tmp_path / "root" / folder).iterdir())[0])
    before = {p for p in (tmp_path / "root").rglob("*") if "locks" not in str(p)}

    with pytest.raises(StoreStateError, match="cannot be read"):
        models.collect_garbage(goals=goals)

    assert {p for p in (tmp_path / "root").rglob("*") if "locks" not in str(p)} == before


@pytest.mark.parametrize("goals", [EvictionTargets(), EvictionTargets(max_size=0)], ids=["gc", "evict"])
def test_a_lease_that_cannot_be_read_stops_gc_with_nothing_deleted(tmp_path: Path, goals: EvictionTargets):
    """Or a root of a kind that this modelstow does not know (D23)."""
    models = world(tmp_path, {"m@1": {"a": b"a"}})
    models.reconcile()
    BlobStore.open(tmp_path / "root").ingest.add_bytes(b"garbage")
    (tmp_path / "root/state/leases/0123.lease").write_text("{")

    with pytest.raises(StoreStateError, match="lease"):
        models.collect_garbage(goals=goals)
    assert kept(tmp_path) == names(b"a", b"garbage") and models.status("m").state is ModelState.COMPLETE


def test_a_store_with_a_newer_feature_is_not_swept(tmp_path: Path):
    """An older modelstow never sweeps what a newer one keeps (D23)."""
    models = world(tmp_path, {"m@1": {"a": b"a"}})
    models.reconcile()
    BlobStore.open(tmp_path / "root").ingest.add_bytes(b"garbage")
    config = tmp_path / "root/modelstow.json"
    config.write_text(config.read_text().replace('"ro_compat": []', '"ro_compat": ["views"]'))

    with pytest.raises(StoreFormatError):
        models.collect_garbage()
    assert kept(tmp_path) == names(b"a", b"garbage") and models.status("m").state is ModelState.COMPLETE


def test_a_folder_where_a_blob_should_be_does_not_block_gc(tmp_path: Path):
    """It is not ours to delete, and no reason to keep the rest (F10)."""
    models = world(tmp_path, {"m@1": {"a": b"a"}})
    models.ensure("m")
    store = BlobStore.open(tmp_path / "root")
    store.ingest.add_bytes(b"garbage")
    for data in (b"0", b"1", b"2", b"3"):
        path = Path(store.layout.blob(Digest.of(data)))
        path.mkdir()
        (path / "mine").write_text("keep me")

    models.collect_garbage()

    assert kept(tmp_path) == names(b"a")
    assert [p.read_text() for p in (tmp_path / "root").rglob("mine")] == ["keep me"] * 4


# ---- who is reading


def test_a_reader_with_a_file_open_survives_gc(tmp_path: Path):
    """Unlinking never truncates, and nothing is chmodded first (C11)."""
    models = world(tmp_path, {"m@1": {"a": BIG}})
    path = models.ensure("m")
    outside = tmp_path / "mine"
    os.link(path / "a", outside)

    with open(path / "a", "rb") as file:
        shutil.rmtree(path)
        models.collect_garbage()
        assert file.read() == BIG

    assert outside.read_bytes() == BIG and stat.S_IMODE(outside.stat().st_mode) == 0o444
    assert kept(tmp_path) == set()


def test_a_blob_with_a_link_elsewhere_frees_nothing(tmp_path: Path):
    """Reclaimed bytes are those that the disk gets back; a dry run says the same."""
    models = world(tmp_path, {"m@1": {"a": b"a" * KB, "b": b"b" * KB}})
    path = models.ensure("m")
    os.link(path / "a", tmp_path / "mine")
    shutil.rmtree(path)

    assert collect(models).reclaimed_bytes == KB


def test_the_trash_is_emptied_after_an_hour(tmp_path: Path):
    """Readers that are inside an exchanged tree have that long."""
    world(tmp_path, {"m@1": {"a": b"old", "deep/b": b"b"}}).ensure("m")
    models = world(tmp_path, {"m@1": {"a": b"new"}})
    models.ensure("m")
    trash = tmp_path / "root/trash"
    assert {p.read_bytes() for p in trash.rglob("*/*") if p.is_file()} == {b"old", b"b"}

    models.collect_garbage()
    assert {p.read_bytes() for p in trash.rglob("*/*") if p.is_file()} == {b"old", b"b"}
    for note in trash.glob("*.inventory"):
        age(note, 3700)
    models.collect_garbage()

    assert list(trash.iterdir()) == [] and list((tmp_path / "root/quarantine").iterdir()) == []


def test_the_users_empty_folders_of_an_exchanged_tree_leave_no_rubbish(tmp_path: Path):
    """They are in the new tree; quarantine is for damaged and displaced files."""
    path = world(tmp_path, {"m@1": {"a": b"old"}}).ensure("m")
    (path / "notes").mkdir()
    (path / "notes/mine").write_text("keep me")
    (path / "adapter").mkdir()
    models = world(tmp_path, {"m@1": {"a": b"new"}})
    models.ensure("m")
    for note in (tmp_path / "root/trash").glob("*.inventory"):
        age(note, 3700)

    models.collect_garbage()

    assert (path / "notes/mine").read_text() == "keep me" and (path / "adapter").is_dir()
    assert list((tmp_path / "root/quarantine").iterdir()) == [] and list((tmp_path / "root/trash").iterdir()) == []


# ---- partials


def stale(models, data: bytes, ago_s: float = 0) -> Digest:
    """A partial of *data* with its first piece on record, so old."""
    store = BlobStore.open(models.settings.root)
    partial_with(store, data, 0).close()
    digest = Digest.of(data)
    for path in (store.layout.partial(digest), store.layout.partial(digest) + ".pieces"):
        age(path, ago_s)
    return digest


def test_a_partial_whose_blob_is_committed_is_stale(tmp_path: Path):
    """However young it is; what it took is given back."""
    models = world(tmp_path, {"m@1": {"a": BIG}})
    models.ensure("m")
    digest = stale(models, BIG)

    done = collect(models)

    assert done.partials == [digest] and done.reclaimed_bytes >= 8 << 20
    assert list((tmp_path / "root/partial").iterdir()) == []


def test_a_partial_is_stale_after_a_week_unless_a_lockfile_names_it(tmp_path: Path):
    """No record says what it is for."""
    models = world(tmp_path, {"m@1": {"a": b"a"}})
    models.reconcile()

    digest = stale(models, BIG, 6 * DAY)
    assert collect(models).partials == []
    stale(models, BIG, 8 * DAY)
    assert collect(models).partials == [digest]


def test_a_partial_that_a_registered_lockfile_names_is_never_stale(tmp_path: Path):
    """Its download will be resumed some day."""
    lock = lock_of({"m@1": {"v": {"a": b"a"}}, "n@1": {"v": {"big": BIG}}})
    models = ensurer_of(tmp_path, lock, memory({"a": b"a", "big": BIG}))
    models.reconcile()
    shutil.rmtree(models.local_path("n"))
    os.unlink(blobs_of(tmp_path / "root")[name(BIG)])
    stale(models, BIG, 100 * DAY)

    assert collect(models).partials == []


def test_a_partial_whose_lock_is_held_is_never_stale(tmp_path: Path):
    """Another process is working on it."""
    models = world(tmp_path, {"m@1": {"a": b"a"}})
    models.ensure("m")
    digest = stale(models, BIG, 8 * DAY)
    store = BlobStore.open(tmp_path / "root")

    with store.lock_blob(digest, doing="fetching"):
        assert collect(models).partials == []
    assert collect(models).partials == [digest]


def test_a_partial_of_leased_work_is_not_stale(tmp_path: Path):
    """Unfinished work keeps what it has."""
    models = world(tmp_path, {"m@1": {"a": b"a"}})
    models.ensure("m")
    digest = stale(models, BIG, 8 * DAY)
    leases.take(BlobStore.open(tmp_path / "root"), doing="reconcile", digests=[digest]).close()

    assert collect(models).partials == []


def test_foreign_files_in_partial_are_left_alone(tmp_path: Path):
    """They are not names of ours."""
    models = world(tmp_path, {"m@1": {"a": b"a"}})
    models.ensure("m")
    (tmp_path / "root/partial/README").write_text("mine")
    age(tmp_path / "root/partial/README", 100 * DAY)

    collect(models)

    assert (tmp_path / "root/partial/README").read_text() == "mine"


# ---- eviction


def three(tmp_path: Path, **more):
    """Three trees of 1,000 bytes each, used 3, 2 and 1 days ago, and a fourth that shares b with the second."""
    files = {"m1@1": {"a": b"a" * KB}, "m2@1": {"b": b"b" * KB}, "m3@1": {"c": b"c" * KB}, **more}
    models = world(tmp_path, files)
    models.reconcile()
    for number, key in enumerate(files):
        used(models, key, (len(files) - number) * DAY)
    return models


def left(models) -> list[str]:
    return [s.model for s in models.statuses() if s.state is not ModelState.NOT_PRESENT]


def test_the_least_recently_used_trees_go_until_the_size_fits(tmp_path: Path):
    """And then a lockfile alone keeps nothing."""
    models = three(tmp_path)

    done = collect(models, goals=EvictionTargets(max_size=1_500))

    assert left(models) == ["m3@1"] and done.reclaimed_bytes == 2 * KB
    assert done.trees == [str(models.local_path(m)) for m in ("m1", "m2")]
    assert not (tmp_path / "root/models/m1@1").exists()
    models.reconcile()
    assert left(models) == ["m1@1", "m2@1", "m3@1"]


def test_nothing_is_evicted_where_the_goal_is_met(tmp_path: Path):
    """Not even the oldest."""
    models = three(tmp_path)

    assert collect(models, goals=EvictionTargets(max_size=3 * KB)).trees == []
    assert left(models) == ["m1@1", "m2@1", "m3@1"]


def test_a_use_moves_a_tree_to_the_end_of_the_queue(tmp_path: Path):
    """An ensure without work is a use."""
    models = three(tmp_path)
    models.ensure("m1")

    collect(models, goals=EvictionTargets(max_size=2 * KB))

    assert left(models) == ["m1@1", "m3@1"]


def test_shared_blobs_free_nothing_so_their_trees_are_put_back(tmp_path: Path):
    """The oldest shares all it has with one that stays: taking it would free nothing (D18)."""
    models = three(tmp_path, **{"m4@1": {"again": b"a" * KB}})

    done = collect(models, goals=EvictionTargets(max_size=2 * KB))

    assert left(models) == ["m1@1", "m3@1", "m4@1"] and done.reclaimed_bytes == KB


def test_needless_trees_are_put_back_newest_first(tmp_path: Path):
    """A large one that had to go makes the small ones before it needless (D18)."""
    files = {"s1@1": {"a": b"a" * 10}, "s2@1": {"b": b"b" * 10}, "big@1": {"c": b"c" * 5 * KB}, "new@1": {"d": b"d" * 10}}
    models = world(tmp_path, files)
    models.reconcile()
    for number, key in enumerate(files):
        used(models, key, (4 - number) * DAY)

    done = collect(models, goals=EvictionTargets(max_size=40))

    assert left(models) == ["new@1", "s1@1", "s2@1"] and done.reclaimed_bytes == 5 * KB


def test_trees_that_share_a_blob_go_together_where_that_is_what_helps(tmp_path: Path):
    """Neither alone frees a byte."""
    models = world(tmp_path, {"m1@1": {"a": b"a" * KB}, "m2@1": {"b": b"a" * KB}, "m3@1": {"c": b"c" * KB}})
    models.reconcile()
    for number, key in enumerate(("m1", "m2", "m3")):
        used(models, key, (3 - number) * DAY)

    done = collect(models, goals=EvictionTargets(max_size=KB))

    assert left(models) == ["m3@1"] and done.reclaimed_bytes == KB


def test_pinned_trees_are_not_evicted(tmp_path: Path):
    """By the user or by the manifest."""
    from dataclasses import replace

    models = three(tmp_path)
    pins.pin(BlobStore.open(tmp_path / "root"), VariantId("m1@1", "v"), [Digest.of(b"a" * KB)])
    models.lock = replace(models.lock, models={**models.lock.models, "m2@1": replace(models.lock.models["m2@1"], pin=True)})
    models.reconcile()
    for number, key in enumerate(("m1", "m2", "m3")):
        used(models, key, (3 - number) * DAY)

    done = collect(models, goals=EvictionTargets(max_size=0))

    assert left(models) == ["m1@1", "m2@1"] and done.reclaimed_bytes == KB


def test_leased_trees_are_not_evicted(tmp_path: Path):
    """A program is using it."""
    models = three(tmp_path)

    with models.lease("m1"):
        used(models, "m1", 9 * DAY)
        collect(models, goals=EvictionTargets(max_size=0))
        assert left(models) == ["m1@1"]


@pytest.mark.skipif(not hasattr(os, "O_PATH"), reason="only Linux shows whether a file is open")
@pytest.mark.parametrize("mode", [LinkMode.HARDLINK, LinkMode.SYMLINK, LinkMode.COPY])
def test_trees_with_an_open_file_are_not_evicted(tmp_path: Path, mode: LinkMode):
    """A write lease is refused for a file that any process has open."""
    from dataclasses import replace

    models = world(tmp_path, {"m1@1": {"a": b"a" * KB}, "m2@1": {"b": b"b" * KB}})
    models.settings = replace(models.settings, link_mode=mode)
    models.reconcile()

    with open(models.local_path("m1") / "a", "rb"):
        collect(models, goals=EvictionTargets(max_size=0))
        assert left(models) == ["m1@1"]
    collect(models, goals=EvictionTargets(max_size=0))
    assert left(models) == []


def test_trees_go_by_age(tmp_path: Path):
    """--max-age, however much room there is."""
    models = three(tmp_path)

    done = collect(models, goals=EvictionTargets(max_age_s=2.5 * DAY))

    assert left(models) == ["m2@1", "m3@1"] and len(done.trees) == 1


def test_a_use_in_the_future_is_recent(tmp_path: Path):
    """A clock that was set back makes nothing old (C17)."""
    models = three(tmp_path)
    used(models, "m1", -100 * DAY)

    collect(models, goals=EvictionTargets(max_age_s=2.5 * DAY))

    assert left(models) == ["m1@1", "m2@1", "m3@1"]


def test_trees_go_until_so_much_is_free(tmp_path: Path):
    """--free, counted from what the disk has now."""
    models = three(tmp_path)
    models.free_bytes = lambda: 10_000 - sum(path.stat().st_size for path in blobs_of(tmp_path / "root").values())

    collect(models, goals=EvictionTargets(free=8_500))

    assert left(models) == ["m3@1"]


def test_goals_that_cannot_be_reached_are_reported_with_what_is_missing(tmp_path: Path):
    """Pinned trees stay, and the disk is full of what is not ours; a goal that is reached lacks nothing."""
    models = three(tmp_path)
    models.free_bytes = lambda: 10_000 - sum(path.stat().st_size for path in blobs_of(tmp_path / "root").values())
    pins.pin(BlobStore.open(tmp_path / "root"), VariantId("m1@1", "v"), [Digest.of(b"a" * KB)])

    reached = collect(models, goals=EvictionTargets(max_size=2 * KB, free=8_000))
    missed = collect(models, goals=EvictionTargets(max_size=100, free=9_500))

    assert (reached.over_bytes, reached.lacking_bytes) == (0, 0)
    assert left(models) == ["m1@1"] and (missed.over_bytes, missed.lacking_bytes) == (KB - 100, 500)


def test_gc_says_which_goal_cannot_be_reached(tmp_path: Path):
    """On stderr and in the document, in a dry run too; exit 0, since all that could go went."""
    cli = Cli(tmp_path)
    write_lock(tmp_path, lock_of({"m@1": {"v": {"a": b"a" * KB}}}, sources=["src"]))
    (tmp_path / "src").mkdir()
    (tmp_path / "src/a").write_bytes(b"a" * KB)
    cli.ok("reconcile")
    cli.ok("pin", "m")

    would = cli.ok("gc", "--max-size", "100", "--dry-run", "--json")
    did = cli.ok("gc", "--max-size", "100", "--free", "1000TB", "--json")

    assert would.json["missed"] == {"max_size": 900}
    assert did.json["missed"]["max_size"] == 900 and did.json["missed"]["free"] > 0
    assert "note: " in would.err and "--max-size would be missed by 900 B" in would.err and "--free" not in would.err
    assert "--max-size" in did.err and "--free" in did.err
    assert "missed" not in cli.ok("gc", "--max-size", "1KB", "--json").json


def test_garbage_goes_before_trees(tmp_path: Path):
    """Room that is freed anyway needs no eviction."""
    models = three(tmp_path)
    BlobStore.open(tmp_path / "root").ingest.add_bytes(b"g" * KB)

    done = collect(models, goals=EvictionTargets(max_size=3 * KB))

    assert left(models) == ["m1@1", "m2@1", "m3@1"] and done.reclaimed_bytes == KB


def test_the_users_files_survive_eviction(tmp_path: Path):
    """The folder stays with those alone, and is no longer a tree; edited ones go to quarantine (D7)."""
    models = world(tmp_path, {"m@1": {"a": b"a", "deep/b": b"b", "c": b"c"}})
    path = models.ensure("m")
    (path / "deep/mine").write_text("keep me")
    (path / "c").unlink()
    (path / "c").write_text("my edit")

    models.collect_garbage(goals=EvictionTargets(max_size=0))

    assert tree_of(path) == {"deep/mine": b"keep me"} and kept(tmp_path) == set()
    assert [p.read_text() for p in (tmp_path / "root/quarantine").rglob("c")] == ["my edit"]
    assert models.status("m").state is ModelState.NOT_PRESENT
    models.ensure("m")
    assert tree_of(path) == {"a": b"a", "deep/b": b"b", "c": b"c", "deep/mine": b"keep me"}


def test_a_tree_whose_folder_became_a_symlink_is_evicted_without_touching_what_it_leads_to(tmp_path: Path):
    """Nothing outside store, destination and temp is touched (I7, L11)."""
    models = world(tmp_path, {"m@1": {"a": b"a", "b": b"b"}})
    path = models.ensure("m")
    outside = tmp_path / "outside"
    outside.mkdir()
    for file in ("a", "b", "other"):
        (outside / file).write_text("mine")
    shutil.rmtree(path)
    path.symlink_to(outside)

    with suppress(OSError):  # to refuse is right too
        models.collect_garbage(goals=EvictionTargets(max_size=0))

    assert tree_of(outside) == {"a": b"mine", "b": b"mine", "other": b"mine"}


def test_gc_needs_no_lock_of_a_dead_evictor(tmp_path: Path):
    """A crash between two unlinks leaves garbage for next time and no index to repair (C6)."""
    models = world(tmp_path, {"m@1": {"a": BIG, "b": b"b"}})
    shutil.rmtree(models.ensure("m"))
    store = BlobStore.open(tmp_path / "root")
    os.unlink(store.layout.blob(Digest.of(BIG)))  # its table is left

    models.collect_garbage()

    assert not [p for p in (tmp_path / "root/blobs").rglob("*") if p.is_file()]


def test_the_quarantine_is_emptied_only_on_request(tmp_path: Path):
    """It may be the only copy of the user's work."""
    models = world(tmp_path, {"m@1": {"a": BIG}})
    path = models.ensure("m")
    flip(path / "a", 5)
    models.ensure("m")
    collect(models)
    assert len(list((tmp_path / "root/quarantine").iterdir())) == 1

    done = collect(models, quarantine=True)

    assert done.reclaimed_bytes == len(BIG) and not list((tmp_path / "root/quarantine").iterdir())


def test_short_of_space_ensure_sweeps_garbage_but_evicts_nothing_unasked(tmp_path: Path):
    """Without MODELSTOW_MAX_SIZE or MODELSTOW_MIN_FREE trees are the user's business."""
    models = world(tmp_path, {"m@1": {"a": b"a" * KB}, "n@1": {"b": b"b" * KB}})
    models.ensure("m")
    BlobStore.open(tmp_path / "root").ingest.add_bytes(b"g" * KB)
    models.free_bytes = lambda: 2_500 - sum(path.stat().st_size for path in blobs_of(tmp_path / "root").values())

    models.ensure("n")
    assert left(models) == ["m@1", "n@1"] and kept(tmp_path) == names(b"a" * KB, b"b" * KB)

    shutil.rmtree(models.local_path("n"))
    more = world(tmp_path, {"m@1": {"a": b"a" * KB}, "o@1": {"c": b"c" * 2 * KB}}, free_bytes=models.free_bytes)
    with pytest.raises(NoSpaceError) as caught:
        more.ensure("o")
    assert caught.value.details["bytes_needed"] == 2 * KB and left(more) == ["m@1"]


@root_only
def test_a_disk_that_fills_up_unannounced_is_no_space_and_nothing_is_published(tmp_path: Path):
    """The figures of statvfs were wrong, or another process was faster (F1)."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    try:
        models = world(folder, {"m@1": {"a": BIG, "b": b"b"}}, free_bytes=lambda: 1 << 40)
        with pytest.raises((NoSpaceError, OSError)) as caught:
            models.ensure("m")
        assert getattr(caught.value, "code", "") == "NO_SPACE"
        assert kept(folder) <= names(b"b") and not models.local_path("m").exists()
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# ---- modes


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_the_folders_above_trees_have_explicit_modes(tmp_path: Path, mask: int):
    """Others may read what is published, whatever the umask of who published it (M3)."""
    with umask(mask):
        models = world(tmp_path, {"m@1": {"deep/a": b"a"}})
        path = models.ensure("m")

    assert {stat.S_IMODE(p.stat().st_mode) for p in (path.parent, path, path / "deep")} == {0o755}


# ---- read-only stores


@contextmanager
def read_only(root: Path):
    """The store behind a read-only mount."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount read-only")
    if subprocess.run(["mount", "--bind", str(root), str(root)], capture_output=True).returncode:
        pytest.skip("cannot make a bind mount")
    try:
        if subprocess.run(["mount", "-o", "remount,ro,bind", str(root)], capture_output=True).returncode:
            pytest.skip("cannot remount read-only")
        with pytest.raises(OSError) as caught:
            (root / "probe").touch()
        assert caught.value.errno == errno.EROFS
        yield
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)


def asked(models) -> SimpleNamespace:
    """Everything that needs no write."""
    return SimpleNamespace(
        states=[status.state for status in models.statuses()],
        plan=models.plan().changes,
        removals=models.plan(removals=True).changes,
        fast=models.verify(None, Level.FAST)[0].faults,
        full=models.verify(["m"], Level.FULL)[0].faults,
        success=models.verify_integrity("m").success,
        path=models.ensure("m"),
        changed=[tree.changed for tree in models.reconcile().trees],
        roots=len(roots.read(BlobStore.open_existing(models.settings.root)).lockfiles),
        garbage=models.collect_garbage(dry_run=True).blobs,
    )


@pytest.mark.parametrize("leased", ["no lease", "dead lease", "held lease"])
def test_a_read_only_store_answers_everything_that_needs_no_write(tmp_path: Path, leased: str):
    """A read-only sidecar works, whatever work the writer next to it has in flight (D20)."""
    models = world(tmp_path, {"m@1": {"a": b"a", "big": BIG, "none": b""}})
    models.reconcile()
    lease = leases.take(BlobStore.open(tmp_path / "root"), doing="fetching", digests=[Digest.of(b"x")])
    if leased != "held lease":
        lease.finish() if leased == "no lease" else lease.close()

    with read_only(tmp_path / "root"):
        seen = asked(models)

    assert seen.states == [ModelState.COMPLETE] and not seen.plan and not seen.removals
    assert seen.fast == seen.full == () and seen.success
    assert seen.path == models.local_path("m") and seen.changed == [False]
    assert seen.roots == 1 and seen.garbage == []


def test_a_read_only_store_that_needs_work_is_a_clear_error(tmp_path: Path):
    """And damage is found all the same (F8)."""
    models = world(tmp_path, {"m@1": {"a": b"a"}, "n@1": {"b": b"b"}})
    models.ensure("m")
    flip(models.local_path("m") / "a", 0, forge=True)

    with read_only(tmp_path / "root"):
        assert [fault.kind for fault in models.verify(["m"], Level.FAST)[0].faults] == ["corrupt"]
        with pytest.raises(Exception) as caught:
            models.ensure("n")
        with pytest.raises(Exception) as swept:
            models.collect_garbage()

    for error in (caught.value, swept.value):
        assert isinstance(error, OSError) or getattr(error, "code", "") in ("FILESYSTEM_ERROR", "PERMISSION_DENIED")
        assert "ead-only" in str(error)


def test_a_verification_next_to_a_busy_download_does_not_fail(tmp_path: Path):
    """Restamping a touched blob is optional; the lock that it needs may be held by another process."""
    models = world(tmp_path, {"m@1": {"a": b"a"}})
    path = models.ensure("m")
    os.utime(path / "a")
    store = BlobStore.open(tmp_path / "root")

    with store.lock_blob(Digest.of(b"a"), doing="fetching"):
        audit, _ = models.verify(["m"], Level.FAST)

    assert audit.faults == ()


def test_one_trees_ensure_does_not_make_its_neighbour_corrupt(tmp_path: Path):
    """A blob that vanished is taken back from one tree; the other still holds the right bytes."""
    models = ensurer_of(tmp_path, lock_of({"m@1": {"v": {"a": b"a"}}, "n@1": {"v": {"b": b"a"}}}), MemorySource({}))
    filled = ensurer_of(tmp_path, models.lock, memory({"a": b"a", "b": b"a"}))
    filled.reconcile()
    write_lock(tmp_path, models.lock)
    os.unlink(blobs_of(tmp_path / "root")[name(b"a")])

    models.ensure("m")

    assert models.status("m").state is ModelState.COMPLETE
    assert models.status("n").state is not ModelState.CORRUPT
    models.ensure("n")
    assert models.status("n").state is ModelState.COMPLETE
