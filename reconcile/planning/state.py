"""Desired and actual as values, and the states that people see."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from modelstow.cas import ABSENT, EMPTY, BlobState, BlobStatus, Digest
from modelstow.cas.inventory import Inventory

from ..desired.lockfile import LockedBlob


class ModelState(enum.StrEnum):
    """How a variant stands, by stat and by what the last verification left on record."""

    NOT_PRESENT = "NOT_PRESENT"
    PARTIAL = "PARTIAL"
    VERIFYING = "VERIFYING"
    COMPLETE = "COMPLETE"
    CORRUPT = "CORRUPT"


@dataclass(frozen=True, slots=True, order=True)
class TreeKey:
    """Which tree: a variant of a model, and where it stands (relative to the store, absolute for outside trees)."""

    model: str  # name@version
    variant: str
    tree: str

    @classmethod
    def of(cls, record: Inventory) -> TreeKey:
        """That of a tree on record."""
        return cls(record.labels.get("model", ""), record.labels.get("variant", ""), record.tree)

    def __str__(self) -> str:
        return f"{self.model}#{self.variant}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredTree:
    """One tree as wanted. ``labels`` are kept in its inventory."""

    key: TreeKey
    path: Path
    files: Mapping[str, Digest]
    labels: Mapping[str, str] = field(default_factory=dict)
    other_disk: bool = False  # it stands on another file system than the store, so that its files are copies


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """All that is wanted at once. ``copies``: files of trees will not share the blobs' bytes.

    Blobs in ``anew`` are fetched even if they are there; those in ``alone`` are wanted whether a tree holds them or not.
    """

    trees: tuple[DesiredTree, ...]
    blobs: Mapping[Digest, LockedBlob]
    mirrors: tuple[str, ...] = ()  # asked for each blob before its own locators
    removals: tuple[TreeKey, ...] = ()  # whole trees that are no longer wanted
    needs_copies: bool = False
    prune: bool = False
    force_refetch: frozenset[Digest] = frozenset()
    extra_blobs: frozenset[Digest] = frozenset()

    @property
    def digests(self) -> frozenset[Digest]:
        """Every blob that is wanted."""
        return frozenset(digest for tree in self.trees for digest in tree.files.values()) - {EMPTY} | self.extra_blobs

    def size(self, digest: Digest) -> int:
        """Bytes in a blob."""
        return self.blobs[digest].size


@dataclass(frozen=True, slots=True)
class Foreign:
    """Something at a locked path that a stat cannot tell to be what was placed.

    ``size`` is None for what is no regular file. ``altered``: we placed a file there and it is another now.
    """

    size: int | None
    modified: bool = False

    def could_match(self, size: int) -> bool:
        """Whether its content could still be right; only reading tells."""
        return self.size == size and not self.modified


@dataclass(frozen=True, slots=True, kw_only=True)
class ActualTree:
    """One tree as one look saw it. What is neither placed nor foreign is missing."""

    exists: bool = False
    recorded: bool = False  # there is an inventory
    labels: Mapping[str, str] = field(default_factory=dict)
    leftover: str = ""  # the staging folder of a change that did not end
    placed: Mapping[str, Digest] = field(default_factory=dict)  # path -> what it is, believed by stat
    foreign: Mapping[str, Foreign] = field(default_factory=dict)
    extra: tuple[str, ...] = ()  # the user's
    own: tuple[str, ...] = ()  # placed files that are not their blob's inode: copies, symlinks, empty ones
    verifying: bool = False


NO_TREE = ActualTree()


@dataclass(frozen=True, slots=True, kw_only=True)
class Actual:
    """What was seen, once."""

    blobs: Mapping[Digest, BlobStatus] = field(default_factory=dict)
    partials: Mapping[Digest, int] = field(default_factory=dict)  # bytes on record
    trees: Mapping[TreeKey, ActualTree] = field(default_factory=dict)
    free_bytes: int = 0

    def blob(self, digest: Digest) -> BlobState:
        """How a blob stands; the empty one is always there."""
        return BlobState.INTACT if digest == EMPTY else self.blobs.get(digest, ABSENT).state


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantStatus:
    """What ``status`` tells of one variant. Lists are paths within the tree and disjoint."""

    model: str
    variant: str
    state: ModelState
    local_path: Path
    missing_files: tuple[str, ...] = ()
    corrupt_files: tuple[str, ...] = ()
    extra_files: tuple[str, ...] = ()
    bytes_needed: int = 0
