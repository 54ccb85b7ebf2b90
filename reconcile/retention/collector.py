"""Garbage collection: mark from the roots, sweep under the store's exclusive lock, evict trees only on request."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from modelstow.cas import (
    EMPTY,
    BlobStore,
    CancellationToken,
    Digest,
    LockTimeoutError,
    StoreStateError,
    Symlink,
    inventory,
    leases,
    locks,
    sweep,
    trash,
    tree,
)
from modelstow.cas.locks import Holder
from modelstow.cas.untrusted import read_state

from ..planning.state import TreeKey
from ..state_dirs import HASH_CACHE, VERIFYING
from . import eviction, roots
from .eviction import EvictionTargets
from .roots import Roots, RootState, TreeRoot

TRASH_S = 3600.0
"""Seconds for which a removed tree stays in the trash, so that its readers can finish; an eviction empties it at once."""
_INCOMING_S, _HASH_CACHE_S = 86_400, 30 * 86_400
_BATCH = 256  # blobs unlinked under one hold of the exclusive lock


@dataclass(slots=True, kw_only=True)
class GcResult:
    """The result of a collection, or in a dry run its forecast. Sizes are bytes."""

    dry_run: bool
    blobs: list[Digest] = field(default_factory=list)
    evicted: list[tuple[str, int]] = field(default_factory=list)  # paths of trees, with the bytes that each frees
    partials: list[Digest] = field(default_factory=list)
    quarantined: int = 0  # files and folders of quarantine/
    reclaimed_bytes: int = 0
    kept_blobs: int = 0
    kept_bytes: int = 0
    over_bytes: int = 0  # how far ``EvictionTargets.max_size`` was missed
    lacking_bytes: int = 0  # how far ``EvictionTargets.free`` was missed

    @property
    def trees(self) -> list[str]:
        """The paths of the trees that were evicted."""
        return [path for path, _ in self.evicted]


class TreeRemover(Protocol):
    """Removal of a tree under its lock, unless *unless* is true under the store's exclusive lock. True if removed."""

    def __call__(self, record: inventory.Inventory, key: TreeKey, *, unless: Callable[[], bool]) -> bool: ...


