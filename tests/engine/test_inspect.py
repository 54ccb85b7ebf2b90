"""The room ``inspect``: usage, owners, roots, variants and the difference of lockfiles, as values."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from builders import ensurer_of, lock_of, memory

from modelstow import ModelEnsurer, ModelState
from modelstow.cas import EMPTY, BlobStore, Digest, LinkMode, leases
from modelstow.reconcile.desired.selectors import VariantId
from modelstow.reconcile.errors import InvalidConfigError
from modelstow.reconcile.inspect import diff, owners, usage, variants
from modelstow.reconcile.inspect.owners import RootKind
from modelstow.reconcile.retention import pins
from modelstow.reconcile.retention.roots import RootState
from modelstow.reconcile.settings import Settings

OWN, SHARED = b"o" * 1_000, b"s" * 300
FILES = {"own": OWN, "shared": SHARED, "again": SHARED}


def ensured(folder: Path, **more: object) -> ModelEnsurer:
    """Two trees: ``a`` has a blob of its own and one, under two names, that ``b`` has too."""
    lock = lock_of({"a@1": {"v": FILES}, "b@1": {"v": {"shared": SHARED}}})
    models = ensurer_of(folder, lock, memory(FILES), **more)
    models.reconcile()
    return models


def store_of(models: ModelEnsurer) -> BlobStore:
    return BlobStore.open(models.settings.root)


# ---- usage


def test_usage_counts_each_blob_of_a_tree_as_shared_or_unique(tmp_path: Path):
    """Logical counts every path; a blob of two trees is shared in both, once in each."""
    models = ensured(tmp_path)

    found = usage.disk_usage(store_of(models))

    rows = [(tree.variants, tree.path, tree.logical, tree.shared, tree.unique) for tree in found.trees]
    assert rows == [
        ((VariantId("a@1", "v"),), models.local_path("a"), 1_600, 300, 1_000),
        ((VariantId("b@1", "v"),), models.local_path("b"), 300, 300, 0),
    ]
    assert found.totals == usage.Totals(logical=1_900, physical=1_300)


def test_usage_counts_copies_as_unique_and_on_disk(tmp_path: Path):
    """Every path of a copied tree has bytes of its own."""
    root = tmp_path / "root"
    settings = Settings(root=root, lockfile=tmp_path / "models.lock", link_mode=LinkMode.COPY)
    lock = lock_of({"a@1": {"v": FILES}})
    (tmp_path / "models.lock").write_text(lock.format())
    models = ModelEnsurer.open(settings=settings, factories={"mem": lambda: memory(FILES)})
    models.reconcile()

    found = usage.disk_usage(store_of(models))

    assert [(tree.logical, tree.shared, tree.unique) for tree in found.trees] == [(1_600, 0, 1_600)]
    assert (found.totals.logical, found.totals.physical) == (1_600, 1_300 + 1_600)


def test_usage_of_some_variants_limits_the_trees_but_not_the_totals(tmp_path: Path):
    """The totals are the store's."""
    store = store_of(ensured(tmp_path))

    found = usage.disk_usage(store, only={VariantId("b@1", "v")})

    assert [tree.variants for tree in found.trees] == [(VariantId("b@1", "v"),)]
    assert found.totals == usage.disk_usage(store).totals


def test_usage_counts_what_nothing_keeps_as_reclaimable_and_the_quarantine_apart(tmp_path: Path):
    """A blob without a root, and a file that only `gc --quarantine` removes."""
    store = store_of(ensured(tmp_path))
    data = b"nobody's"
    store.ingest.add_bytes(data)
    (store.layout.quarantine / "displaced").write_bytes(b"q" * 50)

    totals = usage.disk_usage(store).totals

    assert (totals.reclaimable, totals.quarantine) == (len(data), 50)
    assert totals.physical == 1_300 + len(data) + 50


def test_an_unused_store_has_no_usage(tmp_path: Path):
    """Reading makes nothing."""
    store = BlobStore.open_readonly(tmp_path / "root")

    assert usage.disk_usage(store) == usage.DiskUsage()
    assert not (tmp_path / "root").exists()


# ---- owners


def test_a_file_of_a_tree_is_owned_by_every_tree_that_has_its_blob(tmp_path: Path):
    """Sorted, each once."""
    models = ensured(tmp_path)
    path = models.local_path("a") / "again"

    found = owners.file_owners(store_of(models), path)

    assert found == owners.FileOwners(
        path=str(path),
        size=300,
        digest=Digest.of(SHARED),
        models=("a@1", "b@1"),
        trees=(str(models.local_path("a")), str(models.local_path("b"))),
    )


def test_a_hardlink_elsewhere_is_known_by_its_inode(tmp_path: Path):
    """And so is a blob by its own name."""
    models = ensured(tmp_path)
    os.link(models.local_path("a") / "own", tmp_path / "elsewhere")
    store = store_of(models)

    for path in (tmp_path / "elsewhere", store.layout.blob(Digest.of(OWN))):
        assert owners.file_owners(store, path).models == ("a@1",)


