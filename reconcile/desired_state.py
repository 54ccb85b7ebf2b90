"""Which trees are meant: those that a lockfile names, those it put there and no longer names, those on record."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from modelstow.cas import EMPTY, BlobStore, Digest, LinkMode
from modelstow.cas.inventory import Inventory, is_intent, read_inventory, tree_id
from modelstow.cas.pieces import read_table

from .desired import selectors
from .desired.lockfile import LockedBlob, Lockfile
from .desired.selectors import VariantId
from .planning.state import Desired, DesiredTree, TreeKey
from .retention import pins, roots
from .retention.preflight import disk
from .retention.roots import LockfileRoot, RootState
from .settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsureOptions:
    """What is chosen beyond the selector."""

    into: Path | None = None
    with_: frozenset[str] = frozenset()
    without: frozenset[str] = frozenset()
    prune: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """One lockfile over one store, as sets of trees. Reads inventories and roots, writes nothing."""

    settings: Settings
    lock: Lockfile

    def desired(self, chosen: Iterable[VariantId], options: EnsureOptions) -> Desired:
        trees = tuple(self._tree(each, options) for each in chosen)
        copies = self._copies() if trees else False
        mirrors = self.settings.mirrors
        return Desired(trees=trees, blobs=self.lock.blobs, mirrors=mirrors, needs_copies=copies, prune=options.prune)

    def _tree(self, chosen: VariantId, options: EnsureOptions) -> DesiredTree:
        root = self.settings.root
        place = selectors.tree_of_folder(options.into, root) if options.into is not None else chosen.tree
        variant = self.lock.models[chosen.model].variants[chosen.variant]
        with_, without = frozenset[str](), frozenset[str]()
        if variant.components:
            selectors.check_components(chosen, variant, options.with_ | options.without)
            record = BlobStore.open_readonly(root).trees.read(place)
            before, before_without = selectors.remembered(record.labels if record else {})
            with_ = ((before - options.without) | options.with_) & variant.components.keys()
            without = ((before_without - options.with_) | options.without) & variant.components.keys()
        elif options.with_ or options.without:
            selectors.check_components(chosen, variant, options.with_ | options.without)
        pin = self.lock.models[chosen.model].pin
        labels = selectors.labels(chosen, self.settings.lockfile, with_, without, pin=pin)
        files = variant.chosen(with_, without) if variant.components else variant.files
        path, symlinks = root / place, self.settings.link_mode is LinkMode.SYMLINK
        other_disk = options.into is not None and not symlinks and _device(path) != _device(root)
        key = TreeKey(chosen.model, chosen.variant, place)
        return DesiredTree(key=key, path=path, files=files, labels=labels, other_disk=other_disk)

    def _copies(self) -> bool:
        """Whether the files of trees inside the store will have bytes of their own, as far as is known."""
        mode = self.settings.link_mode
        if mode is not LinkMode.REFLINK:
            return mode is LinkMode.COPY
        from modelstow.cas import syscalls

        return not syscalls.can_reflink(str(disk(self.settings.root)))

    def unwanted(self, desired: Desired) -> Iterator[tuple[Inventory, TreeKey]]:
        """Trees in ROOT that this lockfile put there and no longer names, unless pinned."""
        store = BlobStore.open_readonly(self.settings.root)
        pinned = pins.names(store)
        named = {tree_id(tree.key.tree) for tree in desired.trees}
        for file in store.trees.files():
            if file.name in named or is_intent(file):
                continue
            record = read_inventory(file)
            if record is None or os.path.isabs(record.tree) or record.labels.get("lockfile") != str(self.settings.lockfile):
                continue
            key = TreeKey.of(record)
            if str(key) not in pinned:
                yield record, key

    def removals(self, desired: Desired) -> tuple[tuple[TreeKey, ...], dict[str, LockfileRoot]]:
        """Of those, what no other registered lockfile wants; and who wants the others, by inventory."""
        unwanted = list(self.unwanted(desired))
        others = other_locks(BlobStore.open_readonly(self.settings.root), self.settings.lockfile) if unwanted else []
        new_owners = {record.id: other for record, key in unwanted for other in others if str(key) in other.trees}
        return tuple(sorted(key for record, key in unwanted if record.id not in new_owners)), new_owners

    def blobs(self, chosen: Iterable[VariantId]) -> dict[Digest, int]:
        """Every blob of these variants, parts that are optional too, with its size."""
        variants = [self.lock.models[each.model].variants[each.variant] for each in chosen]
        digests = {digest for variant in variants for digest in variant.files.values()} - {EMPTY}
        return {digest: self.lock.blobs[digest].size for digest in digests}

    def lock_root(self, text: bytes) -> LockfileRoot:
        assert self.settings.lockfile is not None
        parent = os.stat(self.settings.lockfile.parent)
        every = selectors.all_variants(self.lock)
        variants = {str(c): self.lock.models[c.model].variants[c.variant] for c in every}
        return LockfileRoot(
            path=str(self.settings.lockfile),
            text=Digest.of(text).hex,
            parent=(parent.st_dev, parent.st_ino),
            trees={name: selectors.fingerprint(variant) for name, variant in variants.items()},
            pinned=tuple(str(c) for c in every if self.lock.models[c.model].pin),
            digests=frozenset(self.lock.blobs),
        )

    def registered(self, store: BlobStore) -> Desired:
        """Every tree on record, as it was put there."""
        trees, blobs = [], dict(self.lock.blobs)
        for root in roots.read(store).trees:
            if root.unfinished or root.state is not RootState.ALIVE:
                continue
            others = root.record.others
            files = {path: placed.digest for path, placed in root.record.files.items() if path not in others}
            path = root.record.path(store.layout.root)
            trees.append(DesiredTree(key=root.key, path=path, files=files, others=others, labels=root.record.labels))
            for digest in files.values():
                if digest not in blobs:
                    blobs[digest] = LockedBlob(size=self.size_of(store, digest))
        return Desired(trees=tuple(trees), blobs=blobs, mirrors=self.settings.mirrors)

    def size_of(self, store: BlobStore, digest: Digest) -> int:
        """A blob's size: from the lockfile, its piece table, or what is on disk."""
        if digest in self.lock.blobs:
            return self.lock.blobs[digest].size
        table = read_table(store.layout.table(digest), digest)
        if table is not None:
            return table.size
        try:
            return os.lstat(store.layout.blob(digest)).st_size
        except FileNotFoundError:
            return 0

    def repairable(self, desired: Desired) -> Desired:
        """Those trees whose every blob this lockfile can fetch."""
        trees = tuple(t for t in desired.trees if t.path.is_dir() and all(d in self.lock.blobs for d in t.files.values()))
        return replace(desired, trees=trees)


def other_locks(store: BlobStore, mine: Path | None) -> list[LockfileRoot]:
    """The other lockfiles that were reconciled into this store and are not known to be gone."""
    every = roots.read_lockfile_roots(store, but=mine)
    return [root for root in every if root.path != str(mine) and root.state is not RootState.DEAD]


def _device(path: Path) -> int:
    return os.stat(disk(path)).st_dev
