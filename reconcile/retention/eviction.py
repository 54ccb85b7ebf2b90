"""Eviction: the choice of least recently used trees to remove, simulated on sets of digests before anything is deleted.

Trees are added to the choice until the targets are met (a shared blob frees nothing), then put back, newest first, where
the targets are met without them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from modelstow.cas import BlobStore, Digest
from modelstow.cas.inventory import Inventory

from ..desired.selectors import VariantId
from .roots import Roots, RootState, TreeRoot


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionTargets:
    """The targets of an eviction; None: no such target."""

    max_size: int | None = None  # bytes of blobs to keep at most
    free: int | None = None  # bytes that should be free on the disk
    max_age_s: float | None = None  # seconds without use after which a tree is evicted

    @property
    def evict(self) -> bool:
        """Whether there is any target."""
        return any(target is not None for target in (self.max_size, self.free, self.max_age_s))

    def are_met(self, *, kept: int, free: int) -> bool:
        """Whether *kept* bytes of blobs and *free* bytes on the disk fit ``max_size`` and ``free``."""
        return (self.max_size is None or kept <= self.max_size) and (self.free is None or free >= self.free)


class EvictionSimulation:
    """Dry-run accounting: the bytes of blobs that stay while trees are taken away and put back.

    *fixed* are the digests that stay whatever trees are removed: those of pins, leases and files without a record.
    """

    def __init__(self, sizes: Mapping[Digest, int], fixed: Iterable[Digest], trees: Iterable[TreeRoot]) -> None:
        self._sizes = sizes
        self._users: Counter[Digest] = Counter(fixed)
        for root in trees:
            if not root.is_dead:
                self._users.update(root.digests)
        self.total = sum(sizes.values())  # bytes of all blobs
        self.kept = sum(size for digest, size in sizes.items() if self._users[digest] > 0)

    def remove(self, root: TreeRoot) -> None:
        """Take a tree away: the blobs that only it used are no longer kept."""
        for digest in root.digests:
            self._users[digest] -= 1
            self.kept -= self._sizes.get(digest, 0) if self._users[digest] == 0 else 0

    def restore(self, root: TreeRoot) -> None:
        """Put a removed tree back."""
        for digest in root.digests:
            self.kept += self._sizes.get(digest, 0) if self._users[digest] == 0 else 0
            self._users[digest] += 1


def simulation_of(store: BlobStore, known: Roots) -> EvictionSimulation:
    """The simulation over a store's blobs and roots; a lockfile alone keeps nothing in it."""
    fixed = known.live(store, lockfiles=False, without=frozenset(root.record.tree for root in known.trees))
    return EvictionSimulation(blob_sizes(store), fixed, known.trees)


def choose(
    known: Roots,
    targets: EvictionTargets,
    simulation: EvictionSimulation,
    *,
    free: int,
    now: float,
    is_used: Callable[[TreeRoot], bool],
    may_change: Callable[[Inventory], bool] = lambda record: True,
) -> list[TreeRoot]:
    """The trees to evict, least recently used first; pinned, unfinished and used trees are passed over.

    *free* is the number of bytes free on the disk, and *now* the seconds since 1970. *is_used* is called last, since it
    may be slow. *simulation* is left in the state after the eviction.
    """
    pinned = known.pinned()
    candidates = [root for root in known.trees if _is_evictable(root, pinned) and may_change(root.record)]
    candidates.sort(key=_age_order)
    expired = [r for r in candidates if targets.max_age_s is not None and now - r.used_at > targets.max_age_s]
    expired = [root for root in expired if not is_used(root)]
    for root in expired:
        simulation.remove(root)

    def met() -> bool:
        return targets.are_met(kept=simulation.kept, free=free + simulation.total - simulation.kept)

    extra: list[TreeRoot] = []
    for root in candidates:
        if met():
            break
        if root not in expired and not is_used(root):
            extra.append(root)
            simulation.remove(root)
    for root in reversed(list(extra)):
        simulation.restore(root)
        if met():
            extra.remove(root)
        else:
            simulation.remove(root)
    return sorted(expired + extra, key=_age_order)


def blob_sizes(store: BlobStore) -> dict[Digest, int]:
    """The size in bytes of every blob, by stat; a blob that is removed meanwhile is left out."""
    sizes = {}
    for digest, entry in store.blobs.entries():
        with suppress(FileNotFoundError):
            sizes[digest] = entry.stat(follow_symlinks=False).st_size
    return sizes


def _age_order(root: TreeRoot) -> tuple[float, str]:
    return root.used_at, root.record.tree


def _is_evictable(root: TreeRoot, pinned: frozenset[VariantId]) -> bool:
    return root.state is RootState.ALIVE and not root.unfinished and pinned.isdisjoint(root.key.variants)
