"""Reasons to keep a blob: reconciled lockfiles, trees, pins, leases. Each keeps its own copy of the digests.

A root whose tree or lockfile is gone is dead only if the folder above is there and is the same as when it was recorded;
otherwise (another container, an unmounted disk) it is unverifiable and keeps its blobs. A root that cannot be read stops
garbage collection altogether.
"""

from __future__ import annotations

import enum
import os
import stat
import time
from collections.abc import Container, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from modelstow.cas import BlobStore, Digest, leases, tree
from modelstow.cas.durable import write_file
from modelstow.cas.inventory import Inventory, is_intent, read_inventory, tree_id
from modelstow.cas.records import INVALID, decode, encode, files_in, join_hex, split_hex, unreadable

from ..desired.selectors import PINNED
from ..planning.state import TreeKey
from ..state_dirs import ROOTS
from . import pins
from .pins import Pin

_KIND, _VERSION = "lockfile", 1


class RootState(enum.StrEnum):
    """Whether what a root stands for is there."""

    ALIVE = "alive"
    DEAD = "dead"
    UNVERIFIABLE = "unverifiable"


@dataclass(frozen=True, slots=True, kw_only=True)
class LockRoot:
    """A lockfile that was reconciled. ``trees`` maps name@version#variant to the fingerprint of its content."""

    path: str  # absolute
    text: str  # sha256 of the lockfile's text, hex
    parent: tuple[int, int]  # device and inode of its folder
    trees: Mapping[str, str] = field(default_factory=dict)
    pinned: tuple[str, ...] = ()
    digests: frozenset[Digest] = frozenset()

    @property
    def id(self) -> str:
        return tree_id(self.path)

    def encode(self) -> bytes:
        head = {
            "path": self.path,
            "text": self.text,
            "parent": list(self.parent),
            "trees": dict(sorted(self.trees.items())),
            "pinned": list(self.pinned),
            "digests": join_hex(sorted(self.digests)),
        }
        return encode(_KIND, _VERSION, head)

    @classmethod
    def decode(cls, raw: bytes) -> LockRoot:
        """Raises one of ``records.INVALID``."""
        head = decode(raw, _KIND, version=_VERSION)
        return cls(
            path=head["path"],
            text=head["text"],
            parent=(head["parent"][0], head["parent"][1]),
            trees=head["trees"],
            pinned=tuple(head["pinned"]),
            digests=frozenset(split_hex(head["digests"])),
        )

    @property
    def state(self) -> RootState:
        return _root_state(Path(self.path), self.parent)


