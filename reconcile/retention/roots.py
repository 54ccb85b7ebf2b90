"""Roots: the records that keep blobs (reconciled lockfiles, trees, pins, leases), each with its own copy of the digests.

A root whose tree or lockfile is gone is dead only if the parent folder exists and is the same as when it was recorded;
otherwise (another container, an unmounted disk) it is unverifiable and keeps its blobs. A root that cannot be read stops
garbage collection.
"""

from __future__ import annotations

import enum
import os
import stat
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from modelstow.cas import BlobStore, Digest, StoreStateError, leases, presence, tree
from modelstow.cas.durable import write_file
from modelstow.cas.inventory import Inventory, is_intent, tree_id
from modelstow.cas.records import INVALID, check_path, decode, encode, files_in, join_hex, read_root, split_hex
from modelstow.cas.untrusted import read_state

from ..desired.selectors import PINNED, VariantId, labels_by_variant
from ..planning.state import TreeKey
from ..state_dirs import ROOTS
from . import pins
from .pins import Pin

_KIND, _VERSION = "lockfile", 1


class RootState(enum.StrEnum):
    """Whether the tree or lockfile of a root exists; unverifiable where that cannot be known."""

    ALIVE = "alive"
    DEAD = "dead"
    UNVERIFIABLE = "unverifiable"


@dataclass(frozen=True, slots=True, kw_only=True)
class LockfileRoot:
    """The root of a lockfile that was reconciled. ``trees`` maps each variant to a fingerprint of its content."""

    path: str  # absolute
    text: str  # sha256 of the lockfile's text, hex
    parent: tuple[int, int]  # device and inode of its parent folder
    trees: Mapping[VariantId, str] = field(default_factory=dict)
    pinned: tuple[VariantId, ...] = ()
    digests: frozenset[Digest] = frozenset()

    @property
    def id(self) -> str:
        """The name of its record, as `gc --forget` takes it."""
        return tree_id(self.path)

    def encode(self) -> bytes:
        """The record as stored."""
        head = {
            "path": self.path,
            "text": self.text,
            "parent": list(self.parent),
            "trees": {str(id_): content for id_, content in sorted(self.trees.items())},
            "pinned": list(map(str, self.pinned)),
            "digests": join_hex(sorted(self.digests)),
        }
        return encode(_KIND, _VERSION, head)

    @classmethod
    def decode(cls, raw: bytes) -> LockfileRoot:
        """The root in a record. Raises one of ``records.INVALID``."""
        head = decode(raw, _KIND, version=_VERSION)
        check_path(head["path"])
        return cls(
            path=head["path"],
            text=head["text"],
            parent=(head["parent"][0], head["parent"][1]),
            trees={VariantId.parse(name): content for name, content in head["trees"].items()},
            pinned=tuple(map(VariantId.parse, head["pinned"])),
            digests=frozenset(split_hex(head["digests"])),
        )

    @property
    def state(self) -> RootState:
        """Whether the lockfile exists now, by stat."""
        return _root_state(Path(self.path), self.parent)


def _root_state(path: Path, parent: tuple[int, int]) -> RootState:
    try:
        if presence.exists(path):
            return RootState.ALIVE
        found = os.stat(path.parent)
    except OSError:
        return RootState.UNVERIFIABLE
    return RootState.DEAD if (found.st_dev, found.st_ino) == tuple(parent) else RootState.UNVERIFIABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeRoot:
    """The root of a tree: its inventory, or the intent of an unfinished change."""

    record: Inventory
    file: Path  # that holds the record
    state: RootState
    used_at: float  # the last recorded use, in seconds since 1970

    @property
    def unfinished(self) -> bool:
        """Whether it is the intent of a change that is under way or was interrupted."""
        return is_intent(self.file)

    @property
    def is_dead(self) -> bool:
        """Whether it keeps nothing: its tree is gone; an intent without a tree keeps its blobs for a week."""
        if self.state is not RootState.DEAD:
            return False
        return not self.unfinished or time.time() - self.used_at > leases.UNFINISHED_S

    @property
    def key(self) -> TreeKey:
        """The identity of the tree."""
        return TreeKey.of(self.record)

    @property
    def digests(self) -> frozenset[Digest]:
        """The blobs of its files."""
        return self.record.digests


