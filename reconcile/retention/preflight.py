"""Room before the first byte: what a plan takes against what is free, promised to others, or allowed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from modelstow.cas import BlobState, BlobStore, Digest, NoSpaceError, StoreStateError, leases

from ..events.events import Info, Sink
from ..planning.planner import Fetch, Plan
from .collector import Collector
from .eviction import EvictionTargets, blob_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """Checks a plan against one store's disk and limits; ``min_free`` and ``max_size`` are bytes, None: no limit."""

    store: BlobStore
    collector: Collector
    free: Callable[[], int]
    emit: Sink
    min_free: int = 0
    max_size: int | None = None

    def make_room(self, plan: Plan) -> None:
        """Return when the plan fits; hold the ``space`` lock since before the plan's lease was taken.

        It sweeps garbage once if it does not, and evicts trees where a limit is set.

        Raises NoSpaceError with the figures before anything was fetched; what the collector raises.
        """
        if not any(isinstance(action, Fetch) for action in plan.actions) and plan.summary.disk_bytes == 0:
            return
        self._check_other_disks(plan)
        if self._fits(plan):
            return
        self.collector.collect()
        if self._fits(plan):
            return
        if self.min_free or self.max_size is not None:
            self._evict(plan)
            if self._fits(plan):
                return
        self._refuse(plan)

    def _evict(self, plan: Plan) -> None:
        """Trees go only where that makes room enough: what cannot be had costs nobody anything."""
        limit = None if self.max_size is None else self.max_size - _in_store(plan)
        if limit is not None and limit < 0:
            return
        goals = EvictionTargets(free=self._needed(plan), max_size=limit)
        on_paper = self.collector.collect(goals, dry_run=True)
        if on_paper.over_bytes or on_paper.lacking_bytes:
            return
        for path in self.collector.collect(goals).trees:
            self.emit(Info(text=f"evicted {path} to make room"))

    def _fits(self, plan: Plan) -> bool:
        return self._needed(plan) <= self.free() and self._over_quota(plan) <= 0

    def _needed(self, plan: Plan) -> int:
        """Bytes that must be free: new on disk, promised to others that run, and the margin."""
        mine = {action.digest for action in plan.actions if isinstance(action, Fetch)}
        unsaved = sum(
            action.have - self._allocated(action.digest, action.have)
            for action in plan.actions
            if isinstance(action, Fetch) and action.have
        )
        return _in_store(plan) + unsaved + self._promised(mine) + self.min_free

    def _promised(self, mine: set[Digest]) -> int:
        """What other live fetches still will take: sizes less what their partials have; a crash releases it by itself."""
        others: dict[Digest, int] = {}
        with suppress(StoreStateError):  # a lease that cannot be read stops gc, not those who fetch
            for _, record, held in leases.active(self.store):
                if held:
                    others |= {digest: size for digest, size in record.reserved.items() if digest not in mine}
        return sum(
            size - self._allocated(digest, size)
            for digest, size in others.items()
            if self.store.blobs.stat(digest, size).state is BlobState.ABSENT
        )

    def _allocated(self, digest: Digest, most: int) -> int:
        try:
            return min(most, os.stat(self.store.layout.partial(digest)).st_blocks * 512)
        except FileNotFoundError:
            return 0

    def _over_quota(self, plan: Plan) -> int:
        if self.max_size is None:
            return 0
        return sum(blob_sizes(self.store).values()) + _in_store(plan) - self.max_size

    def _check_other_disks(self, plan: Plan) -> None:
        """Trees on another disk are copies there, and sweeping here would not help them."""
        by_device: dict[int, list[Path]] = {}
        for tree in plan.summary.elsewhere:
            by_device.setdefault(os.stat(disk(tree)).st_dev, []).append(tree)
        for trees in by_device.values():
            needed = sum(plan.summary.elsewhere[tree] for tree in trees)
            free = shutil.disk_usage(disk(trees[0])).free
            if needed > free:
                raise NoSpaceError(
                    f"{needed:,} bytes of copies are needed in {trees[0]}, {free:,} are free there",
                    hint="copies are needed because the store is on another disk; choose a --root on the same",
                    bytes_needed=needed,
                    bytes_available=free,
                    path=str(trees[0]),
                )

    def _refuse(self, plan: Plan) -> None:
        new = _in_store(plan)
        needed, free, over = self._needed(plan), self.free(), self._over_quota(plan)
        root = self.store.layout.root
        if over > 0:
            what = f"{new:,} bytes more would exceed the limit of {self.max_size:,} by {over:,}"
            hint = "raise MODELSTOW_MAX_SIZE, unpin something, or free room with `modelstow gc --max-size`"
            available = max(0, new - over)
            raise NoSpaceError(what, hint=hint, bytes_needed=new, bytes_available=available, path=str(root))
        raise NoSpaceError(
            f"{needed:,} bytes are needed in {root}, {free:,} are free",
            hint=f"`modelstow gc --free {needed}` evicts what was used least recently, or choose another --root",
            bytes_needed=needed,
            bytes_available=free,
            path=str(root),
        )


def _in_store(plan: Plan) -> int:
    return plan.summary.disk_bytes - sum(plan.summary.elsewhere.values())


def disk(path: Path) -> Path:
    """The nearest folder above *path* that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
