"""One observation of the disk: inode numbers from the folders, one stat a unique blob, no content.

A tree file is believed when it is its blob's inode; a copy or reflink when the inventory says that it is one and its
inode, size and mtime are what was left there; a symlink or inline file by its content. Nothing is written and no lock is
taken.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from modelstow.cas import ABSENT, EMPTY, BlobState, BlobStatus, BlobStore, Digest, Entry, entries
from modelstow.cas.entries import Other
from modelstow.cas.inventory import Inventory, InventoryEntry, tree_id
from modelstow.cas.links import LinkKind, is_left_over
from modelstow.cas.locks import Holder
from modelstow.cas.tree import Scan, as_placed, scan
from modelstow.cas.untrusted import read_state

from ..state_dirs import VERIFYING
from .state import NO_TREE, Actual, ActualTree, Desired, DesiredTree, Foreign


def free_bytes(path: Path) -> int:
    """Bytes that may still be written below *path* (or where it will be)."""
    return shutil.disk_usage(nearest_folder(path)).free


def nearest_folder(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def observe(
    store: BlobStore,
    desired: Desired,
    *,
    free: Callable[[], int] = lambda: 0,
    known: Mapping[Digest, BlobStatus] | None = None,
) -> Actual:
    """The actual state of what *desired* names. *known*: statuses of blobs that are still true, under the same lease.

    Raises StoreStateError for an unreadable inventory, OSError.
    """
    store.blobs.refresh()
    # In the order of their folders: the kernel finds neighbours sooner.
    known, digests = known or {}, sorted(desired.digests)
    # Nothing here may walk all of *known*: it is the whole run's, and this may be one tree of a thousand.
    blobs = store.blobs.stat_all({digest: desired.size(digest) for digest in digests if digest not in known})
    blobs |= {digest: known[digest] for digest in digests if digest in known}
    absent = (digest for digest, status in blobs.items() if status.state is not BlobState.INTACT)
    partials = _partials(store, absent, desired)
    observation = _Observation(
        store=store,
        desired=desired,
        blobs=blobs,
        inodes={digest: status.ino for digest, status in blobs.items() if status.ino},
        device=_device(store.layout.blobs),
        verifying=verifying(store),
    )
    trees = {tree.key: observation.at(tree) for tree in desired.trees}
    return Actual(blobs=blobs, partials=partials, trees=trees, free_bytes=free())


def _partials(store: BlobStore, digests: Iterable[Digest], desired: Desired) -> dict[Digest, int]:
    try:
        names = set(os.listdir(store.layout.partials))
    except FileNotFoundError:
        return {}
    held = {d: store.held_in_partial(d, desired.size(d)) for d in digests if d.hex in names}
    return {digest: count for digest, count in held.items() if count}


def _device(path: Path) -> int:
    try:
        return os.stat(path).st_dev
    except FileNotFoundError:
        return -1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Observation:
    """The state that all trees of one observation are compared with. Nothing in it is copied or walked for a tree."""

    store: BlobStore
    desired: Desired
    blobs: Mapping[Digest, BlobStatus]
    inodes: Mapping[Digest, int]  # of the blobs that exist
    device: int  # of the store
    verifying: frozenset[str]  # ids of trees that a live process is reading

    def at(self, tree: DesiredTree) -> ActualTree:
        """The state of one tree, by its inventories, a listing of its folders and stats of what is not its blob's inode."""
        store = self.store
        record, unfinished = store.trees.read(tree.key.tree), store.trees.read_intent(tree.key.tree)
        found = scan(tree.path) if not tree.path.is_symlink() else None
        if found is None:
            return NO_TREE if unfinished is None else ActualTree(leftover=unfinished.staging or ".")
        same_disk = _device(tree.path) == self.device
        comparison = _Comparison(tree, self, found, record, self.inodes if same_disk else {})
        comparison.run(tree.files)
        comparison.run_others(tree.others)
        recorded = record.files if record else {}
        wanted = tree.entries.keys()
        for path in recorded.keys() - wanted:
            comparison.superfluous(path, recorded[path])
        known = wanted | recorded.keys()
        return ActualTree(
            exists=record is not None or unfinished is not None or bool(comparison.placed or comparison.foreign),
            recorded=record is not None,
            labels=record.labels if record else {},
            leftover=(unfinished.staging or ".") if unfinished else "",
            placed=comparison.placed,
            foreign=comparison.foreign,
            extra=tuple(sorted(path for path in found.files.keys() - known if not is_left_over(path))),
            own=tuple(comparison.own),
            verifying=tree_id(tree.key.tree) in self.verifying,
        )


