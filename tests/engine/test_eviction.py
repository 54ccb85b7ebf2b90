"""The choice of trees to evict, over roots made of values: no blob, no lock, no clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from modelstow.cas import Digest
from modelstow.cas.inventory import Inventory, InventoryEntry
from modelstow.cas.links import LinkKind
from modelstow.reconcile.desired.selectors import VariantId
from modelstow.reconcile.retention import eviction
from modelstow.reconcile.retention.eviction import EvictionSimulation, EvictionTargets
from modelstow.reconcile.retention.pins import Pin
from modelstow.reconcile.retention.roots import Roots, RootState, TreeRoot

NOW = 1_000_000
BLOBS = {letter: Digest.of(letter.encode()) for letter in "abcdef"}
SIZES = dict.fromkeys(BLOBS.values(), 10)


def tree_root(name: str, blobs: str, *, used_at: float, state: RootState = RootState.ALIVE) -> TreeRoot:
    """A tree that was made of some blobs and used at some time."""
    files = {letter: InventoryEntry(BLOBS[letter], LinkKind.HARDLINK, 1) for letter in blobs}
    labels = {"model": f"{name}@1", "variant": "v"}
    record = Inventory(tree=f"models/{name}", labels=labels, files=files)
    return TreeRoot(record=record, file=Path(name), state=state, used_at=used_at)


def roots_of(*trees: TreeRoot, pins: tuple[Pin, ...] = ()) -> Roots:
    return Roots(lockfiles=(), trees=trees, pins=pins, leased=(), inodes={}, stamps=frozenset())


def names(root: TreeRoot) -> str:
    """The models whose variants a tree holds."""
    return " ".join(id_.model for id_ in root.key.variants)


def chosen(known: Roots, targets: EvictionTargets, *, free: int = 0, used: str = "") -> list[str]:
    """The models that are evicted; *used* names those in use."""
    simulation = EvictionSimulation(SIZES, (), known.trees)
    found = eviction.choose(
        known, targets, simulation, free=free, now=NOW, is_used=lambda root: names(root) in used.split()
    )
    assert sum(freed for _, freed in found) == _kept(known) - simulation.kept
    return [names(root) for root, _ in found]


def _kept(known: Roots) -> int:
    return EvictionSimulation(SIZES, (), known.trees).kept


def three() -> Roots:
    """Three trees of one blob each, used 30, 20 and 10 seconds ago."""
    rows = (("m1", "a", 30), ("m2", "b", 20), ("m3", "c", 10))
    return roots_of(*(tree_root(name, blobs, used_at=NOW - ago) for name, blobs, ago in rows))


def test_the_least_recently_used_go_until_the_targets_are_met():
    """By size, by free space (garbage counts as free) and by age."""
    known = three()

    assert chosen(known, EvictionTargets(max_size=60)) == []
    assert chosen(known, EvictionTargets(max_size=20)) == ["m1@1"]
    assert chosen(known, EvictionTargets(free=50), free=5) == ["m1@1", "m2@1"]
    assert chosen(known, EvictionTargets(max_age_s=15)) == ["m1@1", "m2@1"]


def test_what_is_used_pinned_or_gone_is_passed_over():
    """The next in age goes instead; an unreachable target leaves no other choice."""
    known = three()
    pinned = roots_of(*known.trees, pins=(Pin(id=VariantId("m1@1", "v"), digests=frozenset()),))
    unverifiable = tree_root("m0", "d", used_at=0, state=RootState.UNVERIFIABLE)

    assert chosen(known, EvictionTargets(max_size=20), used="m1@1") == ["m2@1"]
    assert chosen(pinned, EvictionTargets(max_size=0)) == ["m2@1", "m3@1"]
    assert chosen(roots_of(*known.trees, unverifiable), EvictionTargets(max_size=30)) == ["m1@1"]


def test_a_tree_that_frees_nothing_is_put_back():
    """It shares all that it has with a newer one."""
    known = roots_of(
        tree_root("m1", "a", used_at=NOW - 30),
        tree_root("m2", "b", used_at=NOW - 20),
        tree_root("m3", "a", used_at=NOW - 10),
    )

    assert chosen(known, EvictionTargets(max_size=10)) == ["m2@1"]


def test_a_tree_that_frees_nothing_stays_however_old_it_is_or_far_the_target():
    """What it has, a pin or a newer tree keeps; two old ones that share all they have free it together."""
    known = roots_of(
        tree_root("m1", "a", used_at=NOW - 30),
        tree_root("m2", "b", used_at=NOW - 25),
        tree_root("m3", "b", used_at=NOW - 20),
        tree_root("m4", "a", used_at=NOW - 10),
        pins=(Pin(id=VariantId("m4@1", "v"), digests=frozenset()),),
    )

    assert chosen(known, EvictionTargets(max_age_s=15)) == ["m2@1", "m3@1"]
    assert chosen(known, EvictionTargets(max_size=0)) == ["m2@1", "m3@1"]


def test_trees_outside_the_store_are_never_evicted():
    """A folder of the user's is no cache, however old it is and whatever it holds."""
    outside = tree_root("m1", "a", used_at=0)
    outside = replace(outside, record=replace(outside.record, tree="/home/user/checkpoints"))
    known = roots_of(outside, tree_root("m2", "b", used_at=NOW - 10))

    assert chosen(known, EvictionTargets(max_size=0, max_age_s=1)) == ["m2@1"]


trees = st.lists(st.tuples(st.sets(st.sampled_from("abcdef")).map("".join), st.integers(0, 5)), max_size=6)


@given(trees, st.integers(0, 60))
def test_a_choice_meets_the_target_with_no_tree_to_spare(rows: list[tuple[str, int]], max_size: int):
    """Evicting nothing that is pinned or used, any size can be had; without any one of the trees it would be missed."""
    made = [tree_root(f"m{n}", blobs, used_at=used_at) for n, (blobs, used_at) in enumerate(rows)]

    names = chosen(roots_of(*made), EvictionTargets(max_size=max_size))

    blobs = {f"m{n}@1": set(blobs) for n, (blobs, _) in enumerate(rows)}
    assert kept_bytes(blobs, gone=set(names)) <= max_size
    assert all(kept_bytes(blobs, gone=set(names) - {name}) > max_size for name in names)


def kept_bytes(blobs: Mapping[str, set[str]], *, gone: set[str]) -> int:
    return 10 * len(set().union(*(held for name, held in blobs.items() if name not in gone)))


@given(trees, st.data())
def test_putting_back_undoes_taking_away(rows: list[tuple[str, int]], data: st.DataObject):
    """In any order."""
    made = [tree_root(f"m{n}", blobs, used_at=used_at) for n, (blobs, used_at) in enumerate(rows)]
    simulation = EvictionSimulation(SIZES, [BLOBS["a"]], made)
    before = simulation.kept
    for root in data.draw(st.permutations(made)):
        simulation.remove(root)
    assert simulation.kept == 10
    for root in data.draw(st.permutations(made)):
        simulation.restore(root)

    assert simulation.kept == before and simulation.total == 60
