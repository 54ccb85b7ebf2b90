"""Trees with entries of every kind, which no lockfile names: what is desired, published by a call or by a program.

``python publishing.py ROOT VERSION`` publishes one of ``VERSIONS``, or removes the tree for ``-``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from builders import some_bytes

from modelstow.cas import BlobStore, Digest, Inline, LinkMode, Symlink, entries
from modelstow.cas.entries import Other
from modelstow.cas.links import Linker
from modelstow.reconcile.checkout.publisher import Publisher
from modelstow.reconcile.desired.lockfile import LockedBlob
from modelstow.reconcile.desired.selectors import VariantId
from modelstow.reconcile.events.events import Event
from modelstow.reconcile.planning.observer import observe
from modelstow.reconcile.planning.planner import plan, statuses
from modelstow.reconcile.planning.state import Desired, DesiredTree, ModelState, TreeKey

Content = Mapping[str, bytes | Other]
"""By path; bytes are those of a blob."""
KEY = TreeKey((VariantId("m@1", "v"),), "models/m@1/v")
WEIGHTS, CONFIG = some_bytes(100_000, 5), b'{"a": 1}'
HUB: Content = {
    "blobs/weights": WEIGHTS,
    "blobs/config": CONFIG,
    "blobs/empty": b"",
    "refs/main": Inline(b"1111"),
    "snapshots/1111/model.bin": Symlink("../../blobs/weights"),
    "snapshots/1111/config.json": Symlink("../../blobs/config"),
}
"""As a hub's cache is laid out."""
VERSIONS: Mapping[str, Content] = {
    "1": HUB,
    "2": {
        "blobs/weights": WEIGHTS,
        "blobs/config": Inline(CONFIG),  # each kind gives way to another
        "refs": Symlink("blobs"),
        "refs.main": Inline(b"2222"),
        "snapshots/1111/model.bin": WEIGHTS,
        "snapshots/1111/config.json": Symlink("../../blobs/weights"),
        "snapshots/2222/model.bin": Symlink("../../blobs/weights"),
    },
}


def desired_of(root: Path, content: Content, *, prune: bool = False) -> Desired:
    """One tree of a store."""
    blobs = {path: data for path, data in content.items() if isinstance(data, bytes)}
    tree = DesiredTree(
        key=KEY,
        path=root / KEY.tree,
        files={path: Digest.of(data) for path, data in blobs.items()},
        others={path: other for path, other in content.items() if not isinstance(other, bytes)},
        labels={"model": "m@1", "variant": "v"},
    )
    sizes = {Digest.of(data): LockedBlob(size=len(data), urls=()) for data in blobs.values()}
    return Desired(trees=(tree,), blobs=sizes, prune=prune)


def publisher_of(store: BlobStore, events: list[Event], mode: LinkMode = LinkMode.AUTO) -> Publisher:
    return Publisher(
        store=store,
        linker=Linker(mode),
        emit=events.append,
        lock_tree=lambda key: store.lock("tree-test", doing="testing"),
    )


def publish(root: Path, content: Content, *, prune: bool = False, mode: LinkMode = LinkMode.AUTO) -> bool:
    """Make the tree hold *content*, whose blobs are put into the store first; whether anything changed."""
    store = BlobStore.open(root)
    for data in content.values():
        if isinstance(data, bytes) and data:
            store.ingest.add_bytes(data)
    desired = desired_of(root, content, prune=prune)
    changed = publisher_of(store, [], mode).publish(desired, desired.trees[0], {})
    store.remove_temp_files()
    return changed


def remove(root: Path) -> None:
    store = BlobStore.open(root)
    record = store.trees.read(KEY.tree)
    if record is not None:
        publisher_of(store, []).remove(record, KEY)
    store.remove_temp_files()


def state_of(root: Path, content: Content) -> tuple[ModelState, list[tuple[str, str]]]:
    """What status says of the tree, and what a plan would do."""
    desired = desired_of(root, content)
    actual = observe(BlobStore.open(root), desired)
    steps = [(type(a).__name__, "" if "Fetch" in type(a).__name__ else a.path) for a in plan(desired, actual).actions]
    return statuses(desired, actual)[0].state, steps


def content_of(root: Path) -> dict[str, bytes | Other]:
    """What the tree holds: of regular files the bytes, of symlinks the targets."""
    tree, found = root / KEY.tree, {}
    for path in sorted(tree.rglob("*")):
        there = entries.read(str(path))
        if there is not None:
            found[str(path.relative_to(tree))] = there if isinstance(there, Symlink) else there.content
    return found


def bytes_of(content: Content) -> dict[str, bytes | Other]:
    """The same content as ``content_of`` shows it."""
    return {path: other.content if isinstance(other, Inline) else other for path, other in sorted(content.items())}


if __name__ == "__main__":
    os.umask(0o022)
    where, version = sys.argv[1:]
    remove(Path(where)) if version == "-" else publish(Path(where), VERSIONS[version])
