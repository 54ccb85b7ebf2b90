"""What all downloads of one run share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock

from modelstow.backends import Registry
from modelstow.cas import Digest

from ..events.events import Sink
from .lies import BadSources
from .retry import RetryPolicy
from .source_health import FailureTable

STOPPED = "stopped; what was fetched is kept and the next run continues there"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRequest:
    """One blob to bring home."""

    digest: Digest
    size: int
    urls: tuple[str, ...]
    # Of *urls*, those that hold it as compressed pieces, by the plain one of the same mirror.
    compressed: Mapping[str, str] = field(default_factory=dict)
    paths: tuple[str, ...] = ()  # in trees, for messages
    name: str = ""  # what progress calls it
    local_candidates: tuple[str, ...] = ()  # files on this disk that may hold its bytes
    force_refetch: bool = False  # fetch it even if it is there
    seen_commit: str = ""  # ``store.commits_seen`` when it was asked for


class Connections:
    """The connections that no blob uses just now: whoever fetches a large one may take them. Safe for threads."""

    def __init__(self, most: int) -> None:
        self.most, self._free, self._mutex = most, most, Lock()

    def take(self) -> bool:
        """Take one; False if all are in use."""
        with self._mutex:
            taken = self._free > 0
            self._free -= taken
            return taken

    @property
    def used(self) -> int:
        """How many are taken."""
        return self.most - self._free

    def give(self) -> None:
        """Give one back."""
        with self._mutex:
            self._free += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferContext:
    """Set *stop* to end all downloads soon."""

    registry: Registry
    base: Path  # what relative locators are relative to
    failures: FailureTable
    lies: BadSources
    emit: Sink
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    connections: Connections = field(default_factory=lambda: Connections(1))
    limit_rate: float | None = None  # bytes a second that all sources give together, where that is limited
    stop: Event = field(default_factory=Event)
    clock: Callable[[], float] = time.monotonic