class _Comparison:
    """The comparison of one tree's paths with blobs and inventory."""

    def __init__(
        self,
        tree: DesiredTree,
        observation: _Observation,
        found: Scan,
        record: Inventory | None,
        inodes: Mapping[Digest, int],
    ) -> None:
        """*inodes*: of the blobs that this tree's files may be; none where it is on another disk."""
        self._root, self._desired, self._blobs = str(tree.path), observation.desired, observation.blobs
        self._inodes, self._found = inodes, found
        self._record: Mapping[str, InventoryEntry] = record.files if record else {}
        self.placed: dict[str, Entry] = {}
        self.foreign: dict[str, Foreign] = {}
        self.own: list[str] = []

    def run(self, files: Mapping[str, Digest]) -> None:
        """Judge every locked path. Nearly always it is its blob's inode: two lookups and one comparison."""
        there, placed, inodes = self._found.files, self.placed, self._inodes
        for path, digest in files.items():
            ino = there.get(path)
            if ino is not None and inodes.get(digest) == ino:
                placed[path] = digest
            elif ino is not None:
                self._by_stat(path, digest, inodes.get(digest, 0))
                if path in placed:
                    self.own.append(path)
            elif path in self._found.folders:
                self.foreign[path] = Foreign(None)

    def run_others(self, others: Mapping[str, Other]) -> None:
        """Judge every path that is to hold no blob: by its content, which is small."""
        for path, other in others.items():
            if path in self._found.folders:
                self.foreign[path] = Foreign(None)
            if path not in self._found.files:
                continue
            full, recorded = f"{self._root}/{path}", self._record.get(path)
            if recorded is not None and recorded.entry != other and as_placed(full, recorded):
                self.placed[path] = recorded.entry
            elif entries.read(full) == other:
                self.placed[path] = other
                self.own.append(path)
            else:
                self.foreign[path] = Foreign(None, modified=recorded is not None)

    def _by_stat(self, path: str, digest: Digest, blob_ino: int) -> None:
        try:
            there = os.lstat(f"{self._root}/{path}")
        except FileNotFoundError:
            return
        recorded = self._record.get(path)
        blob_of_link = _target_inode(f"{self._root}/{path}") if stat.S_ISLNK(there.st_mode) else 0
        size = there.st_size if stat.S_ISREG(there.st_mode) else None
        carries_proof = size == self._desired.size(digest) and there.st_mtime_ns == digest.mtime * 1_000_000_000
        if size == 0 and digest == EMPTY:
            self.placed[path] = digest
        elif there.st_ino == blob_ino and blob_ino:
            self.placed[path] = digest  # the folder's inode number was not the file's (some overlays)
        elif recorded is not None and recorded.entry == digest and recorded.ino == there.st_ino:
            if (recorded.kind is LinkKind.SYMLINK and blob_of_link == self._blobs.get(digest, ABSENT).ino) or (
                recorded.kind in (LinkKind.COPY, LinkKind.REFLINK) and carries_proof and not recorded.suspect
            ):
                self.placed[path] = digest
            elif recorded.kind is LinkKind.HARDLINK and carries_proof and not self._blobs.get(digest, ABSENT).ino:
                self.placed[path] = digest  # its blob is gone from the store, the inode lives on here
            else:
                self.foreign[path] = Foreign(size, modified=not carries_proof or recorded.suspect)
        elif recorded is not None and _as_recorded(f"{self._root}/{path}", there, recorded):
            self.placed[path] = recorded.entry  # an older version's file, as it was put there
        else:
            self.foreign[path] = Foreign(size, modified=recorded is not None and not carries_proof)

    def superfluous(self, path: str, recorded: InventoryEntry) -> None:
        """Record a path that an earlier lockfile named."""
        if self._found.files.get(path) == recorded.ino:
            self.placed[path] = recorded.entry
        elif path in self._found.files:
            self.foreign[path] = Foreign(None, modified=True)


def _target_inode(path: str) -> int:
    """The inode that a symlink leads to; -1 where it dangles."""
    try:
        return os.stat(path).st_ino
    except OSError:
        return -1


def _as_recorded(path: str, there: os.stat_result, recorded: InventoryEntry) -> bool:
    if recorded.other is not None:
        return as_placed(path, recorded)
    own_proof = there.st_mtime_ns == recorded.digest.mtime * 1_000_000_000
    return there.st_ino == recorded.ino and own_proof and not recorded.suspect


def verifying(store: BlobStore) -> frozenset[str]:
    """The ids of the trees that live processes are verifying."""
    folder = store.layout.state_dir(VERIFYING)
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return frozenset()
    found = set()
    for name in names:
        with suppress(OSError):
            holder = Holder.read(read_state(folder / name, store.writers))
            if holder is not None and holder.alive:
                found.add(name.partition("-")[0])
    return frozenset(found)
