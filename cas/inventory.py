"""What modelstow put into a tree: one checksummed file per tree, replaced by rename, like git's index.

The inventory is also the tree's root for garbage collection: it is written, durable, before the tree appears, under the
name ``<id>.next`` while a tree is being changed, and under ``<id>`` once it stands.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from .digest import Digest
from .durable import UNFINISHED, fsync_folder, seal, unseal, write_file
from .errors import StoreStateError
from .links import LinkKind

NEXT = ".next"
_FORMAT = 1
_KINDS = {kind.value[0]: kind for kind in LinkKind}  # one letter a kind: h r s c e


@dataclass(frozen=True, slots=True)
class InventoryEntry:
    """One file that modelstow put there. ``suspect``: a verification found its own bytes damaged (copies only)."""

    digest: Digest
    kind: LinkKind
    ino: int
    suspect: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """One tree. ``tree`` is relative to the store for trees in it, absolute for others; ``labels`` are the caller's."""

    tree: str
    labels: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, InventoryEntry] = field(default_factory=dict)
    staging: str = ""  # in ``.next`` only: the folder beside the tree that holds the new one, after publishing the old
    staging_ino: int = 0  # the new folder's inode: tells which of the two it is
    parent: tuple[int, int] = (0, 0)  # device and inode of the folder above an outside tree

    @property
    def id(self) -> str:
        return tree_id(self.tree)

    def path(self, root: Path) -> Path:
        """Where the tree stands."""
        return root / self.tree  # an absolute second part wins

    def encode(self) -> bytes:
        """Columns rather than rows: 100,000 files load in a tenth of a second."""
        placed = list(self.files.values())
        head = {
            "inventory": _FORMAT,
            "tree": self.tree,
            "labels": dict(self.labels),
            "staging": [self.staging, self.staging_ino],
            "parent": list(self.parent),
            "paths": list(self.files),
            "digests": "".join(p.digest.hex for p in placed),
            "kinds": "".join(p.kind.value[0] for p in placed),
            "inodes": [p.ino for p in placed],
            "suspect": [path for path, p in self.files.items() if p.suspect],
        }
        text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
        return seal(text)

    @classmethod
    def decode(cls, raw: bytes) -> Inventory:
        """Raises ValueError where the text is torn, altered or of a later format."""
        head = json.loads(unseal(raw))
        if head["inventory"] != _FORMAT:
            raise ValueError(f"its format {head['inventory']} is not known here")
        hexes, suspect = head["digests"], set(head["suspect"])
        digests = (Digest.of_hex(hexes[at : at + 64]) for at in range(0, len(hexes), 64))
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
    """The stable name of a tree in ``state/``: hex digits computed from where it stands."""
    return xxhash.xxh3_128_hexdigest(tree.encode("utf-8", "surrogateescape"))


def read(path: Path) -> Inventory | None:
    """The inventory at *path*; None where there is none. Raises StoreStateError where it cannot be believed, OSError."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return Inventory.decode(raw)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise StoreStateError(
            f"inventory {path} cannot be read: {error}",
            hint="remove this file and run `modelstow reconcile`, which makes it anew from what stands on disk",
        ) from error


def rewrite(folder: Path, inventory: Inventory) -> None:
    """Change what is on record of a tree as it stands; a change that is under way is left alone. Durable on return."""
    write_file(folder / inventory.id, inventory.encode(), mode=0o644)


def settle(folder: Path, inventory: Inventory) -> None:
    """The change is done: *inventory* is the tree's, and ``.next`` goes. Durable on return."""
    rewrite(folder, inventory)
    (folder / (inventory.id + NEXT)).unlink(missing_ok=True)


def announce(folder: Path, inventory: Inventory) -> None:
    """A change to come: its digests are kept from now on, and who finds ``.next`` later knows what to finish. Durable."""
    write_file(folder / (inventory.id + NEXT), inventory.encode(), mode=0o644)


def remove(folder: Path, id_: str) -> None:
    """Forget a tree. Durable on return."""
    for name in (id_ + NEXT, id_):
        (folder / name).unlink(missing_ok=True)
    fsync_folder(folder)


def all_of(folder: Path) -> list[Path]:
    """Every inventory file, those of unfinished changes included."""
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    return [folder / name for name in names if not name.startswith(UNFINISHED)]
