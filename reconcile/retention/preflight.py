"""The space check before the first byte: a plan's needs against free space, other processes' reservations and limits."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from modelstow.cas import BlobState, BlobStore, Digest, NoSpaceError, StoreStateError, leases

from ..events.events import Info, Sink, Warning
from ..planning.observer import nearest_folder
from ..planning.planner import Fetch, Plan
from .collector import Collector
from .eviction import EvictionTargets, blob_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """The space check of one store. ``min_free`` and ``max_size`` are bytes; None: no limit."""

    store: BlobStore
    collector: Collector
    free: Callable[[], int]  # bytes free on the store's disk
    emit: Sink
    min_free: int = 0
    max_size: int | None = None

    def make_room(self, plan: Plan) -> None:
        """Return once the plan fits, after sweeping garbage if it does not, and evicting trees where a limit is set.

        The caller holds the ``space`` lock since before its lease reserved what is to be fetched.

        Raises NoSpaceError with the figures, before anything was fetched; what the collector raises.
        """
        if not any(isinstance(action, Fetch) for action in plan.actions) and plan.summary.disk_bytes == 0:
            return
        self._check_other_disks(plan)
        if self._fits(plan):
            return
        try:
            self.collector.collect()
        except StoreStateError as error:
            self.emit(Warning(text=str(error)))
            self._refuse(plan)
        if self._fits(plan):
            return
        if self.min_free or self.max_size is not None:
            self._evict(plan)
            if self._fits(plan):
                return
        self._refuse(plan)

    def _evict(self, plan: Plan) -> None:
        """Evict trees, but only if that makes enough room: a plan that cannot fit costs no tree."""
        limit = None if self.max_size is None else self.max_size - _in_store(plan)
        if limit is not None and limit < 0:
            return
        goals = EvictionTargets(free=self._needed(plan), max_size=limit)
        simulated = self.collector.collect(goals, dry_run=True)
        if simulated.over_bytes or simulated.lacking_bytes:
            return
        for path, freed in self.collector.collect(goals).evicted:
            self.emit(Info(text=f"evicted {path} to make room: {freed:,} bytes"))

    def _fits(self, plan: Plan) -> bool:
        return self._needed(plan) <= self.free() and self._over_quota(plan) <= 0

    def _needed(self, plan: Plan) -> int:
        """Bytes that must be free: new on disk, reserved by other processes, and the margin."""
        mine = {action.digest for action in plan.actions if isinstance(action, Fetch)}
        unsaved = sum(
            action.have - self._allocated(action.digest, action.have)
            for action in plan.actions
            if isinstance(action, Fetch) and action.have
        )
        return _in_store(plan) + unsaved + self._reserved(mine) + self.min_free

    def _reserved(self, mine: set[Digest]) -> int:
        """Bytes that other live fetches will still write: sizes less what their partials have. A crash releases them."""
        others: dict[Digest, int] = {}
        with suppress(StoreStateError):  # a lease that cannot be read stops gc, but no fetch
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
        """Check the disks of outside trees, where files are copies: no sweep of this store makes room there."""
        by_device: dict[int, list[Path]] = {}
        for tree in plan.summary.elsewhere:
            by_device.setdefault(os.stat(nearest_folder(tree)).st_dev, []).append(tree)
        for trees in by_device.values():
            needed = sum(plan.summary.elsewhere[tree] for tree in trees)
            free = shutil.disk_usage(nearest_folder(trees[0])).free
            if needed > free:
                raise NoSpaceError(
                    f"{needed:,} bytes of copies are needed in {trees[0]}, {free:,} are free there",
                    hint="copies are needed because the store is on another disk; choose a --root on the same disk",
                    bytes_needed=needed,
                    bytes_available=free,
                    path=str(trees[0]),
                )

    def _refuse(self, plan: Plan) -> NoReturn:
        new = _in_store(plan)
        needed, free, over = self._needed(plan), self.free(), self._over_quota(plan)
        root = self.store.layout.root
        if over > 0:
            what = f"{new:,} more bytes would exceed the limit of {self.max_size:,} by {over:,}"
            hint = "raise MODELSTOW_MAX_SIZE, unpin a variant, or free space with `modelstow gc --max-size`"
            available = max(0, new - over)
            raise NoSpaceError(what, hint=hint, bytes_needed=new, bytes_available=available, path=str(root))
        raise NoSpaceError(
            f"{needed:,} bytes are needed in {root}, {free:,} are free",
            hint=f"`modelstow gc --free {needed}` evicts the least recently used trees, or choose another --root",
            bytes_needed=needed,
            bytes_available=free,
            path=str(root),
        )


def _in_store(plan: Plan) -> int:
    """Bytes that are new on the store's disk."""
    return plan.summary.disk_bytes - sum(plan.summary.elsewhere.values())