@dataclass(frozen=True, slots=True, kw_only=True)
class Roots:
    """All roots of a store, read at one time."""

    lockfiles: tuple[LockfileRoot, ...]
    trees: tuple[TreeRoot, ...]
    pins: tuple[Pin, ...]
    leased: tuple[leases.LeaseRecord, ...]
    inodes: Mapping[str, int]  # of every file below models/, recorded or not, by path relative to the store
    stamps: frozenset[tuple[int, int]]  # (size in bytes, mtime in ns) of files below models/ without a record

    def live(self, store: BlobStore, *, lockfiles: bool = True, without: frozenset[str] = frozenset()) -> frozenset[Digest]:
        """The mark of garbage collection: every digest that must stay.

        *lockfiles* says whether a lockfile alone keeps its blobs; *without* names trees (``Inventory.tree``) to leave out.
        """
        live: set[Digest] = set()
        for _, digests in self._roots(lockfiles=lockfiles, without=without):
            live |= digests
        inodes = {ino for path, ino in self.inodes.items() if not without or not _is_below(path, without)}
        for digest, entry in store.blobs.entries():
            if entry.inode() in inodes:
                live.add(digest)
            elif self.stamps:
                try:
                    size = os.lstat(entry.path).st_size
                except FileNotFoundError:
                    continue
                if (size, digest.mtime * 1_000_000_000) in self.stamps:
                    live.add(digest)
        return frozenset(live)

    def reasons(self, digests: frozenset[Digest]) -> list[str]:
        """What keeps any of these blobs, one phrase for each root."""
        return [reason for reason, kept in self._roots(lockfiles=True) if not kept.isdisjoint(digests)]

    def holds_any_inode(self, inodes: Iterable[int]) -> bool:
        """Whether a file below models/ is one of these inodes, recorded or not."""
        return not frozenset(self.inodes.values()).isdisjoint(inodes)

    def named_by_lockfiles(self) -> frozenset[Digest]:
        """The blobs that registered lockfiles name."""
        return frozenset(digest for root in self.lockfiles if root.state is not RootState.DEAD for digest in root.digests)

    def pinned(self) -> frozenset[VariantId]:
        """The variants that the user or the manifest pins."""
        by_label = (labels_by_variant(root.record.labels).items() for root in self.trees)
        by_manifest = {id_ for rows in by_label for id_, labels in rows if PINNED in labels}
        by_manifest |= {id_ for root in self.lockfiles for id_ in root.pinned}
        return frozenset(pin.id for pin in self.pins) | by_manifest

    def _roots(self, *, lockfiles: bool, without: frozenset[str] = frozenset()) -> Iterator[tuple[str, frozenset[Digest]]]:
        """Each root that counts, described in a phrase, with the digests that it keeps."""
        for tree_root in self.trees:
            if tree_root.is_dead or tree_root.record.tree in without:
                continue
            yield f"tree {tree_root.record.tree}{_state_suffix(tree_root.state)}", tree_root.digests
        for pin in self.pins:
            yield f"pin {pin.id}", pin.digests
        for record in self.leased:
            yield f"lease ({record.doing})", record.digests
        for root in self.lockfiles:
            if lockfiles and root.state is not RootState.DEAD:
                yield f"lockfile {root.path}{_state_suffix(root.state)}", root.digests


def _state_suffix(state: RootState) -> str:
    return "" if state is RootState.ALIVE else f" ({state})"


def read(store: BlobStore) -> Roots:
    """All roots of a store. Raises StoreStateError where one cannot be read, OSError."""
    layout, trees = store.layout, read_trees(store)
    recorded = {str(root.record.path(layout.root)) for root in trees}
    inodes, stamps = _below_models(layout.trees, recorded)
    return Roots(
        lockfiles=tuple(_read_lockfiles(store)),
        trees=tuple(trees),
        pins=tuple(pins.read(store)),
        leased=tuple(record for _, record, _ in leases.active(store)),
        inodes=inodes,
        stamps=stamps,
    )


OnUnreadable = Callable[[StoreStateError], object]
"""Hears of a root that cannot be read, which is passed over then: that stops garbage collection, and nothing else."""


def read_trees(store: BlobStore, *, on_unreadable: OnUnreadable | None = None) -> list[TreeRoot]:
    """The roots of all trees. Raises StoreStateError for one that cannot be read, unless *on_unreadable* hears of it."""
    trees = []
    for file in store.trees.files():
        try:
            trees.append(read_tree(store, file))
        except FileNotFoundError:
            continue
        except StoreStateError as error:
            if on_unreadable is None:
                raise
            on_unreadable(error)
    return trees


def read_tree(store: BlobStore, file: Path) -> TreeRoot:
    """The root in an inventory file. Raises FileNotFoundError where it was removed, StoreStateError, OSError."""
    record = store.trees.read_file(file)
    if record is None:
        raise FileNotFoundError(file)
    TreeKey.of(record)  # or it names no variants
    used_at = store.trees.used_at(file)
    return TreeRoot(record=record, file=file, used_at=used_at, state=_tree_state(record, store.layout.root))


