"""Inventories: one record for each tree of what was put there, replaced by a rename, as git's index is.

An inventory is also the tree's root for garbage collection. It is durable before the tree appears: while a tree is being
changed, the *intent* says what it will be (``<id>.next``); once it is done, ``<id>`` says what it is.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from . import presence
from .digest import Digest
from .durable import fsync_folder, write_file
from .entries import Entry, Inline, Other, Symlink
from .errors import Cause, StoreStateError
from .links import LinkKind, kind_of
from .records import INVALID, check_hex, check_path, decode, encode, files_in, join_hex, reason
from .untrusted import EVERYBODY, Writers, read_owned

INTENT = ".next"
"""What the file of an intent ends in."""
STAGING = ".modelstow"
"""What the name of a staging folder ends in."""
_KIND, _VERSION = "inventory", 1
_KINDS = {kind.value[0]: kind for kind in LinkKind}  # one letter a kind: h r s c e i l
_CREATED = frozenset("il")  # the letters of what is no blob, and given in full
_NO_OTHERS: Mapping[str, Other] = {}


@dataclass(frozen=True, slots=True)
class InventoryEntry:
    """One path of a tree. ``suspect``: a verification found its own bytes damaged (copies only)."""

    digest: Digest
    kind: LinkKind
    ino: int  # 0 where it was recorded before the file was made
    suspect: bool = False
    other: Other | None = None  # instead of a blob; the digest is then that of zero bytes

    @property
    def entry(self) -> Entry:
        """What was put there."""
        return self.other or self.digest


class EntryColumns(Mapping[str, InventoryEntry]):
    """The files of a tree as columns, as they are on disk: an entry is made when one is asked for.

    100,000 entries as objects take 40 MB and a fifth of a second; most readers want one column, or a few paths.
    """

    __slots__ = ("_entries", "_rows", "digests", "inodes", "kinds", "others", "paths", "suspect")

    def __init__(
        self,
        paths: Sequence[str],
        digests: str,
        kinds: str,
        inodes: Sequence[int],
        suspect: Iterable[str] = (),
        others: Mapping[str, Other] = _NO_OTHERS,
    ) -> None:
        """*digests*: 64 hex digits a path; *kinds*: one letter a path; *others*: by path, what is no blob.

        Raises ValueError where they do not fit together.
        """
        lengths, letters = {len(paths), len(digests) / 64, len(kinds), len(inodes)}, set(kinds)
        if len(lengths) > 1 or not _KINDS.keys() >= letters:
            raise ValueError("its columns do not fit together")
        if others or letters & _CREATED:
            created = {path: letter for path, letter in zip(paths, kinds, strict=True) if letter in _CREATED}
            if created != {path: kind_of(other).value[0] for path, other in others.items()}:
                raise ValueError("its symlinks and inline files are not those of its columns")
        self.paths, self.digests, self.kinds, self.inodes, self.suspect = paths, digests, kinds, inodes, frozenset(suspect)
        self.others = others
        self._rows: dict[str, int] | None = None
        self._entries: dict[str, InventoryEntry] | None = None

    @classmethod
    def of(cls, files: Mapping[str, InventoryEntry]) -> EntryColumns:
        """The columns of any mapping of entries."""
        if isinstance(files, EntryColumns):
            return files
        entries = files.values()
        return cls(
            list(files),
            join_hex(entry.digest for entry in entries),
            "".join(entry.kind.value[0] for entry in entries),
            [entry.ino for entry in entries],
            [path for path, entry in files.items() if entry.suspect],
            {path: entry.other for path, entry in files.items() if entry.other},
        )

    def hex(self, row: int) -> str:
        """The digest of a row, 64 hex digits."""
        return self.digests[64 * row : 64 * row + 64]

    def count(self) -> Counter[LinkKind]:
        """The number of files of each kind."""
        return Counter({_KINDS[letter]: count for letter, count in Counter(self.kinds).items()})

    def _entry(self, row: int) -> InventoryEntry:
        path, kind = self.paths[row], _KINDS[self.kinds[row]]
        other = self.others.get(path)
        return InventoryEntry(Digest.of_hex(self.hex(row)), kind, self.inodes[row], path in self.suspect, other)

    def _by_path(self) -> dict[str, int]:
        if self._rows is None:
            self._rows = {path: row for row, path in enumerate(self.paths)}
        return self._rows

    def _all(self) -> dict[str, InventoryEntry]:
        if self._entries is None:
            self._entries = {path: self._entry(row) for path, row in self._by_path().items()}
        return self._entries

    def __getitem__(self, path: str) -> InventoryEntry:
        return self._entry(self._by_path()[path])

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_path())

    def __len__(self) -> int:
        return len(self._by_path())

    def __contains__(self, path: object) -> bool:
        return path in self._by_path()

    def keys(self) -> KeysView[str]:
        return self._by_path().keys()

    def values(self) -> ValuesView[InventoryEntry]:
        return self._all().values()

    def items(self) -> ItemsView[str, InventoryEntry]:
        return self._all().items()


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """The record of one tree. ``tree`` is relative to the store, absolute for others; ``labels`` are the caller's."""

    tree: str
    labels: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, InventoryEntry] = field(default_factory=dict)
    staging: str = ""  # what an intent said: the folder next to the tree with the new one, and after publishing the old
    staging_ino: int = 0  # the new folder's inode: by which the two are told apart
    parent: tuple[int, int] = (0, 0)  # device and inode of the folder above an outside tree
    writer: int | None = field(default=None, compare=False)  # the user whose file it was read from

    @property
    def id(self) -> str:
        return tree_id(self.tree)

    @property
    def digests(self) -> frozenset[Digest]:
        """The blobs of its files, computed at each call."""
        columns = EntryColumns.of(self.files)
        return frozenset(map(Digest.of_hex, set(map(columns.hex, range(len(columns.paths))))))

    @property
    def others(self) -> Mapping[str, Other]:
        """Its entries that are no blobs, by path."""
        return EntryColumns.of(self.files).others

    def path(self, root: Path) -> Path:
        """The path of the tree."""
        return root / self.tree  # an absolute second part wins

    def encode(self) -> bytes:
        """The record's bytes, as ``docs/format.md`` says."""
        columns = EntryColumns.of(self.files)
        fields: dict[str, object] = {
            "tree": self.tree,
            "labels": dict(self.labels),
            "staging": [self.staging, self.staging_ino],
            "parent": list(self.parent),
            "paths": columns.paths,
            "digests": columns.digests,
            "kinds": columns.kinds,
            "inodes": columns.inodes,
            "suspect": sorted(columns.suspect),
        }
        if columns.others:
            others = columns.others.items()
            fields["symlinks"] = {path: other.target for path, other in others if isinstance(other, Symlink)}
            inline = {path: other.content for path, other in others if isinstance(other, Inline)}
            fields["inline"] = {path: content.decode("utf-8", "surrogateescape") for path, content in inline.items()}
        return encode(_KIND, _VERSION, fields)

    @classmethod
    def decode(cls, raw: bytes) -> Inventory:
        """The inventory in a record. Raises one of ``records.INVALID`` if it is torn, altered or of a later version."""
        head = decode(raw, _KIND, version=_VERSION)
        _check(head)
        others: dict[str, Other] = {path: Symlink(target) for path, target in head.get("symlinks", {}).items()}
        for path, text in head.get("inline", {}).items():
            others[path] = Inline(text.encode("utf-8", "surrogateescape"))
        files = EntryColumns(head["paths"], head["digests"], head["kinds"], head["inodes"], head["suspect"], others)
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


