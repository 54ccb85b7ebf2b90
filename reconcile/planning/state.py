"""Desired and actual state as values, and the states that ``status`` reports."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from modelstow.cas import ABSENT, EMPTY, BlobState, BlobStatus, Digest, Entry
from modelstow.cas.entries import Other
from modelstow.cas.inventory import Inventory

from ..desired import validation
from ..desired.lockfile import LockedBlob
from ..desired.selectors import VariantId, labels_by_variant
from ..errors import Problem


class ModelState(enum.StrEnum):
    """The state of a variant, by stat and by the findings that are on record. The first that fits, in this order:

    NOT_PRESENT no tree · VERIFYING a live process verifies it · CORRUPT a file or its blob is not what the lockfile says ·
    PARTIAL a plan would do something · COMPLETE its plan is empty.
    """

    NOT_PRESENT = "NOT_PRESENT"
    PARTIAL = "PARTIAL"
    VERIFYING = "VERIFYING"
    COMPLETE = "COMPLETE"
    CORRUPT = "CORRUPT"


@dataclass(frozen=True, slots=True, order=True)
class TreeKey:
    """The identity of a tree: the variants whose files it holds (nearly always one), and its path.

    Each of its variants keeps it: a tree is unwanted when none of them is wanted, and pinned when one is.
    """

    variants: tuple[VariantId, ...]  # at least one, sorted
    tree: str  # path, relative to the store, absolute for outside trees

    @classmethod
    def of(cls, record: Inventory) -> TreeKey:
        """The key of a tree on record."""
        return cls(tuple(sorted(labels_by_variant(record.labels))), record.tree)

    def __str__(self) -> str:
        return ", ".join(map(str, self.variants))


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredTree:
    """The desired state of one tree. ``labels`` are kept in its inventory.

    Raises ValueError where *others* have paths that cannot be in one tree with the rest, as below a symlink.
    """

    key: TreeKey
    path: Path
    files: Mapping[str, Digest]  # blobs by path within the tree
    others: Mapping[str, Other] = field(default_factory=dict)  # what is no blob, by path
    labels: Mapping[str, str] = field(default_factory=dict)
    keeps_extra: bool = False  # the user's own files stay, also where others are pruned
    other_disk: bool = False  # it is on another file system than the store, so that its files are copies

    def __post_init__(self) -> None:
        if self.others:
            problems: list[Problem] = []
            validation.check_paths(str(self.path), [*self.files, *self.others], problems)
            if problems:
                raise ValueError("; ".join(map(str, problems)))

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Blobs and others by path; the mapping of files itself where there are no others."""
        return {**self.files, **self.others} if self.others else self.files


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """The desired state: trees and blobs."""

    trees: tuple[DesiredTree, ...]
    blobs: Mapping[Digest, LockedBlob]
    mirrors: tuple[str, ...] = ()  # tried for each blob before its own locators
    removals: tuple[TreeKey, ...] = ()  # whole trees to remove
    needs_copies: bool = False  # the files of trees will not share the bytes of blobs
    prune: bool = False  # remove files that the lockfile does not name, too
    force_refetch: frozenset[Digest] = frozenset()  # fetched even if they are present
    extra_blobs: frozenset[Digest] = frozenset()  # desired although no tree has them

    @property
    def digests(self) -> frozenset[Digest]:
        """Every blob that is desired."""
        return frozenset[Digest]().union(*(tree.files.values() for tree in self.trees)) - {EMPTY} | self.extra_blobs

    def size(self, digest: Digest) -> int:
        """The size of a blob in bytes."""
        return self.blobs[digest].size


@dataclass(frozen=True, slots=True)
class Foreign:
    """A file at a locked path that a stat cannot identify as the one that was linked there."""

    size: int | None  # bytes; None for what is no regular file
    modified: bool = False  # a file was linked there, and this is another

    def could_match(self, size: int) -> bool:
        """Whether its content could still be right, which only reading can show."""
        return self.size == size and not self.modified


@dataclass(frozen=True, slots=True, kw_only=True)
class ActualTree:
    """The observed state of one tree. A locked path that is neither placed nor foreign is missing."""

    exists: bool = False
    recorded: bool = False  # there is an inventory
    labels: Mapping[str, str] = field(default_factory=dict)
    leftover: str = ""  # the staging folder of an interrupted change
    placed: Mapping[str, Entry] = field(default_factory=dict)  # by path; blobs by stat, others by content
    foreign: Mapping[str, Foreign] = field(default_factory=dict)
    extra: tuple[str, ...] = ()  # paths of the user's own files
    own: tuple[str, ...] = ()  # placed paths that are not their blob's inode: copies, symlinks, empty files, …
    verifying: bool = False  # a live process verifies it


NO_TREE = ActualTree()


@dataclass(frozen=True, slots=True, kw_only=True)
class Actual:
    """The actual state, observed once."""

    blobs: Mapping[Digest, BlobStatus] = field(default_factory=dict)
    partials: Mapping[Digest, int] = field(default_factory=dict)  # bytes in finished pieces
    trees: Mapping[TreeKey, ActualTree] = field(default_factory=dict)
    free_bytes: int = 0

    def blob(self, entry: Entry) -> BlobState:
        """The state of an entry's blob; what needs none is always intact."""
        if entry == EMPTY or not isinstance(entry, Digest):
            return BlobState.INTACT
        return self.blobs.get(entry, ABSENT).state


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantStatus:
    """The status of one variant, which is that of its tree. Lists are paths within the tree and disjoint."""

    model: str
    variant: str
    state: ModelState
    local_path: Path
    missing_files: tuple[str, ...] = ()
    corrupt_files: tuple[str, ...] = ()
    extra_files: tuple[str, ...] = ()
    bytes_needed: int = 0  # to be fetched; a suspect blob counts whole
