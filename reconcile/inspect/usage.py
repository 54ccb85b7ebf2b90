"""Disk usage of a store, by tree and in total, from stats alone. All figures are bytes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from modelstow.cas import BlobStore, Digest, tree
from modelstow.cas.links import LinkKind

from ..desired.selectors import VariantId
from ..retention import roots
from ..retention.eviction import blob_sizes
from ..retention.roots import Roots, RootState, TreeRoot


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeUsage:
    """Disk usage of one tree, in bytes.

    ``logical`` counts every path. ``unique`` is what only this tree uses, its copies included; ``shared`` is what
    another tree uses too. A blob that several paths of the tree use is in one of the two once.
    """

    variants: tuple[VariantId, ...]  # one, but for a tree of several
    path: Path
    logical: int
    shared: int
    unique: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Disk usage of a whole store, in bytes.

    ``physical`` is what it takes on disk: blobs, copies in trees, partials, trash and quarantine. ``reclaimable`` is the
    size of the blobs that no root keeps; ``quarantine`` is what only `gc --quarantine` would free.
    """

    logical: int = 0
    physical: int = 0
    reclaimable: int = 0
    quarantine: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskUsage:
    """Disk usage by tree (ordered by variants and path) and in total; the default is that of no store."""

    trees: tuple[TreeUsage, ...] = ()
    totals: Totals = Totals()


def disk_usage(store: BlobStore, *, only: Collection[VariantId] | None = None) -> DiskUsage:
    """The usage of a store; *only* limits the trees, but not the totals, to those of some variants.

    Reads records and stats, no content. Raises StoreStateError where a root cannot be read, OSError.
    """
    known = roots.read(store)
    trees = [root for root in known.trees if not root.unfinished and root.state is not RootState.DEAD]
    users = Counter(digest for root in trees for digest in root.digests)
    sizes = blob_sizes(store)
    shown = [root for root in trees if only is None or not set(only).isdisjoint(root.key.variants)]
    rows = [_tree_usage(root, users, sizes, store.layout.root) for root in shown]
    rows.sort(key=lambda row: (row.variants, str(row.path)))
    return DiskUsage(trees=tuple(rows), totals=_totals(store, known, trees, sizes))


def _tree_usage(root: TreeRoot, users: Mapping[Digest, int], sizes: Mapping[Digest, int], store_root: Path) -> TreeUsage:
    logical = shared = unique = 0
    counted: set[Digest] = set()
    for placed in root.record.files.values():
        bytes_ = sizes.get(placed.digest, 0)
        logical += bytes_
        if placed.kind is LinkKind.COPY:
            unique += bytes_
        elif placed.digest not in counted:
            counted.add(placed.digest)
            if users[placed.digest] > 1:
                shared += bytes_
            else:
                unique += bytes_
    return TreeUsage(
        variants=root.key.variants,
        path=root.record.path(store_root),
        logical=logical,
        shared=shared,
        unique=unique,
    )


def _totals(store: BlobStore, known: Roots, trees: Iterable[TreeRoot], sizes: Mapping[Digest, int]) -> Totals:
    placed = [placed for root in trees for placed in root.record.files.values()]
    copies = sum(sizes.get(p.digest, 0) for p in placed if p.kind is LinkKind.COPY)
    live, layout = known.live(store), store.layout
    quarantine, partials, trash = _outside_blobs(store, (layout.quarantine, layout.partials, layout.trash))
    return Totals(
        logical=sum(sizes.get(p.digest, 0) for p in placed),
        physical=sum(sizes.values()) + copies + partials + trash + quarantine,
        reclaimable=sum(bytes_ for digest, bytes_ in sizes.items() if digest not in live),
        quarantine=quarantine,
    )


def _outside_blobs(store: BlobStore, folders: Iterable[Path]) -> list[int]:
    """Of each folder, the bytes on disk that no blob and no folder before it shares."""
    seen, sums = {entry.inode() for _, entry in store.blobs.entries()}, []
    for folder in folders:
        sizes = {}
        for path, ino in (tree.scan(folder) or tree.Scan()).files.items():
            with suppress(FileNotFoundError):
                if ino not in seen:
                    found = os.lstat(folder / path)
                    sizes[ino] = min(found.st_size, found.st_blocks * 512)  # a partial is sparse
        seen |= sizes.keys()
        sums.append(sum(sizes.values()))
    return sums
