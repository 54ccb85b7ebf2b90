"""Trees on record and the lockfile that owns each: what a lockfile put there and no longer names, and who names it now."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from modelstow.cas import BlobStore, Digest, StoreStateError
from modelstow.cas.inventory import Inventory, is_intent, tree_id
from modelstow.cas.pieces import read_table

from ..desired import selectors
from ..desired.lockfile import LockedBlob, Lockfile
from ..planning.state import Desired, DesiredTree, TreeKey
from . import pins, roots
from .roots import LockfileRoot, OnUnreadable, RootState, TreeRoot


def unwanted(
    store: BlobStore, lockfile: Path | None, desired: Desired, on_unreadable: OnUnreadable
) -> Iterator[tuple[Inventory, TreeKey]]:
    """Trees in the store that *lockfile* put there, and none of whose variants *desired* names or a user pins."""
    kept = pins.variants(store).union(*(tree.key.variants for tree in desired.trees))
    named = {tree_id(tree.key.tree) for tree in desired.trees}
    for file in store.trees.files():
        if file.name in named or is_intent(file):
            continue
        try:
            record = store.trees.read_file(file)
            if record is None or os.path.isabs(record.tree) or record.labels.get("lockfile") != str(lockfile):
                continue
            key = TreeKey.of(record)
        except StoreStateError as error:
            on_unreadable(error)
            continue
        if kept.isdisjoint(key.variants):
            yield record, key


def removals(
    root: Path, lockfile: Path | None, desired: Desired, on_unreadable: OnUnreadable
) -> tuple[tuple[TreeKey, ...], dict[str, LockfileRoot]]:
    """Of the unwanted trees, those that no other registered lockfile names; and who names the others, by inventory.

    None where another lockfile's root cannot be read, since that may name any of them.
    """
    store = BlobStore.open_readonly(root)
    found = list(unwanted(store, lockfile, desired, on_unreadable))
    lost: list[StoreStateError] = []
    others = other_locks(store, lockfile, on_unreadable=lost.append) if found else []
    if lost:
        on_unreadable(lost[0])
        return (), {}
    new_owners = {record.id: other for record, key in found for other in others if _names_any(other, key)}
    return tuple(sorted(key for record, key in found if record.id not in new_owners)), new_owners


def _names_any(root: LockfileRoot, key: TreeKey) -> bool:
    return not root.trees.keys().isdisjoint(key.variants)


def other_locks(store: BlobStore, lockfile: Path | None, *, on_unreadable: OnUnreadable) -> list[LockfileRoot]:
    """The other lockfiles that were reconciled into this store and are not known to be gone."""
    every = roots.read_lockfile_roots(store, but=lockfile, on_unreadable=on_unreadable)
    return [root for root in every if root.path != str(lockfile) and root.state is not RootState.DEAD]


def lock_root(lock: Lockfile, lockfile: Path | None, text: bytes) -> LockfileRoot:
    """The root of a lockfile with this *text*, yet to be registered. Raises OSError."""
    assert lockfile is not None
    parent = os.stat(lockfile.parent)
    every = selectors.all_variants(lock)
    return LockfileRoot(
        path=str(lockfile),
        text=Digest.of(text).hex,
        parent=(parent.st_dev, parent.st_ino),
        trees={id_: selectors.fingerprint(lock.models[id_.model].variants[id_.variant]) for id_ in every},
        pinned=tuple(id_ for id_ in every if lock.models[id_.model].pin),
        digests=frozenset(lock.blobs),
    )


def all_trees(store: BlobStore, lock: Lockfile, on_unreadable: OnUnreadable) -> Desired:
    """Every tree on record as it was published, whichever lockfile names it; *lock* says how to fetch its blobs.

    Not what another user says of folders outside the store.
    """
    trees, blobs = [], dict(lock.blobs)
    for root in roots.read_trees(store, on_unreadable=on_unreadable):
        if root.unfinished or root.state is not RootState.ALIVE or not store.trees.may_change(root.record):
            continue
        others = root.record.others
        files = {path: placed.digest for path, placed in root.record.files.items() if path not in others}
        path = root.record.path(store.layout.root)
        trees.append(DesiredTree(key=root.key, path=path, files=files, others=others, labels=root.record.labels))
        for digest in files.values():
            if digest not in blobs:
                blobs[digest] = LockedBlob(size=size_of(store, lock, digest))
    return Desired(trees=tuple(trees), blobs=blobs)


def everything(store: BlobStore, lock: Lockfile, on_unreadable: OnUnreadable) -> tuple[Desired, dict[Digest, int]]:
    """All trees, and all blobs."""
    return all_trees(store, lock, on_unreadable), all_blobs(store, lock)


def unfinished(store: BlobStore, desired: Desired | None, on_unreadable: OnUnreadable) -> list[TreeRoot]:
    """The changes of trees that did not end, of the desired ones or of all, as far as they are this user's."""
    named = None if desired is None else {tree.key.tree for tree in desired.trees}
    found = [root for root in roots.read_trees(store, on_unreadable=on_unreadable) if root.unfinished]
    return [root for root in found if store.trees.is_mine(root.record) and (named is None or root.record.tree in named)]


def all_blobs(store: BlobStore, lock: Lockfile) -> dict[Digest, int]:
    """Every blob of a store with its size in bytes. Raises OSError."""
    return {digest: size_of(store, lock, digest) for digest, _ in store.blobs.entries()}


def size_of(store: BlobStore, lock: Lockfile, digest: Digest) -> int:
    """A blob's size in bytes: by the lockfile, its piece table, or stat; 0 if it is gone."""
    if digest in lock.blobs:
        return lock.blobs[digest].size
    table = read_table(store.layout.table(digest), digest)
    if table is not None:
        return table.size
    try:
        return os.lstat(store.layout.blob(digest)).st_size
    except FileNotFoundError:
        return 0


def repairable(lock: Lockfile, desired: Desired) -> Desired:
    """*desired* with only the trees that exist and whose every blob *lock* can fetch."""
    trees = tuple(t for t in desired.trees if t.path.is_dir() and lock.blobs.keys() >= set(t.files.values()))
    return replace(desired, trees=trees)
