"""A tree that holds the files of several variants: each of them names it and keeps it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from builders import CalledCli, assert_sound, ensurer_of, lock_of, memory, tree_of, write_lock

from modelstow import ModelEnsurer, ModelState
from modelstow.cas import BlobStore, Digest, StoreStateError
from modelstow.cas.scrub import Level
from modelstow.reconcile import snapshot_writer
from modelstow.reconcile.cli.sync import plan_answer
from modelstow.reconcile.desired.lockfile import Lockfile
from modelstow.reconcile.desired.selectors import VariantId, labels, labels_by_variant, merge_labels, remembered
from modelstow.reconcile.errors import ApplyError, InvalidConfigError
from modelstow.reconcile.inspect import owners, usage
from modelstow.reconcile.planning.planner import find_work, plan, statuses
from modelstow.reconcile.planning.state import Desired, DesiredTree, TreeKey
from modelstow.reconcile.retention import pins, roots
from modelstow.reconcile.retention.collector import EvictionTargets

pytestmark = pytest.mark.slow

A, B = VariantId("a@1", "v"), VariantId("b@1", "w")
FILES_A, FILES_B = {"a.bin": b"a" * 100, "both.txt": b"both"}, {"b/b.bin": b"b" * 200, "both.txt": b"both"}
PLACE = "models/pair"


def locked(*, a: bool = True, b: bool = True, pin_b: bool = False) -> Lockfile:
    lock = lock_of(({"a@1": {"v": FILES_A}} if a else {}) | ({"b@1": {"w": FILES_B}} if b else {}))
    models = {key: replace(model, pin=pin_b and key == "b@1") for key, model in lock.models.items()}
    return replace(lock, models=models)


def ensurer(folder: Path, lock: Lockfile | None = None) -> ModelEnsurer:
    return ensurer_of(folder, lock or locked(), memory(FILES_A | FILES_B))


def pair(models: ModelEnsurer, place: str = PLACE) -> Desired:
    """One tree with the files of both variants."""
    a, b = models.desired([A, B]).trees
    tree = DesiredTree(
        key=TreeKey((A, B), place),
        path=models.settings.root / place,
        files={**a.files, **b.files},
        labels=merge_labels([b.labels, a.labels]),
    )
    return replace(models.desired([]), trees=(tree,))


def published(models: ModelEnsurer, place: str = PLACE) -> Path:
    """The folder of that tree, after it was published."""
    desired = pair(models, place)
    models.apply(plan(desired, models.observe(desired)))
    return desired.trees[0].path


def store_of(models: ModelEnsurer) -> BlobStore:
    return BlobStore.open(models.settings.root)


# ---- publishing


def test_it_is_published_and_reported_once_for_each_variant(tmp_path: Path):
    """Whoever looks for a variant finds the folder that holds it."""
    models = ensurer(tmp_path)
    desired = pair(models)

    report = models.apply(plan(desired, models.observe(desired)))

    path = tmp_path / "root" / PLACE
    assert tree_of(path) == FILES_A | FILES_B
    assert [(each.model, each.variant, each.path) for each in report.published] == [
        ("a@1", "v", path),
        ("b@1", "w", path),
    ]
    assert report.linked_files == 3
    assert_sound(tmp_path / "root")


def test_its_record_names_every_variant_and_nothing_is_left_to_do(tmp_path: Path):
    """The key that was desired is read back, whatever the order of the labels that were merged."""
    models = ensurer(tmp_path)
    published(models)
    desired = pair(models)

    [root] = roots.read(store_of(models)).trees

    assert root.key == desired.trees[0].key and str(root.key) == "a@1#v, b@1#w"
    work = find_work(desired, models.observe(desired))
    assert not work.trees and not work.plan.changes


def test_each_variant_has_the_status_of_the_tree(tmp_path: Path):
    """Drift of one file is drift of all that share the folder."""
    models = ensurer(tmp_path)
    path = published(models)
    desired = pair(models)

    before = statuses(desired, models.observe(desired))
    (path / "a.bin").unlink()
    after = statuses(desired, models.observe(desired))

    assert [(each.model, each.variant, each.local_path) for each in before] == [("a@1", "v", path), ("b@1", "w", path)]
    assert {each.state for each in before} == {ModelState.COMPLETE}
    assert {(each.state, each.missing_files) for each in after} == {(ModelState.PARTIAL, ("a.bin",))}


def test_a_failed_apply_names_every_variant_of_the_tree(tmp_path: Path):
    """What failed is the folder of both."""
    models = ensurer_of(tmp_path, locked(), memory(FILES_A))
    desired = pair(models)

    with pytest.raises(ApplyError, match="a@1#v, b@1#w: "):
        models.apply(plan(desired, models.observe(desired)))


def test_a_tree_that_cannot_be_published_stops_no_other_tree_of_its_variants(tmp_path: Path):
    """Failures belong to a folder, not to a name that several folders have."""
    models = ensurer(tmp_path)
    (tmp_path / "file").write_text("in the way")
    [good], [bad] = pair(models).trees, pair(models, str(tmp_path / "file/below")).trees
    desired = replace(pair(models), trees=(bad, good))

    with pytest.raises(ApplyError):
        models.apply(plan(desired, models.observe(desired)))

    assert tree_of(good.path) == FILES_A | FILES_B


def test_damage_is_found_and_repaired(tmp_path: Path):
    """`verify` reads every tree on record."""
    models = ensurer(tmp_path)
    path = published(models)
    (path / "b/b.bin").chmod(0o644)
    (path / "b/b.bin").write_bytes(b"x" * 200)

    found, mended = models.verify(None, Level.FULL, repair=True)

    assert {fault.digest for fault in found.faults} == {Digest.of(FILES_B["b/b.bin"])}
    assert mended is not None and mended.error is None and tree_of(path) == FILES_A | FILES_B
    assert [(each.model, each.changed) for each in mended.trees] == [("a@1", True), ("b@1", True)]


def test_no_stat_snapshot_is_taken_of_it(tmp_path: Path):
    """A row of a snapshot names one variant."""
    models = ensurer(tmp_path)
    published(models)
    desired = pair(models)

    snapshot_writer.take(models.settings, models.lock, models.lock_text, desired, models.observe(desired), 1 << 62)

    assert not list((tmp_path / "root/state").glob("snapshots/*"))


# ---- what keeps it


@pytest.mark.parametrize("outside", [False, True])
def test_its_blobs_are_kept(tmp_path: Path, outside: bool):
    """Those of every variant, inside the store and outside."""
    models = ensurer(tmp_path)
    published(models, str(tmp_path / "outside") if outside else PLACE)

    done = models.collect_garbage()

    assert (done.blobs, done.kept_blobs) == ([], 3)


def test_a_pin_of_one_variant_keeps_it_from_eviction(tmp_path: Path):
    """And without the pin it goes."""
    models = ensurer(tmp_path)
    path = published(models)
    pins.pin(store_of(models), B, [])

    pinned = models.collect_garbage(goals=EvictionTargets(max_size=0)).trees
    pins.unpin(store_of(models), B)
    evicted = models.collect_garbage(goals=EvictionTargets(max_size=0)).trees

    assert (pinned, evicted) == ([], [str(path)]) and not path.exists()


def test_the_manifest_pins_the_variants_that_it_names_and_no_others(tmp_path: Path):
    """A pin does not pass to another variant through a folder that both share."""
    models = ensurer(tmp_path, locked(pin_b=True))
    published(models)

    assert roots.read(store_of(models)).pinned() == {B}
    assert models.collect_garbage(goals=EvictionTargets(max_size=0)).trees == []


def test_reconcile_keeps_it_while_the_lockfile_names_one_of_its_variants(tmp_path: Path):
    """And removes it when that names none."""
    path = published(ensurer(tmp_path))

    ensurer(tmp_path, locked(a=False)).reconcile()
    kept = path.exists()
    removed = ensurer(tmp_path, locked(a=False, b=False)).reconcile().report.removed

    assert kept and not path.exists()
    assert {(gone.model, gone.variant) for gone in removed if gone.path == path} == {("a@1", "v"), ("b@1", "w")}


def test_another_lockfile_that_names_one_of_its_variants_takes_it_over(tmp_path: Path):
    """Neither lockfile alone decides."""
    models = ensurer(tmp_path)
    path = published(models)
    other = write_lock(tmp_path / "other", locked(a=False))
    ModelEnsurer.open(root=models.settings.root, lockfile=other, factories=models.factories).reconcile()

    ensurer(tmp_path, locked(a=False, b=False)).reconcile()

    [root] = [root for root in roots.read(store_of(models)).trees if root.record.tree == PLACE]
    assert path.is_dir() and root.record.labels["lockfile"] == str(other) and root.key.variants == (A, B)


def test_another_lockfile_with_other_content_for_one_variant_refuses_it(tmp_path: Path):
    """Before anything is fetched."""
    models = ensurer(tmp_path)
    other = lock_of({"b@1": {"w": {"b/b.bin": b"other"}}})
    path = write_lock(tmp_path / "other", other)
    factories = {"mem": lambda: memory({"b/b.bin": b"other"})}
    ModelEnsurer.open(root=models.settings.root, lockfile=path, factories=factories).reconcile()

    with pytest.raises(InvalidConfigError, match="b@1#w is locked with other content"):
        published(models)


# ---- who is shown to use it


def test_usage_counts_it_once_under_all_its_variants(tmp_path: Path):
    """And finds it by any of them."""
    models = ensurer(tmp_path)
    published(models)
    store = store_of(models)

    [row] = usage.disk_usage(store).trees

    assert (row.variants, row.logical, row.unique) == ((A, B), 304, 304)
    assert [usage.disk_usage(store, only={id_}).trees for id_ in (A, B)] == [(row,), (row,)]
    assert usage.disk_usage(store, only={VariantId("c@1", "v")}).trees == ()


def test_a_file_of_it_is_owned_by_every_model(tmp_path: Path):
    """The folder is one, and its record does not divide the files."""
    models = ensurer(tmp_path)
    path = published(models)

    found = owners.file_owners(store_of(models), path / "a.bin")

    assert (found.models, found.trees) == (("a@1", "b@1"), (str(path),))


def test_documents_list_its_variants(tmp_path: Path):
    """In `du` and `plan`, where one row stands for the whole tree."""
    models = ensurer(tmp_path)
    desired = pair(models)
    both = [{"model": "a@1", "variant": "v"}, {"model": "b@1", "variant": "w"}]

    planned = plan_answer(plan(desired, models.observe(desired)))
    published(models)
    ran = CalledCli(tmp_path).ok("du", "--json")

    links = [row for row in planned.document["actions"] if row["do"] == "link"]
    assert [(row["variants"], row["path"]) for row in links] == [(both, p) for p in ("a.bin", "b/b.bin", "both.txt")]
    assert any(line.startswith("a@1#v, b@1#w: link 3 files") for line in planned.lines)
    assert [row["variants"] for row in ran.json["trees"]] == [both]
    assert "a@1#v, b@1#w" in CalledCli(tmp_path).ok("du").out


def test_it_is_evicted_by_the_name_of_any_variant(tmp_path: Path):
    """Unless one is pinned; a tree of that variant alone is meant first."""
    models = ensurer(tmp_path)
    path, cli = published(models), CalledCli(tmp_path)
    models.ensure("a")
    pins.pin(store_of(models), A, [])

    assert "a@1#v is pinned" in cli.run("evict", "b").err and path.exists()
    pins.unpin(store_of(models), A)
    assert cli.ok("evict", "a").out == f"evicted a@1#v  {models.local_path('a')}\n" and path.exists()
    assert cli.ok("evict", "b").out == f"evicted a@1#v, b@1#w  {path}\n" and not path.exists()


# ---- labels


def test_each_variant_remembers_its_own_components():
    """One variant's choice says nothing of another's."""
    one, two = labels(A, None, ["te"], [], pin=False), labels(B, None, [], ["vae"], pin=False)

    merged = merge_labels([one, two])

    assert remembered(merged, A) == ({"te"}, set()) and remembered(merged, B) == (set(), {"vae"})
    assert remembered(merged, VariantId("c@1", "v")) == (set(), set())
    assert json.loads(merged["variants"]) == [one, two]


@pytest.mark.parametrize("text", ["[]", "{}", "[1]", "nonsense", '[{"model": "m@1"}, null]'])
def test_a_record_that_names_no_variants_stops_whoever_would_remove_its_tree(text: str):
    """Wanted by none of its variants, it would be removed."""
    with pytest.raises(StoreStateError):
        labels_by_variant({"variants": text})
