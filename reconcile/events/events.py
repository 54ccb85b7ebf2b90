"""Events: what happens while a plan is applied, as typed values. Only the command line prints them.

Sizes and counts are bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from modelstow.cas import Digest, LinkKind


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchesPlanned:
    """The number and size of the blobs to fetch, known before the first starts; ``held`` of the ``bytes`` are on disk."""

    blobs: int
    bytes: int
    held: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchStarted:
    """The fetch of a blob started; ``held`` bytes are on disk from an earlier run."""

    digest: Digest
    size: int
    held: int
    name: str  # for people: one of its paths, with the tree where there are several


@dataclass(frozen=True, slots=True, kw_only=True)
class BytesArrived:
    """``count`` more bytes of a blob came from a source."""

    digest: Digest
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobFetched:
    """A fetched blob was verified and committed."""

    digest: Digest
    size: int
    fetched_bytes: int  # from sources in this run, those fetched twice included
    resumed_bytes: int  # on disk from an earlier run
    repaired_pieces: tuple[int, ...] = ()  # indexes of the pieces that were damaged, in a repair
    repair: bool = False  # it replaces a damaged blob


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobFailed:
    """The fetch of a blob failed at every source."""

    digest: Digest
    fetched_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobReused:
    """A blob was not fetched: a local file was verified to be it, or another process committed it meanwhile."""

    digest: Digest
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobsReused:
    """The blobs that were present before, intact by stat."""

    blobs: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFailed:
    """A request to a source failed; other sources are tried."""

    locator: str  # without secrets
    what: str
    corrupt: bool = False  # it sent corrupt data


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """This run waits for another process."""

    for_whom: str  # the holder of the lock


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesLinked:
    """Paths of one tree hold their blobs now: how many, by kind."""

    tree: str  # name@version#variant, of each of its variants
    kinds: Mapping[LinkKind, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TreePublished:
    """The tree of a variant is in its desired state."""

    model: str
    variant: str
    path: Path
    exchanged: bool  # the whole folder in one step; otherwise file by file


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeRemoved:
    """The tree of a variant was removed."""

    model: str
    variant: str
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Displaced:
    """A file that was in the way of a locked one was moved to quarantine."""

    path: Path
    to: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """A file that the lockfile does not name was removed from a tree, on request (``--prune``)."""

    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskBegan:
    """A long task other than the fetch of a blob began, or began again after a source failed in the middle of it."""

    what: str  # identifies it among the tasks that run at the same time
    bytes: int | None  # None where the size is unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskAdvanced:
    """``count`` more bytes of a task are done."""

    what: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEnded:
    """A task ended, successfully or not."""

    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Info:
    """A message for the user."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Warning:
    """A message about something that is probably not as the user wants it; the run continues."""

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
"""A consumer of events. A listener of a bus is one; it is called from any thread, one call at a time."""
