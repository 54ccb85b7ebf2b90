"""A real store and its trees against a dictionary, through whatever users, bit rot and crashes do to them."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from builders import ensurer_of, in_memory, lock_of, piece_range, some_bytes
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from store_fixtures import flip

from modelstow import EnsureOptions, ModelState
from modelstow.backends.memory import MemorySource
from modelstow.cas import BlobStore, Digest, leases
from modelstow.cas.pieces import piece_hash
from modelstow.cas.scrub import Level
from modelstow.reconcile.retention.collector import EvictionTargets

pytestmark = pytest.mark.slow

OVER_A_TABLE = some_bytes((1 << 20) + 77, 21)
OVER_A_PIECE = some_bytes((8 << 20) + 99, 22)
A, B, C = b"a", b"bb", b"ccc"

# Small, colliding worlds: blobs shared between trees and versions, files that come and go, a file that becomes a folder.
VERSIONS: dict[int, dict[str, dict[str, bytes]]] = {
    1: {"x": {"a": A, "deep/b": B, "big": OVER_A_TABLE}, "y": {"a": A, "huge": OVER_A_PIECE}, "z": {"c": C, "empty": b""}},
    2: {"x": {"a": B, "deep": A, "c": C}, "y": {"a": A, "huge": OVER_A_PIECE, "big": OVER_A_TABLE}},
    3: {"x": {"a": A, "deep/b": C, "big": OVER_A_PIECE}, "z": {"c": B, "deep/er/c": C}},
}
CONTENTS = {Digest.of(data): data for tree in VERSIONS.values() for files in tree.values() for data in files.values()}
SOURCE = MemorySource(
    {f"mem://o/{digest.hex}/{path}": data for digest, data in CONTENTS.items() for path in ("a", "b", "c", "big", "huge")}
)

trees = st.sampled_from("xyz")
versions = st.sampled_from(sorted(VERSIONS))
paths = st.sampled_from(sorted({path for tree in VERSIONS.values() for files in tree.values() for path in files}))


def locked(version: int):
    """The lockfile of a version, with one locator a blob."""
    from dataclasses import replace

    lock = lock_of({f"{name}@1": {"v": files} for name, files in VERSIONS[version].items()})
    blobs = {d: blob._replace(urls=(f"mem://o/{d.hex}/a",)) for d, blob in lock.blobs.items()}
    return replace(lock, blobs=blobs)


class StoreAndTrees(RuleBasedStateMachine):
    """The model: which version of which tree was ensured last, which names are disturbed, and the user's own files."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="modelstow-", dir=in_memory()))
        self.root = self.folder / "root"
        self.trees: dict[str, dict[str, bytes]] = {}  # tree -> what was ensured last
        self.disturbed: set[Path] = set()  # names in trees and of blobs whose bytes were touched
        self.users: set[bytes] = set()
        self.digests: dict[tuple[int, ...], str] = {}
        self.models = self.at(1)

    def teardown(self) -> None:
        if not hasattr(self, "folder"):
            return
        try:
            self.everything_can_be_had_again()
        finally:
            shutil.rmtree(self.folder)

    # ---- the model

    def at(self, version: int):
        return ensurer_of(self.folder, locked(version), SOURCE)

    def tree(self, name: str) -> Path:
        return self.root / "models" / f"{name}@1" / "v"

    def published(self, name: str, version: int) -> None:
        """A tree was published: its names and the blobs it needs are as the lock says."""
        self.trees[name] = VERSIONS[version][name]
        self.disturbed -= {path for path in self.disturbed if path.is_relative_to(self.tree(name))}
        blobs = self.blobs()
        self.disturbed -= {blobs[Digest.of(data).hex] for data in VERSIONS[version][name].values() if data}

    def blobs(self) -> dict[str, Path]:
        """Every blob by its hex digest."""
        return {digest.hex: Path(entry.path) for digest, entry in BlobStore.open_readonly(self.root).blobs.entries()}

    def disturb(self, path: Path) -> None:
        """Info every name of an inode."""
        ino = path.stat().st_ino
        names = [p for p in (*(self.root / "models").rglob("*"), *self.blobs().values()) if p.is_file()]
        self.disturbed |= {p for p in names if p.stat().st_ino == ino}

    def file(self, name: str, path: str) -> Path | None:
        """A file of a tree that is there and holds bytes."""
        there = self.tree(name) / path
        return there if path in self.trees.get(name, {}) and there.is_file() and there.stat().st_size else None

    def digest(self, path: Path) -> str:
        """The sha256 of a file's content; read once for each state that it can be in."""
        found = path.stat()
        key = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if key not in self.digests:
            self.digests[key] = Digest.of_path(path).hex
        return self.digests[key]

    # ---- what modelstow is asked

    @rule(name=trees, version=versions)
    def ensure(self, name: str, version: int) -> None:
        if name in VERSIONS[version]:
            self.at(version).ensure(name)
            self.published(name, version)

    @rule(name=trees, version=versions)
    def force(self, name: str, version: int) -> None:
        if name in VERSIONS[version]:
            self.at(version).ensure(name, force_redownload=True)
            self.published(name, version)

    @rule(version=versions)
    def reconcile(self, version: int) -> None:
        outcome = self.at(version).reconcile()
        assert outcome.error is None
        for name in list(self.trees):
            if name not in VERSIONS[version]:
                del self.trees[name]
        for name in VERSIONS[version]:
            self.published(name, version)
            assert self.at(version).status(name).state is ModelState.COMPLETE

    @rule()
    def gc(self) -> None:
        live = {Digest.of(data).hex for files in self.trees.values() for data in files.values() if data}
        before = live & self.blobs().keys()
        if (self.root / "modelstow.json").exists():
            self.models.collect_garbage()
        assert before <= self.blobs().keys(), "a live blob was swept"

    @rule(size=st.sampled_from([0, 10, 2 << 20]))
    def evict(self, size: int) -> None:
        gone = self.models.collect_garbage(goals=EvictionTargets(max_size=size)).trees
        for name in list(self.trees):
            if str(self.tree(name)) in gone:
                del self.trees[name]

    @rule(level=st.sampled_from([Level.FAST, Level.FULL]))
    def verify(self, level: Level) -> None:
        self.models.verify(None, level)

    # ---- what others do

    @rule(name=trees, path=paths, at=st.integers(0, 2**32))
    def edit(self, name: str, path: str, at: int) -> None:
        if (there := self.file(name, path)) is not None:
            self.disturb(there)
            flip(there, at % there.stat().st_size)

    @rule(name=trees, path=paths, at=st.integers(0, 2**32))
    def rot_is_found_by_verify(self, name: str, path: str, at: int) -> None:
        """A bit flips without a trace; verify finds it, whatever else is wrong."""
        there = self.file(name, path)
        if there is None or there in self.disturbed:
            return
        self.disturb(there)
        flip(there, at % there.stat().st_size, forge=True)
        found, _ = self.models.verify(None, Level.FAST)
        assert any(str(there) in fault.paths for fault in found.faults)

    @rule(name=trees, path=paths)
    def touch(self, name: str, path: str) -> None:
        if (there := self.file(name, path)) is not None:
            os.utime(there)

    @rule(name=trees, path=paths)
    def delete(self, name: str, path: str) -> None:
        if (there := self.file(name, path)) is not None:
            there.unlink()
            self.disturbed.add(there)

    @rule(digest=st.sampled_from(sorted(CONTENTS)))
    def delete_a_blob(self, digest: Digest) -> None:
        if (path := self.blobs().get(digest.hex)) is not None:
            path.unlink()
            self.disturbed.discard(path)

    @rule(name=trees, path=st.sampled_from(["mine", "own/mine", "deep/mine", "c", "big", "deep/b"]))
    def add_a_users_file(self, name: str, path: str) -> None:
        there, data = self.tree(name) / path, b"mine, the %dth" % len(self.users)
        if self.tree(name).is_dir() and not os.path.lexists(there) and path not in self.trees.get(name, {}):
            if there.parent.is_file() or there.parent.is_symlink():
                return
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_bytes(data)
            self.users.add(data)

    @rule(digest=st.sampled_from(sorted(CONTENTS)), good=st.booleans(), kept=st.booleans())
    def be_killed_while_fetching(self, digest: Digest, good: bool, kept: bool) -> None:
        """What kill -9 leaves: a partial, right or torn, and a lease without a holder."""
        if not self.root.is_dir() or not (data := CONTENTS[digest]):
            return
        store = BlobStore.open(self.root)
        store.prepare()
        if kept:
            leases.take(store, doing="killed", digests=[digest]).close()
        partial = store.ingest.open(digest, len(data))
        start, stop = piece_range(0, len(data))
        partial.write(0, data[start:stop] if good else bytes(stop))
        partial.finish(0, piece_hash(data[start:stop]))
        partial.close()

    # ---- what holds at every moment

    @invariant()
    def untouched_blobs_are_their_names(self) -> None:
        for name, path in self.blobs().items():
            if path not in self.disturbed:
                assert self.digest(path) == name

    @invariant()
    def untouched_trees_equal_the_lock(self) -> None:
        for name, files in self.trees.items():
            for path, data in files.items():
                there = self.tree(name) / path
                assert there in self.disturbed or self.digest(there) == Digest.of(data).hex

    @invariant()
    def every_file_of_the_users_is_somewhere(self) -> None:
        places = [self.root / "models", self.root / "quarantine"]
        found = {p.read_bytes() for place in places for p in place.rglob("*") if p.is_file() and p.stat().st_size < 100}
        assert self.users <= found

    @invariant()
    def nothing_of_staging_is_left(self) -> None:
        names = (p.name for place in ("models", "state", "pins") for p in (self.root / place).rglob(".*"))
        assert not [name for name in names if name.startswith((".tmp-", ".modelstow-")) or name.endswith(".modelstow")]

    def everything_can_be_had_again(self) -> None:
        """No operator is needed: ensure repairs whatever was done."""
        for version in VERSIONS:
            outcome = self.at(version).ensure_all(None, options=EnsureOptions())
            assert outcome.error is None
            for name, files in VERSIONS[version].items():
                self.published(name, version)
                seen = {path: (self.tree(name) / path).read_bytes() for path in files}
                assert seen == files and self.at(version).status(name).state is ModelState.COMPLETE
            self.every_file_of_the_users_is_somewhere()
        for name in {Digest.of(d).hex for files in VERSIONS[3].values() for d in files.values() if d}:
            assert Digest.of_path(self.blobs()[name]).hex == name


TestStoreAndTrees = StoreAndTrees.TestCase
TestStoreAndTrees.settings = settings(
    max_examples=20 if settings().derandomize else 300,
    phases=[phase for phase in settings().phases if phase is not Phase.shrink or not settings().derandomize],
    stateful_step_count=20,
    suppress_health_check=[*settings().suppress_health_check, HealthCheck.filter_too_much],
)
