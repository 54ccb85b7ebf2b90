"""The fold of a run's events into its report."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from threading import Lock

from modelstow.cas import LinkKind

from .events import (
    BlobFailed,
    BlobFetched,
    BlobReused,
    BlobsReused,
    Displaced,
    Event,
    FilesLinked,
    Pruned,
    TreePublished,
    TreeRemoved,
)
from .report import Repair, Report


class Recorder:
    """A listener that folds events into a report. It may be called from many threads at once."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, clock()
        self._mutex = Lock()
        self._sums: Counter[str] = Counter()
        self._links: Counter[LinkKind] = Counter()
        self._published: list[TreePublished] = []
        self._removed: list[TreeRemoved] = []
        self._displaced: list[Displaced] = []
        self._repairs: list[Repair] = []
        self._pruned: list[Pruned] = []

    def __call__(self, event: Event) -> None:
        with self._mutex:
            self._fold(event)

    def _fold(self, event: Event) -> None:
        match event:
            case BlobFetched():
                self._sums["fetched_blobs"] += event.fetched_bytes > 0 or event.resumed_bytes > 0
                self._sums["fetched_bytes"] += event.fetched_bytes
                self._sums["resumed_bytes"] += event.resumed_bytes
                if event.repair:
                    self._sums["repaired_bytes"] += event.fetched_bytes
                    self._repairs.append(
                        Repair(digest=event.digest, pieces=event.repaired_pieces, fetched_bytes=event.fetched_bytes)
                    )
            case BlobFailed():
                self._sums["fetched_bytes"] += event.fetched_bytes
            case BlobReused():
                self._sums["reused_blobs"] += 1
                self._sums["reused_bytes"] += event.size
            case BlobsReused():
                self._sums["reused_blobs"] += event.blobs
                self._sums["reused_bytes"] += event.bytes
            case FilesLinked():
                self._sums["linked_files"] += sum(event.kinds.values())
                self._links.update(event.kinds)
            case TreePublished():
                self._published.append(event)
            case TreeRemoved():
                self._removed.append(event)
            case Displaced():
                self._displaced.append(event)
            case Pruned():
                self._pruned.append(event)
            case _:
                pass

    def report(self) -> Report:
        """The report of the events so far."""
        with self._mutex:
            return Report(
                **self._sums,
                links=dict(self._links),
                published=tuple(self._published),
                removed=tuple(self._removed),
                displaced=tuple(self._displaced),
                repairs=tuple(self._repairs),
                pruned=tuple(self._pruned),
                seconds=self._clock() - self._began,
            )
