"""The writer of the stat snapshot, after an observation that found nothing to do. ``snapshot`` describes its content."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import xxhash

from modelstow.cas import EMPTY, BlobStore, Digest, syscalls
from modelstow.cas.inventory import tree_id
from modelstow.cas.tree import scan

from . import snapshot
from .desired import manifest as manifests
from .desired.lockfile import Lockfile
from .errors import ModelstowError
from .planning.state import Actual, Desired, DesiredTree
from .settings import Settings
from .snapshot import Snapshot, Unsettled


def take(settings: Settings, lock: Lockfile, lock_text: bytes, desired: Desired, actual: Actual, began_ns: int) -> None:
    """Write the snapshot of a whole lockfile that is in sync. *began_ns*: when the observation began, by the clock.

    A store that is read only, on a network, or was changed too lately keeps its old snapshot, or has none.
    """
    with suppress(OSError, Unsettled):
        snapshot.write(_snapshot(settings, lock, lock_text, desired, actual, began_ns))


def _snapshot(
    settings: Settings, lock: Lockfile, lock_text: bytes, desired: Desired, actual: Actual, began_ns: int
) -> Snapshot:
    store = BlobStore.open_readonly(settings.root)
    root, lockfile = str(store.layout.root), str(settings.lockfile)
    if root != str(settings.root):
        raise Unsettled
    manifest = str(settings.manifest or "")
    taken = Snapshot(root, lockfile, manifest, xxhash.xxh3_128_hexdigest(lock_text))
    state = store.layout.state
    # Pins decide which trees the next reconcile removes.
    control = [store.layout.config, store.layout.epoch, state / "inventories", state / "roots", store.layout.pins]
    taken.control_names = [lockfile, *filter(None, [manifest]), *map(str, control)]
    taken.control_rows = snapshot.control_identities(taken.control_names, began_ns)
    # After the identities: what is read now is what they stand for, or they will not hold.
    if settings.lockfile is None or settings.lockfile.read_bytes() != lock_text:
        raise Unsettled  # it was replaced since this process read it
    if not all(model.variants for model in lock.models.values()):
        raise Unsettled  # a selector may mean a model without a tree
    if settings.manifest is not None and settings.manifest.is_file() and not _is_fresh(settings.manifest, lock):
        raise Unsettled  # each command has to warn of it, or with --locked to fail
    numbers = {digest: number for number, digest in enumerate(sorted(desired.digests))}
    for digest in numbers:
        taken.blob_names.append(f"{digest.hex[:2]}/{digest.hex}")
        taken.blob_rows.extend((actual.blobs[digest].ino, desired.size(digest), digest.mtime * 1_000_000_000))
    for tree in desired.trees:
        _add_tree(taken, tree, lock, actual, numbers, began_ns)
    _require_local_file_systems([root, *(tree.path for tree in taken.trees)])
    store.make_state_dir(snapshot.FOLDER)
    return taken


def _is_fresh(manifest: Path, lock: Lockfile) -> bool:
    try:
        return manifests.read(manifest).meaning == lock.manifest
    except ModelstowError:
        return False


def _add_tree(
    taken: Snapshot, tree: DesiredTree, lock: Lockfile, actual: Actual, numbers: dict[Digest, int], began_ns: int
) -> None:
    if len(tree.key.variants) != 1:
        raise Unsettled  # a row names one
    [id_], seen = tree.key.variants, actual.trees[tree.key]
    model = lock.models[id_.model]
    default = model.default == id_.variant or (model.default is None and len(model.variants) == 1)
    row = snapshot.Tree(tree_id(tree.key.tree), id_.model, id_.variant, str(tree.path), default=default, extra=seen.extra)
    found = scan(tree.path)
    if found is None:
        raise Unsettled
    first = len(taken.folder_names)
    taken.folder_names += snapshot.names_below(str(tree.path), found.folders)
    row.folders = first, len(taken.folder_names)
    taken.folder_rows.extend(snapshot.folder_identities(taken.folder_names[first:], began_ns))
    first = len(taken.other_names)
    taken.other_names += [f"{tree.path}/{path}" for path in sorted(seen.own)]
    row.others = first, len(taken.other_names)
    taken.other_rows.extend(snapshot.content_identities(taken.other_names[first:], began_ns))
    row.blobs = array("I", sorted({numbers[digest] for digest in tree.files.values() if digest != EMPTY}))
    taken.trees.append(row)


def _require_local_file_systems(folders: Iterable[str]) -> None:
    """Refuse network file systems, on which a server may change content without a trace in its times."""
    seen: set[int] = set()
    for folder in folders:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            device = os.fstat(fd).st_dev
            if device not in seen and not syscalls.is_local(fd):
                raise Unsettled
            seen.add(device)
        finally:
            os.close(fd)