def _check(head: Mapping[str, Any]) -> None:
    """Raises one of ``INVALID`` for a record that would lead out of its tree, or of the folder above.

    Whoever may write into ``state/`` can lay one, and what it names is linked, moved and unlinked. The rules are weaker
    than those of a lockfile, since an earlier version may have had others.
    """
    tree, (staging, _) = head["tree"], head["staging"]
    if tree.startswith("models/"):
        check_path("/" + tree)
    else:
        check_path(tree)
    name = tree.rpartition("/")[2]
    if staging and not re.fullmatch(rf"\.{re.escape(name)}\.[0-9a-f]+{re.escape(STAGING)}", staging):
        raise ValueError(f"{staging[:80]!a} is not the name of a staging folder of {name!a}")
    check_hex(head["digests"])
    paths = f"/{'/'.join(head['paths'])}/" if head["paths"] else ""  # one search for all of them
    if "\0" in paths or "//" in paths or ("/." in paths and ("/../" in paths or "/./" in paths)):
        raise ValueError("it has a path that leads out of its tree")
    paths.encode("utf-8", "surrogateescape")
    numbers = {*map(type, head["inodes"]), *map(type, (head["staging"][1], *head["parent"]))}
    texts = {*map(type, head["labels"].values()), *map(type, head.get("symlinks", {}).values())}
    if numbers != {int} or not texts <= {str}:
        raise ValueError("it has values of the wrong type")