def test_a_file_that_is_no_blob_has_no_owners(tmp_path: Path):
    """With a store or without one; content is not compared."""
    models = ensured(tmp_path)
    path = tmp_path / "same-bytes"
    path.write_bytes(OWN)

    for store in (store_of(models), None):
        assert owners.file_owners(store, path) == owners.FileOwners(path=str(path), size=len(OWN))


def test_an_empty_file_is_the_empty_blob(tmp_path: Path):
    """It needs no inode: the empty blob is nowhere stored."""
    models = ensured(tmp_path)
    (tmp_path / "empty").touch()

    found = owners.file_owners(store_of(models), tmp_path / "empty")

    assert (found.digest, found.trees) == (EMPTY, ())


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_only_regular_files_have_owners(tmp_path: Path, name: str):
    """The error names the path."""
    with pytest.raises(InvalidConfigError, match=str(tmp_path)):
        owners.file_owners(None, tmp_path / name)


# ---- roots


def test_roots_are_listed_by_kind_with_their_state(tmp_path: Path):
    """A tree whose folder is gone is dead."""
    models = ensured(tmp_path)
    store = store_of(models)
    pins.pin(store, VariantId("a@1", "v"), [Digest.of(OWN)])
    lease = leases.take(store, doing="testing", digests=[Digest.of(OWN)])
    for path in models.local_path("b").iterdir():
        path.unlink()
    models.local_path("b").rmdir()

    found = owners.list_roots(store)
    lease.finish()

    rows = [(entry.kind, entry.path, entry.state) for entry in found]
    assert rows == [
        (RootKind.LEASE, "", RootState.ALIVE),
        (RootKind.LOCKFILE, str(tmp_path / "models.lock"), RootState.ALIVE),
        (RootKind.PIN, "", RootState.ALIVE),
        (RootKind.TREE, str(models.local_path("a")), RootState.ALIVE),
        (RootKind.TREE, str(models.local_path("b")), RootState.DEAD),
    ]
    assert (found[0].id, found[2].id) == ("testing", "a@1#v")


def test_a_blob_is_kept_by_each_root_that_names_it(tmp_path: Path):
    """Each reason once, whatever number of digests it keeps."""
    models = ensured(tmp_path)

    reasons = owners.kept_by(store_of(models), [Digest.of(OWN), Digest.of(SHARED)])

    assert sorted(reasons) == [f"lockfile {tmp_path / 'models.lock'}", "tree models/a@1/v", "tree models/b@1/v"]


def test_a_blob_that_only_an_unrecorded_file_keeps_is_explained(tmp_path: Path):
    """And one that nothing keeps has no reason."""
    store = store_of(ensured(tmp_path))
    kept, garbage = b"kept by a link", b"kept by nothing"
    for data in (kept, garbage):
        store.ingest.add_bytes(data)
    os.link(store.layout.blob(Digest.of(kept)), store.layout.trees / "mine")

    assert owners.kept_by(store, [Digest.of(kept)]) == ("a file below models/ that is not on record",)
    assert owners.kept_by(store, [Digest.of(garbage)]) == ()


# ---- variants


def test_variants_are_listed_with_size_state_and_pin(tmp_path: Path):
    """A blob counts once, however many paths have it."""
    models = ensured(tmp_path)

    found = variants.list_variants(models.lock, models.statuses(), {VariantId("b@1", "v")})

    rows = [(entry.model, entry.variant, entry.state, entry.bytes, entry.pinned) for entry in found]
    assert rows == [("a@1", "v", ModelState.COMPLETE, 1_300, False), ("b@1", "v", ModelState.COMPLETE, 300, True)]
    assert [entry.path for entry in found] == [models.local_path("a"), models.local_path("b")]


# ---- diff


def test_lockfiles_differ_by_their_blobs(tmp_path: Path):
    """A file that only changed its path is kept."""
    old = lock_of({"m@1": {"v": {"same": b"1" * 10, "gone": b"2" * 20}}})
    new = lock_of({"m@2": {"v": {"moved": b"1" * 10, "new": b"3" * 30, "new-again": b"3" * 30}}})

    assert diff.compare(old, new) == diff.LockfileDiff(
        fetch=diff.BlobGroup(files=2, bytes=30, paths=("new", "new-again")),
        keep=diff.BlobGroup(files=1, bytes=10, paths=("moved",)),
        drop=diff.BlobGroup(files=1, bytes=20, paths=("gone",)),
    )


def test_equal_lockfiles_have_nothing_to_fetch_or_drop(tmp_path: Path):
    """The difference of a lockfile to itself is what it keeps."""
    lock = lock_of({"m@1": {"v": FILES}})

    found = diff.compare(lock, lock)

    assert found.fetch == found.drop == diff.BlobGroup(files=0, bytes=0, paths=())
    assert (found.keep.files, found.keep.bytes) == (3, 1_300)