def _root_state(path: Path, parent: tuple[int, int]) -> RootState:
    if os.path.lexists(path):
        return RootState.ALIVE
    try:
        found = os.stat(path.parent)
    except OSError:
        return RootState.UNVERIFIABLE
    return RootState.DEAD if (found.st_dev, found.st_ino) == tuple(parent) else RootState.UNVERIFIABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeRoot:
    """A tree with its inventory (or that of an unfinished change) and the file that holds it."""

    record: Inventory
    file: Path
    state: RootState

    @property
    def unfinished(self) -> bool:
        return is_intent(self.file)

    @property
    def is_dead(self) -> bool:
        """Whether it keeps nothing: its tree is gone; if that tree was only announced, for a week."""
        if self.state is not RootState.DEAD:
            return False
        return not self.unfinished or time.time() - self.used_at > leases.UNFINISHED_S

    @property
    def key(self) -> TreeKey:
        return TreeKey.of(self.record)

    @property
    def name(self) -> str:
        return str(self.key)

    @property
    def digests(self) -> frozenset[Digest]:
        """The blobs that the tree was made of."""
        return frozenset(entry.digest for entry in self.record.files.values())

    @property
    def used_at(self) -> float:
        """Seconds since 1970 of the last use on record."""
        try:
            return self.file.stat().st_mtime
        except FileNotFoundError:
            return 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Roots:
    """Everything that keeps blobs, as read at one moment."""

    locks: tuple[LockRoot, ...]
    trees: tuple[TreeRoot, ...]
    pins: tuple[Pin, ...]
    leased: tuple[leases.LeaseRecord, ...]
    inodes: Mapping[str, int]  # of every file below models/, recorded or not, by path relative to the store
    proofs: frozenset[tuple[int, int]]  # (size, mtime in ns) of files of trees that have no record

    def live(self, store: BlobStore, *, lockfiles: bool = True, without: frozenset[str] = frozenset()) -> frozenset[Digest]:
        """Every digest that must stay. *lockfiles*: whether a lockfile alone keeps anything; *without*: trees that go."""
        live: set[Digest] = set()
        for _, digests in self._named(lockfiles=lockfiles, without=without):
            live |= digests
        inodes = {ino for path, ino in self.inodes.items() if not without or not _is_below(path, without)}
        for digest, entry in store.blobs.entries():
            if entry.inode() in inodes:
                live.add(digest)
            elif self.proofs:
                try:
                    size = os.lstat(entry.path).st_size
                except FileNotFoundError:
                    continue
                if (size, digest.mtime * 1_000_000_000) in self.proofs:
                    live.add(digest)
        return frozenset(live)

    def reasons(self, digest: Digest) -> list[str]:
        """What keeps one blob, in words."""
        return [what for what, digests in self._named(lockfiles=True) if digest in digests]

    def holds_inode(self, ino: int) -> bool:
        """Whether a file below models/ is this inode, whoever put it there."""
        return ino in self.inodes.values()

    def named_by_lockfiles(self) -> frozenset[Digest]:
        """What registered lockfiles name."""
        return frozenset(digest for root in self.locks if root.state is not RootState.DEAD for digest in root.digests)

    def pinned(self) -> frozenset[str]:
        """The variants that are pinned, by user or manifest: name@version#variant."""
        by_manifest = {root.name for root in self.trees if PINNED in root.record.labels}
        by_manifest |= {name for root in self.locks for name in root.pinned}
        return frozenset(pin.name for pin in self.pins) | by_manifest

    def _named(self, *, lockfiles: bool, without: frozenset[str] = frozenset()) -> Iterator[tuple[str, frozenset[Digest]]]:
        for tree_root in self.trees:
            if tree_root.is_dead or tree_root.record.tree in without:
                continue
            shown = "" if tree_root.state is RootState.ALIVE else f" ({tree_root.state})"
            yield f"tree {tree_root.record.tree}{shown}", tree_root.digests
        for pin in self.pins:
            yield f"pin {pin.name}", pin.digests
        for record in self.leased:
            yield f"lease ({record.doing})", record.digests
        for root in self.locks:
            if lockfiles and root.state is not RootState.DEAD:
                shown = "" if root.state is RootState.ALIVE else f" ({root.state})"
                yield f"lockfile {root.path}{shown}", root.digests


def read(store: BlobStore) -> Roots:
    """Read every root. Raises StoreStateError where one cannot be believed, OSError."""
    layout = store.layout
    trees = []
    for file in store.trees.files():
        with suppress(FileNotFoundError):
            trees.append(read_tree(store, file))
    recorded = {str(root.record.path(layout.root)) for root in trees}
    inodes, proofs = _below_models(layout.trees, recorded)
    return Roots(
        locks=tuple(_read_locks(layout.state_dir(ROOTS))),
        trees=tuple(trees),
        pins=tuple(pins.read(layout.pins)),
        leased=tuple(record for _, record, _ in leases.active(store)),
        inodes=inodes,
        proofs=proofs,
    )


def read_tree(store: BlobStore, file: Path) -> TreeRoot:
    """The root that an inventory file is. Raises FileNotFoundError where it went, StoreStateError, OSError."""
    record = read_inventory(file)
    if record is None:
        raise FileNotFoundError(file)
    return TreeRoot(record=record, file=file, state=_tree_state(record, store.layout.root))


