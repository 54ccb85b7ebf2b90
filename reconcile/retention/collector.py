"""Garbage collection: mark from the roots, sweep under the store's exclusive lock, evict only when asked.

Least recently used trees are added on paper until enough would be freed (a shared blob frees nothing), then put back,
newest first, where they were not needed. Pinned, leased and used trees are passed over.
"""

from __future__ import annotations

import json
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
    inventory,
    leases,
    locks,
    sweep,
    trash,
    tree,
)
from modelstow.cas.locks import Holder

from ..planning.state import TreeKey
from ..state_dirs import HASH_CACHE, VERIFYING
from . import roots
from .roots import Roots, RootState, TreeRoot

TRASH_S = 3600.0
_INCOMING_S, _RECALLED_S = 86_400, 30 * 86_400
_BATCH = 256  # blobs unlinked under one hold of the exclusive lock


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionTargets:
    """How far to evict; None: not at all for this reason."""

    max_size: int | None = None  # bytes of blobs to keep at most
    free: int | None = None  # bytes that should be free on the disk
    max_age_s: float | None = None  # seconds without use after which a tree goes

    @property
    def evict(self) -> bool:
        return any(goal is not None for goal in (self.max_size, self.free, self.max_age_s))


@dataclass(slots=True, kw_only=True)
class GcResult:
    """What went, or would go in a dry run."""

    dry_run: bool
    blobs: list[Digest] = field(default_factory=list)
    trees: list[str] = field(default_factory=list)  # paths
    partials: list[Digest] = field(default_factory=list)
    reclaimed_bytes: int = 0
    kept_blobs: int = 0
    kept_bytes: int = 0
    over_bytes: int = 0  # how far ``EvictionTargets.max_size`` was missed
    lacking_bytes: int = 0  # how far ``EvictionTargets.free`` was missed


class TreeRemover(Protocol):
    """Takes a tree away under its lock, unless *unless* says no under the store's exclusive one; whether it did."""

    def __call__(self, record: inventory.Inventory, key: TreeKey, *, unless: Callable[[], bool]) -> bool: ...


