"""Recovery: a change of a tree that a crash interrupted is finished or undone, by its intent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from modelstow.cas import BlobStore, links, presence, trash, tree
from modelstow.cas.inventory import Inventory, InventoryEntry
from modelstow.cas.tree import Quarantine

from ..events.events import Displaced, Sink, Warning
from ..planning.state import TreeKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """The recovery of one store's trees. Hold the tree's lock."""

    store: BlobStore
    emit: Sink

    def recover(self, key: TreeKey, live: Path) -> bool:
        """Finish or undo a change that did not end. True if there was one."""
        records = self.store.trees
        announced = records.read_intent(key.tree)
        if announced is None:
            return False
        if not records.is_mine(announced):
            who = f"user {announced.writer} has announced a change of {key}, which did not end"
            self.emit(Warning(text=f"{who}; it is not finished, and what it left stays"))
            records.drop_intent(key.tree)
            return False
        old = records.read(key.tree)
        if announced.staging:
            staging = live.parent / announced.staging
            if inode(staging) == announced.staging_ino:
                self.discard_staging(staging, announced.files)
            elif presence.is_folder(staging):
                self.drain(staging, live, old or announced)
        there = (tree.scan(live) or tree.Scan()).files  # not what a symlink of the tree leads to
        folders = {path.rpartition("/")[0] for path in (*announced.files, *(old.files if old else ()))}
        for path in there:
            folder, _, name = path.rpartition("/")
            if folder in folders and links.is_temp_name(name):  # or the next exchange would take it for the user's
                tree.unlink(live, path)
        files = {path: placed for path, placed in old.files.items() if path in there} if old else {}
        files |= {p: f for p, f in announced.files.items() if p in there and tree.as_placed(f"{live}/{p}", f)}
        if files:
            merged = replace(announced, files=files, staging="", staging_ino=0, labels=(old or announced).labels)
            records.commit(merged)
        else:
            records.remove(key.tree)
        return True

    def discard_staging(self, staging: Path, files: Mapping[str, InventoryEntry]) -> None:
        """Remove a folder that never became a tree: all that is in it was put there by us."""
        for path in files:
            try:
                tree.unlink(staging, path)
            except (FileNotFoundError, NotADirectoryError):
                pass
        tree.remove_managed(staging, files, Quarantine(self.store.layout.quarantine, "staging"))

    def drain(self, old_folder: Path, live: Path, old: Inventory) -> None:
        """Empty the folder that an exchange put aside: what is the user's goes into the live tree or to quarantine."""
        quarantine = Quarantine(self.store.layout.quarantine, live.name)
        tree.drain(old_folder, live, old.files, quarantine)
        report_displaced(self.emit, live, quarantine)
        if not trash.put(self.store.layout, old_folder, old):
            tree.remove_managed(old_folder, old.files, quarantine)


def report_displaced(emit: Sink, root: Path, quarantine: Quarantine) -> None:
    """Report where displaced files are now."""
    for path, to in quarantine.displaced.quarantined.items():
        emit(Displaced(path=root / path, to=Path(to)))


def inode(path: Path) -> int:
    """The inode at *path*; 0 where nothing is. Raises OSError where that cannot be seen."""
    found = presence.look(path)
    return found.st_ino if found is not None else 0