def stamp(store: BlobStore) -> tuple[object, ...]:
    """Changes whenever a root comes or goes; cheaper than reading them all again."""
    layout = store.layout
    rows: list[object] = []
    for folder in (layout.state_dir(ROOTS), layout.inventories, layout.pins, layout.leases):
        try:
            with os.scandir(folder) as entries:
                rows += sorted((entry.path, entry.stat().st_mtime_ns, entry.inode()) for entry in entries)
        except FileNotFoundError:
            continue
    return tuple(rows)


def _tree_state(record: Inventory, root: Path) -> RootState:
    if os.path.isabs(record.tree):
        return _root_state(Path(record.tree), record.parent)
    return RootState.ALIVE if (root / record.tree).is_dir() else RootState.DEAD


def _is_below(path: str, folders: Container[str]) -> bool:
    """Whether one of the folders above *path* is among *folders*: as many lookups as it is deep, however many there are."""
    above = path.rpartition("/")[0]
    while above and above not in folders:
        above = above.rpartition("/")[0]
    return bool(above)


def _below_models(models: Path, recorded: set[str]) -> tuple[dict[str, int], frozenset[tuple[int, int]]]:
    found = tree.scan(models) or tree.Scan()
    inodes = {f"models/{path}": ino for path, ino in found.files.items()}
    proofs = set()
    for path in found.files:
        full = f"{models}/{path}"
        if not _is_below(full, recorded):
            try:
                there = os.lstat(full)
            except FileNotFoundError:
                continue  # a staged file: it was just published under another name
            proofs.add((there.st_size, there.st_mtime_ns))
            if stat.S_ISLNK(there.st_mode):
                with suppress(OSError):
                    inodes[f"models/{path}"] = os.stat(full).st_ino
    return inodes, frozenset(proofs)


def _read_locks(folder: Path, *, but: str = "") -> Iterator[LockRoot]:
    for path, raw in files_in(folder):
        if path.name == but:
            continue
        try:
            yield LockRoot.decode(raw)
        except INVALID as error:
            raise unreadable(path, error) from error


def read_lock_roots(store: BlobStore, *, but: Path | None = None) -> list[LockRoot]:
    """The lockfiles on record, without the one at *but*: its own record may be torn. Raises StoreStateError, OSError."""
    skipped = "" if but is None else tree_id(str(but))
    return list(_read_locks(store.layout.state_dir(ROOTS), but=skipped))


# ---- keeping the record


def read_lock_root(store: BlobStore, lockfile: Path) -> LockRoot | None:
    """The root of one lockfile; None where it is not registered or its record is torn (it is then written anew)."""
    try:
        return LockRoot.decode((store.layout.state_dir(ROOTS) / tree_id(str(lockfile))).read_bytes())
    except (OSError, *INVALID):
        return None


def register_lock(store: BlobStore, root: LockRoot) -> None:
    """Put a reconciled lockfile on record. Durable on return. A store that lost its state is whole again after this."""
    write_file(store.make_state_dir(ROOTS) / root.id, root.encode())
    if epoch(store) != store.config.epoch:
        write_file(store.layout.epoch, store.config.epoch.encode())
    store.remove_temp_files()


def epoch(store: BlobStore) -> str:
    """The epoch that ``state/`` carries; empty where it was lost."""
    try:
        return store.layout.epoch.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def accept_loss(store: BlobStore) -> None:
    """Go on with what roots there are, after ``state/`` was lost."""
    write_file(store.layout.epoch, store.config.epoch.encode())


def forget(store: BlobStore, id_: str) -> bool:
    """Remove one root by its id; False if there is none."""
    found = store.trees.forget(id_)
    for folder in (store.layout.state_dir(ROOTS), store.layout.pins, store.layout.leases):
        if (folder / id_).parent == folder and (folder / id_).is_file():
            (folder / id_).unlink()
            found = True
    return found
