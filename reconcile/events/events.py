"""What happens while a plan is applied, as typed events. The core emits and never prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from modelstow.cas import Digest, LinkKind


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchesPlanned:
    """What has to be fetched, as far as could be seen before it began; ``held`` of the ``bytes`` are there already."""

    blobs: int
    bytes: int
    held: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchStarted:
    """A blob is being fetched. ``held`` bytes were there from an earlier run."""

    digest: Digest
    size: int
    held: int
    name: str  # a path that needs it and, where there are several trees, one of those; for people


@dataclass(frozen=True, slots=True, kw_only=True)
class BytesArrived:
    """So many bytes of a blob came from a source."""

    digest: Digest
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobFetched:
    """A blob was proven and committed."""

    digest: Digest
    size: int
    fetched_bytes: int  # came from sources in this run, refetches included
    resumed_bytes: int  # were there from an earlier run
    repaired_pieces: tuple[int, ...] = ()  # the pieces that were damaged, where a damaged blob was mended
    repair: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobFailed:
    """A blob could not be had."""

    digest: Digest
    fetched_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobReused:
    """A blob was proven by reading what stands on this disk, or somebody else brought it meanwhile."""

    digest: Digest
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobsReused:
    """Blobs that were there already, intact by stat."""

    blobs: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFailed:
    """A source did not give what was asked; others are asked."""

    locator: str  # without secrets
    what: str
    corrupt: bool = False  # it gave other bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Somebody else's work is waited for."""

    for_whom: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesLinked:
    """Paths of one tree hold their blobs now: how many, by kind."""

    tree: str  # name@version#variant
    kinds: Mapping[LinkKind, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TreePublished:
    """A tree stands as wanted."""

    model: str
    variant: str
    path: Path
    exchanged: bool  # in one step; otherwise file by file


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeRemoved:
    """A tree is gone."""

    model: str
    variant: str
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Displaced:
    """Something stood where the lockfile wants its own; where it is now."""

    path: Path
    to: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """A file of the user's was removed from a tree, because that was asked."""

    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskBegan:
    """Something that takes long and is no fetch began; or began anew, where a source failed in the middle of it."""

    what: str  # its name too, among those that go on at the same time
    bytes: int | None  # None where nobody knows


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskAdvanced:
    """So many bytes of it are done."""

    what: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEnded:
    """It is over, well or not."""

    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Info:
    """Something people should know."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Warning:
    """Something is probably not as people want it; the work goes on."""

    text: str


Event = (
    FetchesPlanned
    | FetchStarted
    | BytesArrived
    | BlobFetched
    | BlobFailed
    | BlobReused
    | BlobsReused
    | SourceFailed
    | Waiting
    | FilesLinked
    | TreePublished
    | TreeRemoved
    | Displaced
    | Pruned
    | TaskBegan
    | TaskAdvanced
    | TaskEnded
    | Info
    | Warning
)
Sink = Callable[[Event], None]
"""Takes events from any thread, one call at a time."""