@dataclass(frozen=True, slots=True)
class TreeRecords:
    """The owner of ``state/inventories``: records by tree, as ``Inventory.tree`` names it. Writes are durable on return."""

    folder: Path
    writers: Writers = EVERYBODY

    def read(self, tree: str) -> Inventory | None:
        """The inventory of a tree; None where there is none. Raises StoreStateError where it is unreadable.

        Another user's word on a tree outside the store counts for nothing: what he calls managed is this user's.
        """
        record = self.read_file(self.folder / tree_id(tree))
        return record if record is None or self.may_change(record) else None

    def read_intent(self, tree: str) -> Inventory | None:
        """The intent of an unfinished change of a tree, also of another user; None if there is none. Raises as ``read``."""
        file = self.folder / (tree_id(tree) + INTENT)
        try:
            return self.read_file(file)
        except StoreStateError:
            found = presence.look(file)
            if found is None or self.writers.mine is None or found.st_uid in self.writers.mine:
                raise
            return Inventory(tree=tree, writer=found.st_uid)  # whatever it says, it is not acted on

    def read_file(self, file: Path) -> Inventory | None:
        """The inventory or intent in one of ``files``; None where it is gone. Raises as ``read``."""
        record = read_inventory(file, self.writers)
        if record is not None and record.id != file.name.removesuffix(INTENT):
            raise _unreadable(file, ValueError("it is the record of another tree"))
        return record

    def may_change(self, record: Inventory) -> bool:
        """Whether its tree may be changed on its word: it is in the store, or this user's own record."""
        return not os.path.isabs(record.tree) or self.is_mine(record)

    def is_mine(self, record: Inventory) -> bool:
        """Whether this user, or root, wrote a record."""
        return self.writers.mine is None or record.writer is None or record.writer in self.writers.mine

    def write_intent(self, inventory: Inventory) -> None:
        """Record the intent of a change: its digests are kept from now on, and recovery knows what to finish."""
        write_file(self.folder / (inventory.id + INTENT), inventory.encode(), mode=0o644)

    def drop_intent(self, tree: str) -> None:
        """Remove the intent of a change that was undone. Not synced: a recovery that finds it again undoes nothing."""
        (self.folder / (tree_id(tree) + INTENT)).unlink(missing_ok=True)

    def commit(self, inventory: Inventory) -> None:
        """Record the end of a change: write the tree's inventory and remove the intent."""
        self.rewrite(inventory)
        self.drop_intent(inventory.tree)

    def commit_intent(self, tree: str) -> None:
        """Make the intent of a complete change the tree's inventory, by a rename. Durable on return."""
        id_ = tree_id(tree)
        os.rename(self.folder / (id_ + INTENT), self.folder / id_)
        fsync_folder(self.folder)

    def rewrite(self, inventory: Inventory) -> None:
        """Replace the inventory of a tree; the intent of a change under way stays."""
        write_file(self.folder / inventory.id, inventory.encode(), mode=0o644)

    def remove(self, tree: str) -> None:
        """Remove every record of a tree."""
        id_ = tree_id(tree)
        for path in (self.folder / (id_ + INTENT), self.folder / id_, self._mark(id_)):
            path.unlink(missing_ok=True)
        fsync_folder(self.folder)

    def forget(self, id_: str) -> bool:
        """Remove a tree's records by its id, at a user's request; False where there were none. Not synced."""
        found = False
        for name in (id_, id_ + INTENT):
            with suppress(FileNotFoundError):
                os.unlink(self.folder / name)
                found = True
        return found

    def files(self) -> list[Path]:
        """Every inventory file by name, intents included."""
        return files_in(self.folder)

    # ---- when a tree was used

    def touch(self, trees: Iterable[str]) -> None:
        """Record the use of trees, for eviction. A store that cannot be written to keeps no such record.

        The mark is a file of its own in ``state/used``: the folder of inventories changes only when a tree does.
        """
        for tree in trees:
            mark = self._mark(tree_id(tree))
            with suppress(OSError):
                try:
                    os.utime(mark, follow_symlinks=False)
                except FileNotFoundError:
                    os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644))

    def used_at(self, file: Path) -> float:
        """Seconds since 1970 of the last use or change of the tree whose inventory (or intent) *file* is."""
        times = [0.0]
        for path in (file, self._mark(file.name.removesuffix(INTENT))):
            with suppress(FileNotFoundError):
                times.append(os.lstat(path).st_mtime)
        return max(times)

    def _mark(self, id_: str) -> Path:
        return self.folder.parent / "used" / id_


def is_intent(file: Path) -> bool:
    """Whether an inventory file is that of an unfinished change."""
    return file.name.endswith(INTENT)


def read_inventory(path: Path, writers: Writers = EVERYBODY) -> Inventory | None:
    """The inventory in one file; None where there is none. Raises StoreStateError where it is unreadable."""
    try:
        raw, writer = read_owned(path, writers)
        return replace(Inventory.decode(raw), writer=writer)
    except FileNotFoundError:
        return None
    except (OSError, *INVALID) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> StoreStateError:
    return StoreStateError(f"inventory {path} cannot be read: {reason(error)}", cause=Cause.INVENTORY_UNREADABLE)
