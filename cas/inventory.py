"""Inventories: what modelstow put into each tree, one record a tree, replaced by rename as git does with its index.

An inventory is also the tree's root for garbage collection. It is durable before the tree appears: while a tree is being
changed, the *intent* says what it will be (``<id>.next``); once it is done, ``<id>`` says what it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from .digest import Digest
from .durable import UNFINISHED, fsync_folder, write_file
from .errors import Cause, StoreStateError
from .links import LinkKind
from .records import INVALID, decode, encode, join_hex, split_hex

INTENT = ".next"
"""What the file of an intent ends in."""
_KIND, _VERSION = "inventory", 1
_KINDS = {kind.value[0]: kind for kind in LinkKind}  # one letter a kind: h r s c e


@dataclass(frozen=True, slots=True)
class InventoryEntry:
    """One file of a tree. ``suspect``: a verification found its own bytes damaged (copies only)."""

    digest: Digest
    kind: LinkKind
    ino: int  # 0 where it was recorded before the file was made
    suspect: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """One tree. ``tree`` is relative to the store for trees in it, absolute for others; ``labels`` are the caller's."""

    tree: str
    labels: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, InventoryEntry] = field(default_factory=dict)
    staging: str = ""  # of an intent: the folder next to the tree that holds the new one, and after publishing the old
    staging_ino: int = 0  # the new folder's inode: tells which of the two it is
    parent: tuple[int, int] = (0, 0)  # device and inode of the folder above an outside tree

    @property
    def id(self) -> str:
        return tree_id(self.tree)

    def path(self, root: Path) -> Path:
        """Where the tree is."""
        return root / self.tree  # an absolute second part wins

    def encode(self) -> bytes:
        """Columns rather than rows: 100,000 files load in a tenth of a second."""
        entries = list(self.files.values())
        fields = {
            "tree": self.tree,
            "labels": dict(self.labels),
            "staging": [self.staging, self.staging_ino],
            "parent": list(self.parent),
            "paths": list(self.files),
            "digests": join_hex(entry.digest for entry in entries),
            "kinds": "".join(entry.kind.value[0] for entry in entries),
            "inodes": [entry.ino for entry in entries],
            "suspect": [path for path, entry in self.files.items() if entry.suspect],
        }
        return encode(_KIND, _VERSION, fields)

    @classmethod
    def decode(cls, raw: bytes) -> Inventory:
        """Raises one of ``records.INVALID`` where the record is torn, altered or of a later version."""
        head = decode(raw, _KIND, version=_VERSION)
        digests, suspect = split_hex(head["digests"]), set(head["suspect"])
        rows = zip(head["paths"], digests, head["kinds"], head["inodes"], strict=True)
        files = {path: InventoryEntry(digest, _KINDS[kind], ino, path in suspect) for path, digest, kind, ino in rows}
        parent = (head["parent"][0], head["parent"][1])
        staging, staging_ino = head["staging"]
        return cls(
            tree=head["tree"],
            labels=head["labels"],
            files=files,
            staging=staging,
            staging_ino=staging_ino,
            parent=parent,
        )


def tree_id(tree: str) -> str:
    """The stable name of a tree in ``state/``: hex digits computed from where it is."""
    return xxhash.xxh3_128_hexdigest(tree.encode("utf-8", "surrogateescape"))


@dataclass(frozen=True, slots=True)
class TreeRecords:
    """The owner of ``state/inventories``: records by tree, as ``Inventory.tree`` names it. Writes are durable on return."""

    folder: Path

    def read(self, tree: str) -> Inventory | None:
        """The inventory of a tree; None where there is none. Raises StoreStateError where it is unreadable, OSError."""
        return read_inventory(self.folder / tree_id(tree))

    def read_intent(self, tree: str) -> Inventory | None:
        """What an unfinished change was to make of a tree. Raises as ``read``."""
        return read_inventory(self.folder / (tree_id(tree) + INTENT))

    def write_intent(self, inventory: Inventory) -> None:
        """Say what a change will make of a tree: its digests are kept from now on, and recovery knows what to finish."""
        write_file(self.folder / (inventory.id + INTENT), inventory.encode(), mode=0o644)

    def drop_intent(self, tree: str) -> None:
        """The change was undone. Not synced: a recovery that finds it again undoes nothing."""
        (self.folder / (tree_id(tree) + INTENT)).unlink(missing_ok=True)

    def commit(self, inventory: Inventory) -> None:
        """The change is done: *inventory* is the tree's, and the intent goes."""
        self.rewrite(inventory)
        self.drop_intent(inventory.tree)

    def rewrite(self, inventory: Inventory) -> None:
        """Change what is recorded of a tree as it is; a change that is under way is left alone."""
        write_file(self.folder / inventory.id, inventory.encode(), mode=0o644)

    def remove(self, tree: str) -> None:
        """Forget a tree."""
        id_ = tree_id(tree)
        for path in (self.folder / (id_ + INTENT), self.folder / id_, self._mark(id_)):
            path.unlink(missing_ok=True)
        fsync_folder(self.folder)

    def forget(self, id_: str) -> bool:
        """Forget a tree by its id, for a user who says so; False where there was none. Not synced."""
        found = False
        for name in (id_, id_ + INTENT):
            with suppress(FileNotFoundError):
                os.unlink(self.folder / name)
                found = True
        return found

    def files(self) -> list[Path]:
        """Every inventory file by name, intents included."""
        try:
            names = sorted(os.listdir(self.folder))
        except FileNotFoundError:
            return []
        return [self.folder / name for name in names if not name.startswith(UNFINISHED)]

    # ---- when a tree was used

    def touch(self, trees: Iterable[str]) -> None:
        """Record the use of trees, for eviction. A store that cannot be written to keeps no such record.

        The mark is a file of its own in ``state/used``: the folder of inventories changes only when a tree does.
        """
        for tree in trees:
            mark = self._mark(tree_id(tree))
            with suppress(OSError):
                try:
                    os.utime(mark)
                except FileNotFoundError:
                    os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644))

    def used_at(self, file: Path) -> float:
        """Seconds since 1970 of the last use or change of the tree whose inventory (or intent) *file* is."""
        times = [0.0]
        for path in (file, self._mark(file.name.removesuffix(INTENT))):
            with suppress(FileNotFoundError):
                times.append(os.stat(path).st_mtime)
        return max(times)

    def _mark(self, id_: str) -> Path:
        return self.folder.parent / "used" / id_


def is_intent(file: Path) -> bool:
    """Whether an inventory file is that of an unfinished change."""
    return file.name.endswith(INTENT)


def read_inventory(path: Path) -> Inventory | None:
    """The inventory in one file; None where there is none. Raises StoreStateError where it is unreadable, OSError."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return Inventory.decode(raw)
    except INVALID as error:
        what = f"inventory {path} cannot be read: {error}"
        raise StoreStateError(what, cause=Cause.INVENTORY_UNREADABLE) from error
