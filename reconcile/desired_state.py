"""The desired state, built from settings, a lockfile, variants of it and the options of a command."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from modelstow.cas import EMPTY, BlobStore, Digest, LinkMode

from .desired import selectors
from .desired.lockfile import Lockfile
from .desired.selectors import VariantId
from .planning.observer import nearest_folder
from .planning.state import Desired, DesiredTree, TreeKey
from .settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsureOptions:
    """The options of a command beyond the selector."""

    into: Path | None = None
    with_: frozenset[str] = frozenset()
    without: frozenset[str] = frozenset()
    prune: bool = False


def build(settings: Settings, lock: Lockfile, variants: Iterable[VariantId], options: EnsureOptions) -> Desired:
    """The desired state of some variants of a lockfile. Reads the inventories of their trees, writes nothing.

    Raises InvalidConfigError for an option that does not fit, StoreStateError, OSError.
    """
    trees = tuple(_tree(settings, lock, id_, options) for id_ in variants)
    copies = _needs_copies(settings) if trees else False
    return Desired(trees=trees, blobs=lock.blobs, mirrors=settings.mirrors, needs_copies=copies, prune=options.prune)


def _tree(settings: Settings, lock: Lockfile, id_: VariantId, options: EnsureOptions) -> DesiredTree:
    root = settings.root
    place = selectors.tree_of_folder(options.into, root) if options.into is not None else id_.tree
    variant = lock.models[id_.model].variants[id_.variant]
    with_, without = frozenset[str](), frozenset[str]()
    if variant.components:
        selectors.check_components(id_, variant, options.with_ | options.without)
        record = BlobStore.open_readonly(root).trees.read(place)
        before, before_without = selectors.remembered(record.labels if record else {}, id_)
        with_ = ((before - options.without) | options.with_) & variant.components.keys()
        without = ((before_without - options.with_) | options.without) & variant.components.keys()
    elif options.with_ or options.without:
        selectors.check_components(id_, variant, options.with_ | options.without)
    labels = selectors.labels(id_, settings.lockfile, with_, without, pin=lock.models[id_.model].pin)
    files = variant.select_files(with_, without) if variant.components else variant.files
    path, symlinks = root / place, settings.link_mode is LinkMode.SYMLINK
    other_disk = options.into is not None and not symlinks and _device(path) != _device(root)
    return DesiredTree(key=TreeKey((id_,), place), path=path, files=files, labels=labels, other_disk=other_disk)


def _needs_copies(settings: Settings) -> bool:
    """Whether the files of trees inside the store will have bytes of their own, as far as is known."""
    if settings.link_mode is not LinkMode.REFLINK:
        return settings.link_mode is LinkMode.COPY
    from modelstow.cas import syscalls

    return not syscalls.can_reflink(str(nearest_folder(settings.root)))


def _device(path: Path) -> int:
    return os.stat(nearest_folder(path)).st_dev


def blob_sizes(lock: Lockfile, variants: Iterable[VariantId]) -> dict[Digest, int]:
    """Every blob of some variants, those of optional components too, with its size in bytes."""
    locked = [lock.models[id_.model].variants[id_.variant] for id_ in variants]
    digests = {digest for variant in locked for digest in variant.files.values()} - {EMPTY}
    return {digest: lock.blobs[digest].size for digest in digests}
