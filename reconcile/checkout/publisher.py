"""The publisher: a tree is published in one step where possible, else file by file, and removed.

The tree's lock is held. The change is recorded first as an intent (``<id>.next``, durable), so that gc keeps its blobs
and recovery after a crash knows what to finish. Files that are not ours are moved, never deleted, and that is reported.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from modelstow.cas import (
    EMPTY,
    BlobState,
    BlobStatus,
    BlobStore,
    Digest,
    Entry,
    LinkKind,
    leases,
    materialise,
    presence,
    trash,
    tree,
)
from modelstow.cas.durable import fsync_folder, make_folders
from modelstow.cas.inventory import EntryColumns, Inventory, InventoryEntry
from modelstow.cas.links import Linker, kind_of
from modelstow.cas.locks import Lock
from modelstow.cas.materialise import TreeEntry
from modelstow.cas.records import join_hex
from modelstow.cas.tree import Quarantine

from ..events.events import FilesLinked, Info, Pruned, Sink, TreePublished, TreeRemoved
from ..planning.observer import observe
from ..planning.planner import Link, LinkTree, Remove, Replace, plan, same_choice
from ..planning.state import Actual, ActualTree, Desired, DesiredTree, TreeKey
from .recovery import Recovery, inode, report_displaced

_TRIES = 100  # to make a folder whose parents others remove


@dataclass(slots=True, kw_only=True)
class Publisher:
    """The publisher of one store's trees. *linker* is shared, so that a link kind that fails here is tried once."""

    store: BlobStore
    linker: Linker
    emit: Sink
    lock_tree: Callable[[TreeKey], Lock]

    def recover(self, key: TreeKey, path: Path) -> bool:
        """Finish or undo a change of a tree that did not end. True if there was one. Raises as ``publish``."""
        with self.lock_tree(key):
            return self._recovery.recover(key, path)

    # ---- publishing

    def publish(self, desired: Desired, wanted: DesiredTree, known: Mapping[Digest, BlobStatus]) -> bool:
        """Make one tree equal what is desired; its blobs must be there. True if anything changed. Durable on return.

        *known*: statuses of blobs that are still true, since the caller's lease keeps them.
        Raises LinkError, LockTimeoutError, StoreStateError, OSError.
        """
        with self.lock_tree(wanted.key):
            recovered = self._recovery.recover(wanted.key, wanted.path)
            if presence.exists(wanted.path) and not presence.is_folder(wanted.path):
                self._displace_root(wanted)
            prune = desired.prune and not wanted.keeps_extra
            one = replace(desired, trees=(wanted,), removals=(), prune=prune)
            if wanted.entries and not recovered and self._is_new(wanted):
                statuses = {d: known.get(d) or self.store.blobs.stat(d, desired.size(d)) for d in one.digests}
                self._exchange(one, wanted, Actual(blobs=statuses))
                self._published(wanted, exchanged=True)
                return True
            actual = observe(self.store, one, known=known)
            seen = actual.trees[wanted.key]
            if os.path.exists(owner := seen.labels.get("lockfile", "")):
                wanted = replace(wanted, labels={**wanted.labels, "lockfile": owner})
            work = [action for action in plan(one, actual).actions if not isinstance(action, Remove) or action.path]
            if not work and seen.recorded and same_choice(seen.labels, wanted.labels):
                return recovered
            exchanged = bool(work) and self._by_exchange(wanted, seen) and self._exchange(one, wanted, actual)
            if exchanged and prune and seen.extra:  # they moved into the new tree
                actual = observe(self.store, one)
            if not exchanged or (prune and seen.extra):
                self._repair_in_place(one, wanted, actual)
            if work:
                self._published(wanted, exchanged=exchanged)
            return bool(work) or recovered

    def _is_new(self, wanted: DesiredTree) -> bool:
        return not presence.exists(wanted.path) and self.store.trees.read(wanted.key.tree) is None

    def _published(self, wanted: DesiredTree, *, exchanged: bool) -> None:
        for id_ in wanted.key.variants:
            self.emit(TreePublished(model=id_.model, variant=id_.variant, path=wanted.path, exchanged=exchanged))

    def _by_exchange(self, wanted: DesiredTree, seen: ActualTree) -> bool:
        """Whether to exchange the folder: a new or changed tree appears in one step, drift is repaired in place."""
        if presence.exists(wanted.path) and not seen.recorded:
            return False  # a folder of the user's that becomes a tree, or a tree whose record was lost
        if not presence.exists(wanted.path):
            return True
        record = self.store.trees.read(wanted.key.tree)
        return record is not None and {p: f.entry for p, f in record.files.items()} != dict(wanted.entries)

    def _exchange(self, desired: Desired, wanted: DesiredTree, actual: Actual) -> bool:
        """Stage next to the tree, exchange, drain. False where folders cannot be exchanged here: nothing has changed."""
        records = self.store.trees
        old = records.read(wanted.key.tree)
        staging = tree.new_staging(wanted.path)
        try:
            self._make_folder(staging)
        except PermissionError:
            if wanted.path.is_dir():
                return False  # we may write into an outside tree, not beside it
            raise
        files = self._expected(wanted, actual)
        record = self._record(wanted, files, staging=staging)
        try:
            records.write_intent(record)
            placed = self._link_all(staging, wanted, files) or self._populate(
                staging, desired, wanted.entries, wanted, actual
            )
            if placed is not files:
                records.write_intent(replace(record, files=placed))
            swapped = tree.publish(staging, wanted.path)
        except BaseException as error:
            if inode(staging) not in (0, record.staging_ino):
                raise  # they were exchanged before it failed: this is the old tree now, and recovery drains it
            self._recovery.discard_staging(staging, files)
            records.drop_intent(record.tree)
            if isinstance(error, OSError) and error.errno in tree.EXCHANGE_IMPOSSIBLE and old is not None:
                self.emit(Info(text=f"{wanted.path} cannot be exchanged here ({error.strerror}); changing it file by file"))
                return False
            raise
        if swapped:
            self._recovery.drain(staging, wanted.path, old or record)
        if placed is files:
            records.commit_intent(wanted.key.tree)
        else:
            records.commit(self._record(wanted, placed))
        self._report_links(wanted.key, placed)
        return True

    def _link_all(self, root: Path, wanted: DesiredTree, files: EntryColumns) -> EntryColumns | None:
        """The quick way to fill a new tree, where hardlinks can be had."""
        if wanted.other_disk or not self.linker.prefers_hardlinks:
            return None
        return materialise.link_all(root, files, self.store.layout.blobs, folder_mode=self._tree_mode)

    def _repair_in_place(self, desired: Desired, wanted: DesiredTree, actual: Actual) -> None:
        """Repair an existing tree file by file; every path switches in one step."""
        records = self.store.trees
        old = records.read(wanted.key.tree)
        before: Mapping[str, InventoryEntry] = old.files if old else {}
        if not wanted.path.is_dir():
            self._make_folder(wanted.path)
            fsync_folder(wanted.path.parent)
        expected = self._expected(wanted, actual)
        records.write_intent(self._record(wanted, expected))
        actions = [link for a in plan(desired, actual).actions for link in (a.links() if isinstance(a, LinkTree) else [a])]
        place = {a.path: a.entry for a in actions if isinstance(a, Link | Replace)}
        gone = [a.path for a in actions if isinstance(a, Remove)]
        quarantine = Quarantine(self.store.layout.quarantine, wanted.path.name)
        try:
            self._clear_conflicts(wanted, place, gone, actual, before, quarantine)
            placed = self._populate(wanted.path, desired, place, wanted, actual, replacing=True)
        except BaseException:
            if old is None and not any(tree.as_placed(f"{wanted.path}/{p}", file) for p, file in expected.items()):
                records.remove(wanted.key.tree)  # it never became a tree
            raise
        kept = {
            path: before[path] for path, entry in wanted.entries.items() if path in before and before[path].entry == entry
        }
        files = {path: placed.get(path) or kept.get(path) or expected[path] for path in wanted.entries}
        # A path whose blob was replaced meanwhile, or whose record was lost: what is there counts.
        records.commit(self._record(wanted, files))
        self._report_links(wanted.key, placed)
        report_displaced(self.emit, wanted.path, quarantine)

    def _clear_conflicts(
        self,
        wanted: DesiredTree,
        place: Iterable[str],
        gone: Iterable[str],
        actual: Actual,
        before: Mapping[str, InventoryEntry],
        quarantine: Quarantine,
    ) -> None:
        """Move what is in the way and may hold the only copy of its bytes; unlink what is ours."""
        seen = actual.trees[wanted.key]
        root = wanted.path
        blocking = {str(parent) for path in place for parent in PurePosixPath(path).parents} - {"."}
        for path in sorted(blocking):
            if presence.exists(root / path) and not stat.S_ISDIR(os.lstat(root / path).st_mode):
                quarantine.take(root, path)
        for path in place:
            if path in seen.foreign and presence.exists(root / path) and not self._is_known(root / path):
                quarantine.take(root, path)
        for path in gone:
            if not presence.exists(root / path):
                continue
            pruned = path in seen.extra
            if pruned or (path in before and tree.as_placed(f"{root}/{path}", before[path])):
                tree.unlink(root, path)
            elif not self._is_known(root / path):
                quarantine.take(root, path)
            else:
                tree.unlink(root, path)
            self._remove_empty(root, path)
            if pruned:
                self.emit(Pruned(path=root / path))

    def _is_known(self, path: Path) -> bool:
        """Whether nothing is lost with this name: its bytes are an intact blob's, or its inode is in quarantine already."""
        found = os.lstat(path)
        if found.st_nlink > 1 and found.st_ino in {entry.inode() for entry in os.scandir(self.store.layout.quarantine)}:
            return True
        if not stat.S_ISREG(found.st_mode):
            blobs = os.path.realpath(self.store.layout.blobs)
            return stat.S_ISLNK(found.st_mode) and Path(os.path.realpath(path)).is_relative_to(blobs)
        digest = Digest.of_path(path)
        return digest == EMPTY or self.store.blobs.stat(digest, found.st_size).state is BlobState.INTACT

    # ---- removing

    def remove(self, record: Inventory, key: TreeKey, *, unless: Callable[[], bool] | None = None) -> bool:
        """Remove a tree; the user's files stay, edited ones go to quarantine.

        *unless* is called under the store's exclusive lock, when no lease can be taken any more: True forbids the removal,
        and False is returned. Raises LockTimeoutError, OSError.
        """
        path = record.path(self.store.layout.root)
        if not self.store.trees.may_change(record):
            return False
        with self.lock_tree(key):
            self._recovery.recover(key, path)
            record = self.store.trees.read(record.tree) or record
            alone = leases.exclusive_store_lock(self.store, doing=f"evicting {key}") if unless else nullcontext()
            with alone:
                if unless is not None and unless():
                    return False
                self._remove_files(path, record)
            trash.empty(self.store.layout, self.store.writers, tree=record.tree)
            if not os.path.isabs(record.tree):
                self._remove_empty(self.store.layout.trees, str(path.relative_to(self.store.layout.trees)))
            for id_ in key.variants:
                self.emit(TreeRemoved(model=id_.model, variant=id_.variant, path=path))
        return True

    def _remove_files(self, path: Path, record: Inventory) -> None:
        """Remove a tree's files: by one rename where only ours are in it, else file by file around the user's."""
        quarantine = Quarantine(self.store.layout.quarantine, path.name)
        content = tree.classify(path, record.files)
        only_ours = not content.theirs and not content.edited and presence.is_folder(path)
        if not (only_ours and trash.put(self.store.layout, path, record)):
            tree.remove_managed(path, record.files, quarantine)
        self.store.trees.remove(record.tree)
        report_displaced(self.emit, path, quarantine)

    def relink(self, desired: Desired, record: Inventory, digests: frozenset[Digest]) -> None:
        """Put the new inode of repaired blobs into a tree outside what is desired. Raises as ``publish``."""
        path = record.path(self.store.layout.root)
        if not path.is_dir() or not self.store.trees.may_change(record):
            return
        key = TreeKey.of(record)
        with self.lock_tree(key):
            self._recovery.recover(key, path)
            record = self.store.trees.read(record.tree) or record
            stale = {
                p: f.digest
                for p, f in record.files.items()
                if f.digest in digests
                and f.kind is LinkKind.HARDLINK
                and f.ino != self.store.blobs.stat(f.digest, desired.size(f.digest)).ino
                and inode(path / p) == f.ino
            }
            if not stale:
                return
            wanted = DesiredTree(key=key, path=path, files=stale, labels=record.labels)
            self.store.trees.write_intent(replace(record, staging="", staging_ino=0))
            statuses = {digest: self.store.blobs.stat(digest, desired.size(digest)) for digest in set(stale.values())}
            placed = self._populate(path, desired, stale, wanted, Actual(blobs=statuses), replacing=True)
            self.store.trees.commit(replace(record, files={**record.files, **placed}))
            self._report_links(key, placed)

    # ---- parts

    @property
    def _recovery(self) -> Recovery:
        return Recovery(store=self.store, emit=self.emit)

    def _populate(
        self,
        root: Path,
        desired: Desired,
        files: Mapping[str, Entry],
        wanted: DesiredTree,
        actual: Actual,
        *,
        replacing: bool = False,
    ) -> dict[str, InventoryEntry]:
        def item(entry: Entry) -> TreeEntry:
            if not isinstance(entry, Digest):
                return TreeEntry.of(entry)
            return TreeEntry(EMPTY, 0) if entry == EMPTY else TreeEntry(entry, desired.size(entry), actual.blobs[entry].ino)

        items = {path: item(entry) for path, entry in files.items()}
        outside = os.path.isabs(wanted.key.tree)

        def target(path: str, digest: Digest) -> str:
            blob = self.store.layout.blob(digest)
            # Inside the store a symlink is relative, so that the store can be moved or mounted elsewhere.
            return blob if outside else os.path.relpath(blob, os.path.dirname(f"{wanted.path}/{path}"))

        return materialise.populate(
            root, items, self.store.layout.blob, self.linker, replace=replacing, target=target, folder_mode=self._tree_mode
        )

    @property
    def _tree_mode(self) -> int:
        """Folders of trees: the group's in a shared store, readable by all who may enter the store otherwise."""
        return 0o2775 if self.store.config.shared else 0o755

    def _expected(self, wanted: DesiredTree, actual: Actual) -> EntryColumns:
        """What hardlinks of its blobs will be; a guess that the record after the work corrects."""
        blobs, digests, others = actual.blobs, wanted.files.values(), wanted.others
        kinds = ["e" if digest == EMPTY else "h" for digest in digests]
        inodes = [0 if digest == EMPTY else blobs[digest].ino for digest in digests]
        return EntryColumns(
            [*wanted.files, *others],
            join_hex(digests) + EMPTY.hex * len(others),
            "".join(kinds + [kind_of(other).value[0] for other in others.values()]),
            inodes + [0] * len(others),
            others=others,
        )

    def _record(
        self, wanted: DesiredTree, files: Mapping[str, InventoryEntry], *, staging: Path | None = None
    ) -> Inventory:
        parent = os.stat(wanted.path.parent)
        return Inventory(
            tree=wanted.key.tree,
            labels=wanted.labels,
            files=files,
            staging=staging.name if staging else "",
            staging_ino=os.stat(staging).st_ino if staging else 0,
            parent=(parent.st_dev, parent.st_ino),
        )

    def _make_folder(self, path: Path) -> None:
        """Make a folder for a tree and its parents, which another process that finds them empty may remove meanwhile."""
        for left in reversed(range(_TRIES)):
            try:
                self._make_parents(path)
                path.mkdir()
            except FileNotFoundError:
                if not left:
                    raise
            else:
                os.chmod(path, self._tree_mode)
                return

    def _make_parents(self, path: Path) -> None:
        if path.is_relative_to(self.store.layout.trees):
            for parent in reversed(path.relative_to(self.store.layout.trees).parents):
                folder = self.store.layout.trees / parent
                if not folder.is_dir():
                    folder.mkdir(exist_ok=True)
                    os.chmod(folder, self._tree_mode)
                    fsync_folder(folder.parent)
        else:
            make_folders(path.parent)

    def _displace_root(self, wanted: DesiredTree) -> None:
        """Move a file or symlink at the path of the tree's folder to quarantine."""
        quarantine = Quarantine(self.store.layout.quarantine, wanted.path.name)
        quarantine.take(wanted.path.parent, wanted.path.name)
        report_displaced(self.emit, wanted.path.parent, quarantine)

    def _remove_empty(self, root: Path, path: str) -> None:
        """Remove the folders above *path* that became empty, up to *root*."""
        for parent in PurePosixPath(path).parents:
            if str(parent) == "." or not tree.remove_folder(root / parent):
                return

    def _report_links(self, key: TreeKey, placed: Mapping[str, InventoryEntry]) -> None:
        self.emit(FilesLinked(tree=str(key), kinds=EntryColumns.of(placed).count()))
