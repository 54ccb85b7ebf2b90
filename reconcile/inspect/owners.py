"""Owners: which blob a file is, which models and trees use it, and which roots keep a blob."""

from __future__ import annotations

import enum
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass

from modelstow.cas import EMPTY, BlobStore, Digest

from ..errors import InvalidConfigError
from ..paths import absolute_path
from ..retention import roots
from ..retention.roots import Roots, RootState

_FILE_HINT = "name a file of a tree, or of blobs/ in the store"


# ---- the owners of a file


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOwners:
    """The blob that a file is, and the models and trees that use it; ``digest`` is None where it is no blob."""

    path: str  # absolute
    size: int  # bytes
    digest: Digest | None = None
    models: tuple[str, ...] = ()  # name@version, sorted
    trees: tuple[str, ...] = ()  # absolute paths, sorted


def file_owners(store: BlobStore | None, path: str | os.PathLike[str]) -> FileOwners:
    """The owners of one file, by inventory and inode; its content is not read. *store* is None where there is none yet.

    Raises InvalidConfigError where *path* is no regular file, StoreStateError, OSError.
    """
    absolute = absolute_path(path)
    try:
        found = os.stat(absolute)
    except OSError as error:
        raise InvalidConfigError(f"{absolute}: {error.strerror}", hint=_FILE_HINT) from error
    if not stat.S_ISREG(found.st_mode):
        raise InvalidConfigError(f"{absolute} is not a regular file", hint=_FILE_HINT)
    known = roots.read(store) if store is not None else None
    digest = _digest_of(absolute, found, store, known) if store is not None and known is not None else None
    if store is None or known is None or digest is None:
        return FileOwners(path=absolute, size=found.st_size)
    users = [root for root in known.trees if digest in root.digests]
    return FileOwners(
        path=absolute,
        size=found.st_size,
        digest=digest,
        models=tuple(sorted({id_.model for root in users for id_ in root.key.variants})),
        trees=tuple(sorted({str(root.record.path(store.layout.root)) for root in users})),
    )


def _digest_of(path: str, found: os.stat_result, store: BlobStore, known: Roots) -> Digest | None:
    """The digest by the inventory of the tree that holds the file, else by its inode among the blobs."""
    real = os.path.realpath(path)
    for root in known.trees:
        prefix = str(root.record.path(store.layout.root)) + os.sep
        for candidate in (path, real):
            placed = root.record.files.get(candidate[len(prefix) :]) if candidate.startswith(prefix) else None
            if placed is not None and placed.other is None and placed.ino == os.lstat(candidate).st_ino:
                return placed.digest
    if found.st_size == 0:
        return EMPTY
    device = os.stat(store.layout.blobs).st_dev
    for digest, entry in store.blobs.entries():
        if found.st_dev == device and entry.inode() == found.st_ino:
            return digest
    return None


# ---- what keeps blobs


class RootKind(enum.StrEnum):
    """The kinds of root."""

    LOCKFILE = "lockfile"
    TREE = "tree"
    PIN = "pin"
    LEASE = "lease"


@dataclass(frozen=True, slots=True, kw_only=True)
class RootEntry:
    """One root as `gc --roots` lists it. ``path`` is absolute; empty for pins and leases."""

    id: str  # of a lockfile or tree, as `gc --forget` takes it; the variant of a pin, the purpose of a lease
    kind: RootKind
    path: str
    state: RootState


def list_roots(store: BlobStore) -> list[RootEntry]:
    """Every root of a store, ordered by kind, path and id. Raises StoreStateError where one cannot be read, OSError."""
    known = roots.read(store)
    entries = [RootEntry(id=r.id, kind=RootKind.LOCKFILE, path=r.path, state=r.state) for r in known.lockfiles]
    for root in known.trees:
        path = str(root.record.path(store.layout.root))
        entries.append(RootEntry(id=root.record.id, kind=RootKind.TREE, path=path, state=root.state))
    names = [(RootKind.PIN, str(pin.id)) for pin in known.pins] + [(RootKind.LEASE, lease.doing) for lease in known.leased]
    entries += [RootEntry(id=name, kind=kind, path="", state=RootState.ALIVE) for kind, name in names]
    return sorted(entries, key=lambda entry: (entry.kind, entry.path, entry.id))


def kept_by(store: BlobStore, digests: Iterable[Digest]) -> tuple[str, ...]:
    """What keeps any of these blobs, one phrase each, such as ``pin tiny@1#fp16``; empty where nothing does.

    Raises StoreStateError where a root cannot be read, OSError.
    """
    known, digests = roots.read(store), frozenset(digests)
    if reasons := tuple(dict.fromkeys(known.reasons(digests))):
        return reasons
    inodes = {store.blobs.stat(digest, 0).ino for digest in digests} - {0}
    if known.holds_any_inode(inodes):
        return ("a file below models/ that is not on record",)
    return ()