@dataclass(slots=True, kw_only=True)
class Collector:
    """The garbage collector of one store."""

    store: BlobStore
    remove_tree: TreeRemover
    free: Callable[[], int]  # bytes free on the store's disk
    in_use: Callable[[str], bool]  # whether a process has the file open
    token: CancellationToken
    exclusive: bool = False  # the user asserts that no other process uses this store
    clock: Callable[[], float] = time.time  # seconds since 1970

    def collect(
        self,
        goals: EvictionTargets = EvictionTargets(),
        *,
        dry_run: bool = False,
        quarantine: bool = False,
        state_lost: bool = False,
    ) -> GcResult:
        """Remove what nothing keeps; with *goals*, evict trees until they are met.

        *quarantine* empties ``quarantine/`` too; *state_lost* accepts that ``state/`` was lost.

        Raises StoreStateError, having deleted nothing, where a root cannot be read or ``state/`` was lost;
        LockTimeoutError, Cancelled, OSError.
        """
        if roots.epoch(self.store) != self.store.config.epoch and not state_lost:
            raise StoreStateError(
                f"{self.store.layout.state} was lost: it is not known what keeps which blob, so nothing was deleted",
                hint="run `modelstow reconcile` for each lockfile, or `modelstow gc --state-lost`",
            )
        if not dry_run:
            self.store.prepare()
            self._refuse_unreliable_locks()
            self.store.remove_temp_files(in_blobs=True)
        if state_lost and not dry_run:
            roots.accept_loss(self.store)
        result = GcResult(dry_run=dry_run)
        known = roots.read(self.store)
        self._refuse_strange_intents(known)
        evicted = self._choose(known, goals) if goals.evict else []
        if not dry_run:
            evicted = [(root, freed) for root, freed in evicted if self._evict(root)]
            trash.empty(self.store.layout, self.store.writers, older_than_s=0.0 if goals.evict else TRASH_S)
            self._forget_dead(known)
        result.evicted = [(str(root.record.path(self.store.layout.root)), freed) for root, freed in evicted]
        gone = frozenset(root.record.tree for root, _ in evicted)
        self._sweep(result, lockfiles=not goals.evict, without=gone if dry_run else frozenset())
        self._sweep_partials(result)
        if quarantine:
            result.quarantined, freed = self._empty_quarantine(dry_run=dry_run)
            result.reclaimed_bytes += freed
        self._compare(result, goals)
        return result

    def _compare(self, result: GcResult, goals: EvictionTargets) -> None:
        """Note how far the targets were missed: what is pinned, in use or not the store's stays."""
        if goals.max_size is not None:
            result.over_bytes = max(0, result.kept_bytes - goals.max_size)
        if goals.free is not None:
            free = self.free() + (result.reclaimed_bytes if result.dry_run else 0)
            result.lacking_bytes = max(0, goals.free - free)

    def _refuse_unreliable_locks(self) -> None:
        """Refuse to sweep where locks exclude no one: it could delete what another process is about to link."""
        if self.exclusive:
            return
        with self.store.lock("lock-probe", doing="checking the locks", token=self.token):
            if locks.is_held(self.store.layout.locks / "lock-probe"):
                return
        raise StoreStateError(
            f"two holders can have one lock on the file system of {self.store.layout.root}, so nothing was deleted",
            hint="run gc with --exclusive while no other process uses this store",
        )

    def _refuse_strange_intents(self, known: Roots) -> None:
        """Refuse where another user's change of a tree did not end: what it announces is that user's to finish."""
        for root in known.trees:
            if not root.unfinished or self.store.trees.is_mine(root.record):
                continue
            if not locks.is_held(self.store.layout.locks / f"tree-{root.record.id}"):
                raise StoreStateError(
                    f"user {root.record.writer} has not finished a change of {root.record.tree}: nothing was deleted",
                    hint=f"let that user run the command again, or run `modelstow gc --forget {root.record.id}`",
                )

    # ---- eviction

    def _choose(self, known: Roots, goals: EvictionTargets) -> list[tuple[TreeRoot, int]]:
        simulation = eviction.simulation_of(self.store, known)
        return eviction.choose(known, goals, simulation, free=self.free(), now=self.clock(), is_used=self._is_used)

    def _evict(self, root: TreeRoot) -> bool:
        return self.remove_tree(root.record, root.key, unless=lambda: self._is_used(root))

    def _is_used(self, root: TreeRoot) -> bool:
        """Whether a lease covers the tree or a process has one of its files open."""
        digests = root.digests - {EMPTY}
        for _, record, held in leases.active(self.store):
            if held and digests <= record.digests:
                return True
        path = root.record.path(self.store.layout.root)
        links = {name for name, other in root.record.others.items() if isinstance(other, Symlink)}  # they lead anywhere
        # A process that opened a symlink to a blob has the blob open.
        return any(self.in_use(os.path.realpath(path / name)) for name in root.record.files if name not in links)

    # ---- blobs

    def _sweep(self, result: GcResult, *, lockfiles: bool, without: frozenset[str]) -> None:
        doomed = _links_below(self.store.layout.trash)  # links that go too, and so do not keep a blob's bytes
        for tree_ in without:
            doomed += _links_below(self.store.layout.root / tree_)
        marked_at: object = None
        live: frozenset[Digest] = frozenset()
        queue: list[tuple[Digest, os.DirEntry[str]]] | None = None
        while queue is None or queue:
            with (
                leases.exclusive_store_lock(self.store, doing="collecting garbage", token=self.token)
                if not result.dry_run
                else nullcontext()
            ):
                # Other processes may work between two batches: mark again if any root was added or removed.
                if (now := roots.stamp(self.store)) != marked_at:
                    live, marked_at = roots.read(self.store).live(self.store, lockfiles=lockfiles, without=without), now
                if queue is None:
                    queue = self._garbage(result, live)
                batch = [(digest, entry) for digest, entry in queue[:_BATCH] if digest not in live]
                queue = queue[_BATCH:]
                for digest, entry in batch:
                    with suppress(FileNotFoundError):
                        found = os.stat(entry.path, follow_symlinks=False)
                        other_links = found.st_nlink - 1 - doomed[found.st_ino]
                        result.reclaimed_bytes += found.st_size if other_links <= 0 else 0
                        result.blobs.append(digest)
                if not result.dry_run:
                    sweep.sweep(self.store, [digest for digest, _ in batch])
                    if not queue:
                        for path in sweep.orphan_tables(self.store):
                            with suppress(FileNotFoundError):
                                os.unlink(path)

    def _garbage(self, result: GcResult, live: frozenset[Digest]) -> list[tuple[Digest, os.DirEntry[str]]]:
        """The blobs that are not *live*, by digest; the others are counted as kept."""
        garbage = []
        for digest, entry in self.store.blobs.entries():
            if digest in live:
                result.kept_blobs += 1
                with suppress(FileNotFoundError):
                    result.kept_bytes += os.stat(entry.path, follow_symlinks=False).st_size
            else:
                garbage.append((digest, entry))
        return sorted(garbage, key=lambda row: row[0])

    def _sweep_partials(self, result: GcResult) -> None:
        known = roots.read(self.store)
        leased = {digest for record in known.leased for digest in record.digests}
        for digest in sweep.stale_partials(self.store, known.named_by_lockfiles() | leased):
            try:
                remove = sweep.partial_bytes if result.dry_run else sweep.remove_partial
                result.reclaimed_bytes += remove(self.store, digest)
                result.partials.append(digest)
            except LockTimeoutError:
                continue  # a fetch took it up
        if not result.dry_run:
            self._remove_prefetched()

    def _remove_prefetched(self) -> None:
        """Remove files that a killed `lock` was hashing a day ago, and entries of the hash cache after a month."""
        layout = self.store.layout
        for paths, kept_s in (
            (layout.partials.glob("incoming-*"), _INCOMING_S),
            (_content(layout.state_dir(HASH_CACHE)), _HASH_CACHE_S),
        ):
            for path in paths:
                with suppress(FileNotFoundError):
                    if self.clock() - os.lstat(path).st_mtime > kept_s and not locks.is_held(path):
                        path.unlink()

    # ---- roots

    def _forget_dead(self, known: Roots) -> None:
        for root in known.lockfiles:
            if root.state is RootState.DEAD:
                roots.forget(self.store, root.id)
        for tree_root in known.trees:
            if tree_root.is_dead:
                self._forget_tree(tree_root)
        leases.active(self.store, remove_expired=True)
        for path in _content(self.store.layout.state_dir(VERIFYING)):
            with suppress(OSError):
                holder = Holder.read(read_state(path, self.store.writers))
                if holder is None or not holder.alive:
                    path.unlink()

    def _forget_tree(self, known: TreeRoot) -> None:
        """Remove a dead tree's record, under its lock and after another stat: the tree may exist again by now."""
        with suppress(FileNotFoundError, LockTimeoutError):
            with self.store.lock(f"tree-{known.record.id}", doing="forgetting a tree that is gone", timeout_s=0):
                if roots.read_tree(self.store, known.file).is_dead:
                    known.file.unlink()

    def _empty_quarantine(self, *, dry_run: bool) -> tuple[int, int]:
        """Empty ``quarantine/``: how many entries it had, and the bytes that this frees."""
        freed = count = 0
        for path in sorted(self.store.layout.quarantine.iterdir()):
            count += 1
            for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
                found = os.lstat(file)
                freed += found.st_size if found.st_nlink == 1 and not file.is_dir() else 0
            if not dry_run:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return count, freed


def _content(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _links_below(folder: Path) -> Counter[int]:
    """The number of names of each inode below a folder."""
    found = tree.scan(folder)
    return Counter(found.files.values()) if found else Counter()


__all__ = ["TRASH_S", "Collector", "EvictionTargets", "GcResult", "TreeRemover"]
