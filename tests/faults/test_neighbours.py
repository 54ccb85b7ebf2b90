"""Two users of one shared store: what one of them lays there does not lead the other out of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from builders import as_user, ensurer_of, lock_of, memory, open_folder, tree_of

from modelstow import ModelEnsurer
from modelstow.cas import BlobStore, Digest, StoreStateError
from modelstow.cas.inventory import INTENT, Inventory, InventoryEntry, TreeRecords, tree_id
from modelstow.cas.links import LinkKind
from modelstow.cas.records import encode

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be two users")]

FILES = {"config.json": b"{}", "model.bin": b"weights"}
TREE = "models/m@1/v"
A, B = 1001, 1002


@dataclass
class Shared:
    """A shared store in which A has reconciled a lockfile, and A's home."""

    folder: Path

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def inventories(self) -> Path:
        return self.folder / "root/state/inventories"

    def models(self) -> ModelEnsurer:
        return ensurer_of(self.folder, lock_of({"m@1": {"v": FILES}}), memory(FILES))

    def as_a(self, work: Callable[[ModelEnsurer], object]) -> str:
        return as_user(A, lambda: work(self.models()))

    def as_b(self, work: Callable[[], object]) -> None:
        assert as_user(B, work) == "None"

    def lay(self, name: str, **fields: Any) -> None:
        """B lays a record of the tree with other *fields*."""
        row = Inventory(tree=TREE, labels={"model": "m@1", "variant": "v"})
        known = {"tree": row.tree, "labels": dict(row.labels), "staging": ["", 0], "parent": [0, 0], "suspect": []}
        columns = {"paths": [], "digests": "", "kinds": "", "inodes": []}
        raw = encode("inventory", 1, {**known, **columns, **fields})
        self.as_b(lambda: _replace(self.inventories / name, raw))


