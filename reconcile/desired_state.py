"""The desired state, built from settings, a lockfile, variants of it and the options of a command."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from modelstow.cas import EMPTY, BlobStore, Digest, LinkMode, StoreStateError
from modelstow.cas.inventory import Inventory, is_intent, tree_id

from .desired import selectors, validation
from .desired.lockfile import LockedBlob, Lockfile
from .desired.selectors import VariantId, labels_by_variant
from .errors import InvalidConfigError, Problem
from .planning.observer import nearest_folder
from .planning.state import Desired, DesiredTree, TreeKey
from .retention.registered import size_of
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
    blobs = lock.blobs
    if options.into is not None and trees:
        tree, more = _in_one_folder(BlobStore.open_readonly(settings.root), lock, trees)
        trees, blobs = (tree,), {**blobs, **more} if more else blobs
    copies = _needs_copies(settings) if trees else False
    return Desired(trees=trees, blobs=blobs, mirrors=settings.mirrors, needs_copies=copies, prune=options.prune)


def build_all(settings: Settings, lock: Lockfile, options: EnsureOptions, warn: Callable[[object], object]) -> Desired:
    """The desired state of every variant of a lockfile, and of the folders outside the store that it put some into.

    What is the user's in such a folder stays, whatever the options. One that cannot be as the lockfile has it stays as it
    is, and *warn* is called with the reason.
    """
    desired = build(settings, lock, selectors.all_variants(lock), options)
    named = {tree_id(tree.key.tree) for tree in desired.trees}
    store = BlobStore.open_readonly(settings.root)
    trees, more = list(desired.trees), dict[Digest, LockedBlob]()
    versions: dict[tuple[str, str], list[VariantId]] = {}
    for id_ in selectors.all_variants(lock):
        versions.setdefault(_without_version(id_), []).append(id_)
    for file in store.trees.files():
        if file.name in named or is_intent(file):
            continue
        try:
            record = store.trees.read_file(file)
            if record is None or not _is_outside(store, record, settings.lockfile):
                continue
            ids = dict.fromkeys(_locked(versions, id_) for id_ in labels_by_variant(record.labels))
            alone = replace(options, into=Path(record.tree))
            parts = tuple(_tree(settings, lock, id_, alone) for id_ in ids if id_ is not None)
            if parts:
                tree, blobs = _in_one_folder(store, lock, parts)
                trees.append(replace(tree, keeps_extra=True))
                more |= blobs
        except StoreStateError:
            continue  # a damaged record stops gc alone
        except InvalidConfigError as error:
            warn(error)
    return replace(desired, trees=tuple(trees), blobs={**lock.blobs, **more} if more else lock.blobs)


def _is_outside(store: BlobStore, record: Inventory, lockfile: Path | None) -> bool:
    """Whether it is of a folder outside the store that this lockfile put files into, and that is there."""
    mine = os.path.isabs(record.tree) and record.labels.get("lockfile") == str(lockfile)
    return mine and store.trees.may_change(record) and os.path.isdir(record.tree)


def _locked(versions: Mapping[tuple[str, str], list[VariantId]], id_: VariantId) -> VariantId | None:
    """The variant of a lockfile that takes the place of one: the same, or the only other version of it."""
    found = versions.get(_without_version(id_), [])
    return id_ if id_ in found else found[0] if len(found) == 1 else None


def _in_one_folder(
    store: BlobStore, lock: Lockfile, trees: tuple[DesiredTree, ...]
) -> tuple[DesiredTree, Mapping[Digest, LockedBlob]]:
    """One tree with the files of all, and of the variants that the folder holds already; and the blobs of these.

    Of a variant of the same model, an earlier version's files give way. Raises InvalidConfigError where two variants have
    a path in common.
    """
    first, blobs = trees[0], dict[Digest, LockedBlob]()
    shares = {tree.key.variants[0]: (tree.labels, tree.files) for tree in trees}
    names = {_without_version(id_) for id_ in shares}
    record = store.trees.read(first.key.tree)
    for id_, row in (labels_by_variant(record.labels) if record else {}).items():
        if record is None or _without_version(id_) in names:
            continue
        theirs = {p: record.files[p].digest for p in selectors.own_paths(row, record.files) if p in record.files}
        shares[id_] = {key: value for key, value in row.items() if key != "lockfile"}, theirs
        for digest in set(theirs.values()) - lock.blobs.keys() - {EMPTY}:
            blobs[digest] = LockedBlob(size=size_of(store, lock, digest))
    if len(shares) == 1:
        return first, {}
    owners: dict[str, VariantId] = {}
    for id_, (_, files) in sorted(shares.items()):
        for path in files:
            if path in owners:
                what = f"{path} is a file of {owners[path]} and of {id_}, which cannot share {first.path}"
                raise InvalidConfigError(what, hint="put one of them into another folder")
            owners[path] = id_
    rows = [
        selectors.with_paths({**labels, "model": id_.model, "variant": id_.variant}, files)
        for id_, (labels, files) in shares.items()
    ]
    merged = {path: digest for _, each in shares.values() for path, digest in each.items()}
    problems: list[Problem] = []
    validation.check_paths(str(first.path), merged, problems)
    if problems:
        raise InvalidConfigError("\n".join(map(str, problems)), hint="put one of them into another folder")
    lockfile = {key: value for key, value in first.labels.items() if key == "lockfile"}
    key = TreeKey(tuple(sorted(shares)), first.key.tree)
    return replace(first, key=key, files=merged, labels={**selectors.merge_labels(rows), **lockfile}), blobs


def _without_version(id_: VariantId) -> tuple[str, str]:
    return id_.model.rpartition("@")[0], id_.variant


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