@dataclass(slots=True, kw_only=True)
class Collector:
    """Collects one store's garbage. *remove_tree* takes a tree away under its lock."""

    store: BlobStore
    remove_tree: TreeRemover
    free: Callable[[], int]
    in_use: Callable[[str], bool]
    token: CancellationToken
    exclusive: bool = False  # the user says that nobody else uses this store
    clock: Callable[[], float] = time.time

    def collect(
        self,
        goals: EvictionTargets = EvictionTargets(),
        *,
        dry_run: bool = False,
        quarantine: bool = False,
        state_lost: bool = False,
    ) -> GcResult:
        """Remove what nothing keeps; with *goals*, evict trees until they are met.

        Raises StoreStateError, having deleted nothing, where a root cannot be believed or ``state/`` was lost;
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
        evicted = self._choose(known, goals) if goals.evict else []
        if not dry_run:
            evicted = [root for root in evicted if self._evict(root)]
            trash.empty(self.store.layout, older_than_s=0.0 if goals.evict else TRASH_S)
            self._forget_dead(known)
        result.trees = [str(root.record.path(self.store.layout.root)) for root in evicted]
        gone = frozenset(root.record.tree for root in evicted)
        self._sweep(result, lockfiles=not goals.evict, without=gone if dry_run else frozenset())
        self._sweep_partials(result)
        if quarantine:
            result.reclaimed_bytes += self._empty_quarantine(dry_run=dry_run)
        self._compare(result, goals)
        return result

    def _compare(self, result: GcResult, goals: EvictionTargets) -> None:
        """Say how far the goals were missed: what is pinned or used stays, and what is not ours too."""
        if goals.max_size is not None:
            result.over_bytes = max(0, result.kept_bytes - goals.max_size)
        if goals.free is not None:
            free = self.free() + (result.reclaimed_bytes if result.dry_run else 0)
            result.lacking_bytes = max(0, goals.free - free)

    def _refuse_unreliable_locks(self) -> None:
        """Without honest locks a sweep could take what another process is about to link."""
        if self.exclusive:
            return
        with self.store.lock("lock-probe", doing="checking the locks", token=self.token):
            if locks.is_held(self.store.layout.locks / "lock-probe"):
                return
        raise StoreStateError(
            f"two holders can have one lock on the file system of {self.store.layout.root}, so nothing was deleted",
            hint="run gc with --exclusive while nobody else uses this store",
        )

    # ---- blobs

    def _sweep(self, result: GcResult, *, lockfiles: bool, without: frozenset[str]) -> None:
        ours = _inodes_below(self.store.layout.trash)  # links that go too, and so do not keep a blob's bytes
        for tree_ in without:
            ours += _inodes_below(self.store.layout.root / tree_)
        seen: object = None
        live: frozenset[Digest] = frozenset()
        queue: list[tuple[Digest, os.DirEntry[str]]] | None = None
        while queue is None or queue:
            with (
                leases.exclusive_store_lock(self.store, doing="collecting garbage", token=self.token)
                if not result.dry_run
                else nullcontext()
            ):
                # Roots are marked anew in each batch if any came or went: between two batches others may work.
                if (now := roots.stamp(self.store)) != seen:
                    live, seen = roots.read(self.store).live(self.store, lockfiles=lockfiles, without=without), now
                if queue is None:
                    queue = self._split(result, live)
                batch = [(digest, entry) for digest, entry in queue[:_BATCH] if digest not in live]
                queue = queue[_BATCH:]
                for digest, entry in batch:
                    with suppress(FileNotFoundError):
                        there = os.stat(entry.path, follow_symlinks=False)
                        elsewhere = there.st_nlink - 1 - ours[there.st_ino]
                        result.reclaimed_bytes += there.st_size if elsewhere <= 0 else 0
                        result.blobs.append(digest)
                if not result.dry_run:
                    sweep.sweep(self.store, [digest for digest, _ in batch])
                    if not queue:
                        for path in sweep.orphan_tables(self.store):
                            with suppress(FileNotFoundError):
                                os.unlink(path)

    def _split(self, result: GcResult, live: frozenset[Digest]) -> list[tuple[Digest, os.DirEntry[str]]]:
        dead = []
        for digest, entry in self.store.blobs.entries():
            if digest in live:
                result.kept_blobs += 1
                with suppress(FileNotFoundError):
                    result.kept_bytes += os.stat(entry.path, follow_symlinks=False).st_size
            else:
                dead.append((digest, entry))
        return sorted(dead, key=lambda row: row[0])

    def _sweep_partials(self, result: GcResult) -> None:
        known = roots.read(self.store)
        leased = {digest for record in known.leased for digest in record.digests}
        for digest in sweep.stale_partials(self.store, known.named_by_lockfiles() | leased):
            try:
                remove = sweep.partial_bytes if result.dry_run else sweep.remove_partial
                result.reclaimed_bytes += remove(self.store, digest)
                result.partials.append(digest)
            except LockTimeoutError:
                continue  # it came to life
        if not result.dry_run:
            self._remove_incoming()

    def _remove_incoming(self) -> None:
        """Files that `lock` was naming when it was killed a day ago, and what it remembers of those that it named."""
        at = self.store.layout
        for paths, kept_s in (
            (at.partials.glob("incoming-*"), _INCOMING_S),
            (_content(at.state_dir(HASH_CACHE)), _RECALLED_S),
        ):
            for path in paths:
                with suppress(FileNotFoundError):
                    if self.clock() - path.stat().st_mtime > kept_s and not locks.is_held(path):
                        path.unlink()

    # ---- roots

    def _forget_dead(self, known: Roots) -> None:
        for root in known.locks:
            if root.state is RootState.DEAD:
                roots.forget(self.store, root.id)
        for tree_root in known.trees:
            if tree_root.is_dead:
                self._forget_tree(tree_root)
        leases.active(self.store, remove_expired=True)
        for path in _content(self.store.layout.state_dir(VERIFYING)):
            with suppress(OSError, ValueError):
                holder = Holder.parse(json.loads(path.read_bytes()))
                if holder is None or not holder.alive:
                    path.unlink()

    def _forget_tree(self, known: TreeRoot) -> None:
        """Under its lock and looked at again: it may have come back since."""
        with suppress(FileNotFoundError, LockTimeoutError):
            with self.store.lock(f"tree-{known.record.id}", doing="forgetting a tree that is gone", timeout_s=0):
                if roots.read_tree(self.store, known.file).is_dead:
                    known.file.unlink()

    def _empty_quarantine(self, *, dry_run: bool) -> int:
        freed = 0
        for path in sorted(self.store.layout.quarantine.iterdir()):
            for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
                found = os.lstat(file)
                freed += found.st_size if found.st_nlink == 1 and not file.is_dir() else 0
            if not dry_run:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return freed

    # ---- eviction

    def _evict(self, root: TreeRoot) -> bool:
        return self.remove_tree(root.record, root.key, unless=lambda: self._is_used(root))

    def _choose(self, known: Roots, goals: EvictionTargets) -> list[TreeRoot]:
        """The trees to evict, least recently used first."""
        paper = EvictionSimulation(self.store, known)
        pinned = known.pinned()
        candidates = [root for root in known.trees if self._may_go(root, pinned)]
        candidates.sort(key=lambda root: (root.used_at, root.record.tree))
        now = self.clock()
        old = [r for r in candidates if goals.max_age_s is not None and now - r.used_at > goals.max_age_s]
        chosen: list[TreeRoot] = []
        for root in old:
            if not self._is_used(root):
                chosen.append(root)
                paper.take(root)
        free_now, total_now = self.free(), paper.everything

        def met() -> bool:
            fits = goals.max_size is None or paper.kept <= goals.max_size
            return fits and (goals.free is None or free_now + total_now - paper.kept >= goals.free)

        extra: list[TreeRoot] = []
        for root in candidates:
            if met():
                break
            if root not in chosen and not self._is_used(root):
                extra.append(root)
                paper.take(root)
        for root in reversed(list(extra)):
            paper.give_back(root)
            if met():
                extra.remove(root)
            else:
                paper.take(root)
        return sorted(chosen + extra, key=lambda root: (root.used_at, root.record.tree))

    def _may_go(self, root: TreeRoot, pinned: frozenset[str]) -> bool:
        return root.state is RootState.ALIVE and not root.unfinished and root.name not in pinned

    def _is_used(self, root: TreeRoot) -> bool:
        """Whether a lease covers the tree or somebody has one of its files open."""
        digests = _digests(root) - {EMPTY}
        for _, record, held in leases.active(self.store):
            if held and digests <= record.digests:
                return True
        path = root.record.path(self.store.layout.root)
        # Through a symlink it is the blob that somebody has open.
        return any(self.in_use(os.path.realpath(path / name)) for name in root.record.files)


class EvictionSimulation:
    """Which blobs stay while trees are taken away on paper."""

    def __init__(self, store: BlobStore, known: Roots) -> None:
        self._sizes: dict[Digest, int] = {}
        for digest, entry in store.blobs.entries():
            with suppress(FileNotFoundError):
                self._sizes[digest] = entry.stat(follow_symlinks=False).st_size
        self.everything = sum(self._sizes.values())
        all_trees = frozenset(root.record.tree for root in known.trees)
        fixed = known.live(store, lockfiles=False, without=all_trees)
        self._holders: Counter[Digest] = Counter(fixed)
        for root in known.trees:
            if not root.is_dead:
                self._holders.update(_digests(root))
        self.kept = sum(size for digest, size in self._sizes.items() if self._holders[digest] > 0)

    def take(self, root: TreeRoot) -> None:
        for digest in _digests(root):
            self._holders[digest] -= 1
            self.kept -= self._sizes.get(digest, 0) if self._holders[digest] == 0 else 0

    def give_back(self, root: TreeRoot) -> None:
        for digest in _digests(root):
            self.kept += self._sizes.get(digest, 0) if self._holders[digest] == 0 else 0
            self._holders[digest] += 1


def _content(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _digests(root: TreeRoot) -> set[Digest]:
    return {placed.digest for placed in root.record.files.values()}


def _inodes_below(folder: Path) -> Counter[int]:
    found = tree.scan(folder)
    return Counter(found.files.values()) if found else Counter()