def _replace(path: Path, raw: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(raw)
    path.chmod(0o664)


def warm_up(folder: Path) -> None:
    """Load every module that is loaded late: another user may not be allowed to read them."""
    from modelstow.cas.scrub import Level

    models = ensurer_of(folder, lock_of({"m@1": {"v": FILES}}), memory(FILES))
    models.reconcile()
    (models.local_path("m") / "model.bin").unlink()
    models.verify(None, Level.FULL, repair=True)
    models.collect_garbage()


@pytest.fixture
def shared() -> Iterator[Shared]:
    with open_folder() as folder:
        os.chmod(folder, 0o777)
        BlobStore.open(folder / "root", shared=True)
        for path in [folder / "root", *(folder / "root").rglob("*")]:
            os.chown(path, A, 100)
            os.chmod(path, 0o2775 if path.is_dir() else 0o664)
        home = folder / "home"
        (home / ".ssh").mkdir(parents=True)
        (home / ".ssh/key").write_bytes(b"secret")
        (home / ".bashrc").write_bytes(b"alias")
        for path in (home, home / ".ssh", home / ".ssh/key", home / ".bashrc"):
            os.chown(path, A, A)
        os.chmod(home, 0o755)
        warm_up(folder / "warm")
        world = Shared(folder)
        assert "ApplyResult" in world.as_a(lambda models: models.reconcile())
        yield world


def untouched(world: Shared) -> None:
    assert tree_of(world.home) == {".ssh/key": b"secret", ".bashrc": b"alias"}


@pytest.mark.parametrize(
    "staging", ["../../../../home/.ssh", "..", "/etc", ".ssh", ".v.0123.modelstow/..", ".w.01.modelstow"]
)
def test_an_intent_does_not_lead_a_neighbour_out_of_the_store(shared: Shared, staging: str):
    """Whatever staging folder it names, nothing is drained from there; the tree is put right and gc stops (M8)."""
    shared.lay(tree_id(TREE) + INTENT, staging=[staging, 1])
    assert "StoreStateError" in shared.as_a(lambda models: models.collect_garbage())
    (shared.folder / "root" / TREE / "model.bin").unlink()

    assert "error=None" in shared.as_a(lambda models: models.reconcile())
    untouched(shared)
    assert tree_of(shared.folder / "root" / TREE) == FILES
    assert "GcResult" in shared.as_a(lambda models: models.collect_garbage())


@pytest.mark.parametrize("path", ["../../../../home/.bashrc", "/etc/passwd", "a//b", "a/../../b", "", "a\0b", ".", "a/."])
def test_a_path_that_leads_out_of_its_tree_is_refused(shared: Shared, path: str):
    """In an intent with a staging folder of the right inode, and in an inventory (M8)."""
    staging = shared.folder / "root" / "models/m@1" / ".v.0123456789ab.modelstow"
    shared.as_b(staging.mkdir)
    fields = {"paths": [path], "digests": Digest.of(b"x").hex, "kinds": "h", "inodes": [1]}
    for name in (tree_id(TREE) + INTENT, tree_id(TREE)):
        shared.lay(name, staging=[staging.name, staging.stat().st_ino], **fields)
        with pytest.raises(StoreStateError, match="cannot be read"):
            TreeRecords(shared.inventories).read_file(shared.inventories / name)
        shared.as_a(lambda models: models.reconcile())
        untouched(shared)


@pytest.mark.parametrize(
    "fields",
    [
        {"tree": "../home"},
        {"tree": "models/../../home"},
        {"tree": "home"},
        {"tree": "/home/../etc"},
        {"tree": 5},
        {"digests": "../" * 21 + "x", "paths": ["a"], "kinds": "h", "inodes": [1]},
        {"digests": Digest.of(b"x").hex, "paths": ["a"], "kinds": "h", "inodes": ["1"]},
        {"labels": {"lockfile": 5}},
        {"staging": [".v.01.modelstow", "1"]},
        {"parent": [None, None]},
    ],
    ids=str,
)
def test_a_record_with_wrong_values_is_refused_when_it_is_read(shared: Shared, fields: dict[str, Any]):
    """Each value is checked before anything is done with it (M8)."""
    shared.lay("zz", **fields)
    with pytest.raises(StoreStateError, match="cannot be read"):
        TreeRecords(shared.inventories).read_file(shared.inventories / "zz")
    assert "error=None" in shared.as_a(lambda models: models.reconcile())
    assert "StoreStateError" in shared.as_a(lambda models: models.collect_garbage())
    untouched(shared)


@pytest.mark.parametrize("work", ["ensure", "evict", "verify", "gc"])
def test_a_neighbours_record_of_a_folder_outside_the_store_is_not_acted_on(shared: Shared, work: str):
    """What it calls managed is the user's own (M8)."""
    from modelstow.cas.scrub import Level
    from modelstow.reconcile.retention.collector import EvictionTargets

    ssh = str(shared.home / ".ssh")
    fields = {"tree": ssh, "labels": {"model": "m@1", "variant": "v"}, "paths": ["key", "config.json"], "inodes": [1, 1]}
    fields |= {"digests": Digest.of(b"{}").hex * 2, "kinds": "hh"}
    shared.lay(tree_id(ssh), **fields)
    works: dict[str, Callable[[ModelEnsurer], object]] = {
        "ensure": lambda models: models.ensure("m", into=ssh),
        "evict": lambda models: models.collect_garbage(goals=EvictionTargets(max_size=0)),
        "verify": lambda models: models.verify(None, Level.FULL, repair=True),
        "gc": lambda models: models.collect_garbage(),
    }
    done = shared.as_a(works[work])

    assert "Error" not in done, done
    placed = {f".ssh/{path}": data for path, data in FILES.items()} if work == "ensure" else {}
    assert tree_of(shared.home) == {".ssh/key": b"secret", ".bashrc": b"alias"} | placed
    assert not list((shared.folder / "root/quarantine").iterdir())


def test_an_intent_of_ones_own_is_finished_as_before(shared: Shared):
    """Only another user's is passed over (M8)."""
    entry = InventoryEntry(Digest.of(b"{}"), LinkKind.HARDLINK, 1)
    row = Inventory(tree=TREE, files={"config.json": entry}, labels={"model": "m@1", "variant": "v"})
    shared.as_a(lambda models: BlobStore.open(shared.folder / "root").trees.write_intent(row))
    assert "error=None" in shared.as_a(lambda models: models.reconcile())
    assert not [path for path in shared.inventories.iterdir() if path.name.endswith(INTENT)]
