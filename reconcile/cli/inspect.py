"""`ls`, `du`, `which`, `diff`: the commands that only look."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from modelstow.cas import EMPTY, BlobStore, Digest, tree
from modelstow.cas.links import LinkKind

from ..desired.lockfile import Lockfile
from ..errors import InvalidConfigError
from ..planning.state import VariantStatus
from ..retention import pins, roots
from ..retention.roots import Roots, TreeRoot
from .output import count, size, table
from .session import Answer, Session, read_lock

# ---- ls


def run_ls(session: Session) -> Answer:
    ensurer = session.ensurer()
    store = BlobStore.open_existing(ensurer.settings.root)
    pinned = pins.names(store) if store else frozenset()
    models: list[dict[str, Any]] = []
    for each in ensurer.statuses(session.args.selectors or None):
        locked = ensurer.lock.models[each.model]
        blobs = set(locked.variants[each.variant].files.values())
        models.append(
            {
                "model": each.model,
                "variant": each.variant,
                "state": each.state,
                "path": str(each.local_path),
                "bytes": sum(ensurer.lock.blobs[digest].size for digest in blobs),
                "pinned": locked.pin or _name(each) in pinned,
            }
        )
    rows = [
        (f"{m['model']}#{m['variant']}", m["state"], size(m["bytes"]), "pinned" * m["pinned"], m["path"]) for m in models
    ]
    return Answer(document={"models": models}, lines=tuple(table(rows, right=frozenset({2}))))


def _name(each: VariantStatus) -> str:
    return f"{each.model}#{each.variant}"


# ---- du


def run_du(session: Session) -> Answer:
    ensurer = session.ensurer_with_or_without_lock()
    store = BlobStore.open_existing(ensurer.settings.root)
    wanted: set[str] | None = None
    if session.args.selectors:
        wanted = {str(tree.key) for tree in ensurer.desired(session.args.selectors).trees}
    if store is None:
        totals = {"logical": 0, "physical": 0, "reclaimable": 0}
        return Answer(document={"trees": [], "totals": totals}, lines=("nothing stored yet",))
    known = roots.read(store)
    standing = [root for root in known.trees if not root.unfinished and root.state is not roots.RootState.DEAD]
    holders = Counter(digest for root in standing for digest in {p.digest for p in root.record.files.values()})
    sizes = _blob_sizes(store)
    trees = [_tree_usage(root, holders, sizes, store) for root in standing if wanted is None or root.name in wanted]
    trees.sort(key=lambda row: (row["model"], row["variant"], row["path"]))
    totals = _totals(store, known, standing, sizes)
    rows = [("tree", "logical", "shared", "unique")]
    rows += [(f"{t['model']}#{t['variant']}", size(t["logical"]), size(t["shared"]), size(t["unique"])) for t in trees]
    lines = table(rows, right=frozenset({1, 2, 3}))
    logical, physical, reclaimable = (size(totals[key]) for key in ("logical", "physical", "reclaimable"))
    lines.append(f"{logical} of models in {physical} on disk; {reclaimable} reclaimable")
    if quarantined := totals.get("quarantine"):
        lines.append(f"{size(quarantined)} of it in quarantine, which `modelstow gc --quarantine` empties")
    return Answer(document={"trees": trees, "totals": totals}, lines=tuple(lines))


def _blob_sizes(store: BlobStore) -> dict[Digest, int]:
    sizes = {}
    for digest, entry in store.blobs.entries():
        with suppress(FileNotFoundError):
            sizes[digest] = entry.stat(follow_symlinks=False).st_size
    return sizes


def _tree_usage(
    root: TreeRoot, holders: Mapping[Digest, int], sizes: Mapping[Digest, int], store: BlobStore
) -> dict[str, Any]:
    logical = shared = unique = 0
    seen: set[Digest] = set()
    for placed in root.record.files.values():
        bytes_ = sizes.get(placed.digest, 0)
        logical += bytes_
        if placed.kind is LinkKind.COPY:
            unique += bytes_
        elif placed.digest not in seen:
            seen.add(placed.digest)
            # Bytes that another tree, or another path of this one, would keep are shared.
            if holders[placed.digest] > 1:
                shared += bytes_
            else:
                unique += bytes_
    labels = root.record.labels
    path = str(root.record.path(store.layout.root))
    model, variant = labels.get("model", ""), labels.get("variant", "")
    return {"model": model, "variant": variant, "path": path, "logical": logical, "shared": shared, "unique": unique}


def _totals(store: BlobStore, known: Roots, standing: list[TreeRoot], sizes: Mapping[Digest, int]) -> dict[str, int]:
    placed = [placed for root in standing for placed in root.record.files.values()]
    copies = sum(sizes.get(p.digest, 0) for p in placed if p.kind is LinkKind.COPY)
    live, at = known.live(store), store.layout
    quarantine, partials, trash = _aside(store, (at.quarantine, at.partials, at.trash))
    totals = {
        "logical": sum(sizes.get(p.digest, 0) for p in placed),
        "physical": sum(sizes.values()) + copies + partials + trash + quarantine,
        "reclaimable": sum(bytes_ for digest, bytes_ in sizes.items() if digest not in live),
    }
    return totals | ({"quarantine": quarantine} if quarantine else {})


def _aside(store: BlobStore, folders: Iterable[Path]) -> list[int]:
    """Of each folder, the bytes that neither a blob nor a folder before it shares."""
    seen, sums = {entry.inode() for _, entry in store.blobs.entries()}, []
    for folder in folders:
        bytes_ = {}
        for path, ino in (tree.scan(folder) or tree.Scan()).files.items():
            with suppress(FileNotFoundError):
                if ino not in seen:
                    found = os.lstat(folder / path)
                    bytes_[ino] = min(found.st_size, found.st_blocks * 512)
        seen |= bytes_.keys()
        sums.append(sum(bytes_.values()))
    return sums


# ---- which

_WHICH_HINT = "name a file of a tree, or of blobs/ in the store"


def run_which(session: Session) -> Answer:
    path = os.path.abspath(session.args.path)
    try:
        found = os.stat(path)
    except OSError as error:
        raise InvalidConfigError(f"{path}: {error.strerror}", hint=_WHICH_HINT) from error
    if not stat.S_ISREG(found.st_mode):
        raise InvalidConfigError(f"{path} is not a regular file", hint=_WHICH_HINT)
    store = BlobStore.open_existing(session.settings.root)
    known = roots.read(store) if store else None
    digest = _digest_of(path, found, store, known) if store and known else None
    trees, models = [], set()
    for root in known.trees if known and digest else ():
        if any(placed.digest == digest for placed in root.record.files.values()):
            trees.append(str(root.record.path(session.settings.root)))
            models.add(root.record.labels.get("model", ""))
    document = {
        "path": path,
        "digest": digest,
        "size": found.st_size,
        "models": sorted(models),
        "trees": sorted(set(trees)),
    }
    if digest is None:
        return Answer(document=document, lines=(f"{path} is no blob of {session.settings.root}",), code=0)
    lines = [f"{digest}  {size(found.st_size)}", *(f"in {tree}" for tree in document["trees"])]
    return Answer(document=document, lines=tuple(lines))


def _digest_of(path: str, found: os.stat_result, store: BlobStore, known: Roots) -> Digest | None:
    """By the inventory of the tree it stands in, else by its inode; content is not read."""
    real = os.path.realpath(path)
    for root in known.trees:
        top = str(root.record.path(store.layout.root)) + os.sep
        for candidate in (path, real):
            placed = root.record.files.get(candidate[len(top) :]) if candidate.startswith(top) else None
            if placed is not None and placed.ino == os.lstat(candidate).st_ino:
                return placed.digest
    if found.st_size == 0:
        return EMPTY
    here = os.stat(store.layout.blobs).st_dev
    for digest, entry in store.blobs.entries():
        if found.st_dev == here and entry.inode() == found.st_ino:
            return digest
    return None


# ---- diff


def run_diff(session: Session) -> Answer:
    old, new = read_lock(session.args.old), read_lock(session.args.new)
    document = {
        "fetch": _part(new, new.blobs.keys() - old.blobs.keys()),
        "keep": _part(new, new.blobs.keys() & old.blobs.keys()),
        "drop": _part(old, old.blobs.keys() - new.blobs.keys()),
    }
    rows = [(word, count(part["files"], "file"), size(part["bytes"])) for word, part in document.items()]
    lines = table(rows, right=frozenset({1, 2}))
    for word in ("fetch", "drop"):
        lines += [f"{word} {path}" for path in document[word]["paths"]]
    return Answer(document=document, lines=tuple(lines))


def _part(lock: Lockfile, digests: set[Digest]) -> dict[str, Any]:
    variants = (variant for model in lock.models.values() for variant in model.variants.values())
    paths = {(path, d) for variant in variants for path, d in variant.files.items() if d in digests}
    bytes_ = sum(lock.blobs[digest].size for digest in digests)
    return {"files": len(paths), "bytes": bytes_, "paths": [path for path, _ in sorted(paths)]}