def stamp(store: BlobStore) -> tuple[object, ...]:
    """A value that differs whenever a root was added, changed or removed; cheaper than reading them all again."""
    layout = store.layout
    rows: list[object] = []
    for folder in (layout.state_dir(ROOTS), layout.inventories, layout.pins, layout.leases):
        try:
            names = sorted(os.listdir(folder))
        except FileNotFoundError:
            continue
        for name in names:
            if (found := presence.look(folder / name)) is not None:
                rows.append((name, found.st_mtime_ns, found.st_ino))
    return tuple(rows)


def _tree_state(record: Inventory, root: Path) -> RootState:
    if os.path.isabs(record.tree):
        return _root_state(Path(record.tree), record.parent)
    path = root / record.tree
    try:
        while path != root and not presence.exists(path):
            path = path.parent
        found = os.stat(path)  # where a symlink leads to a disk that is not there now, this fails
    except OSError:
        return RootState.UNVERIFIABLE
    return RootState.ALIVE if path == root / record.tree and stat.S_ISDIR(found.st_mode) else RootState.DEAD


def _is_below(path: str, folders: Container[str]) -> bool:
    """Whether *folders* holds a folder above *path*, in as many lookups as *path* is deep."""
    above = path.rpartition("/")[0]
    while above and above not in folders:
        above = above.rpartition("/")[0]
    return bool(above)


def _below_models(models: Path, recorded: set[str]) -> tuple[dict[str, int], frozenset[tuple[int, int]]]:
    """The inodes of all files below models/, and the stamps of those that no record names."""
    found = tree.scan(models) or tree.Scan()
    inodes = {f"models/{path}": ino for path, ino in found.files.items()}
    stamps = set()
    for path in found.files:
        full = f"{models}/{path}"
        if not _is_below(full, recorded):
            try:
                status = os.lstat(full)
            except FileNotFoundError:
                continue  # a staged file that was published meanwhile
            stamps.add((status.st_size, status.st_mtime_ns))
            if stat.S_ISLNK(status.st_mode):
                with suppress(OSError):
                    inodes[f"models/{path}"] = os.stat(full).st_ino
    return inodes, frozenset(stamps)


def _read_lockfiles(
    store: BlobStore, *, but: str = "", on_unreadable: OnUnreadable | None = None
) -> Iterator[LockfileRoot]:
    for path in files_in(store.layout.state_dir(ROOTS)):

        def named(raw: bytes, name: str = path.name) -> LockfileRoot:
            root = LockfileRoot.decode(raw)
            if root.id != name:
                raise ValueError("it is the record of another lockfile")
            return root

        if path.name == but:
            continue
        try:
            root = read_root(path, named, store.writers)
        except StoreStateError as error:
            if on_unreadable is None:
                raise
            on_unreadable(error)
        else:
            if root is not None:
                yield root


def read_lockfile_roots(
    store: BlobStore, *, but: Path | None = None, on_unreadable: OnUnreadable | None = None
) -> list[LockfileRoot]:
    """The registered lockfiles except the one at *but*, whose record may be torn.

    Raises StoreStateError for one that cannot be read; with *on_unreadable* that is called, and the others are returned.
    """
    skipped = "" if but is None else tree_id(str(but))
    return list(_read_lockfiles(store, but=skipped, on_unreadable=on_unreadable))


# ---- writing records


def read_lockfile_root(store: BlobStore, lockfile: Path) -> LockfileRoot | None:
    """The root of one lockfile; None where it is not registered or its record is torn (and so will be written again)."""
    try:
        return LockfileRoot.decode(read_state(store.layout.state_dir(ROOTS) / tree_id(str(lockfile)), store.writers))
    except (OSError, *INVALID):
        return None


def register_lockfile(store: BlobStore, root: LockfileRoot) -> None:
    """Register a reconciled lockfile as a root. Durable on return. A lost ``state/`` counts as restored from then on."""
    write_file(store.make_state_dir(ROOTS) / root.id, root.encode())
    if epoch(store) != store.config.epoch:
        write_file(store.layout.epoch, store.config.epoch.encode())
    store.remove_temp_files()


def epoch(store: BlobStore) -> str:
    """The epoch that ``state/`` carries; empty where ``state/`` was lost."""
    try:
        return read_state(store.layout.epoch, store.writers, most=4096).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def accept_loss(store: BlobStore) -> None:
    """Accept the roots that are left after ``state/`` was lost. Durable on return."""
    write_file(store.layout.epoch, store.config.epoch.encode())


def forget(store: BlobStore, id_: str) -> bool:
    """Remove a root by its id; False where there is none."""
    if os.path.basename(id_) != id_:
        return False
    found = store.trees.forget(id_)
    for folder in (store.layout.state_dir(ROOTS), store.layout.pins, store.layout.leases):
        with suppress(FileNotFoundError, IsADirectoryError):  # whatever has its name, but no folder
            os.unlink(folder / id_)
            found = True
    return found
