"""A deeper look: reads content and says what is not what it should be. Repair is the same plan and apply as everything.

What is found stays on record (suspects of the store, a mark in a tree's inventory), so that ``status`` says CORRUPT and
``ensure`` heals, until it is repaired.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from modelstow.cas import EMPTY, BlobState, BlobStore, Digest, LinkKind, LockTimeoutError, scrub
from modelstow.cas.inventory import tree_id
from modelstow.cas.locks import Holder
from modelstow.cas.scrub import Level, ScrubResult, ScrubTarget

from ..state_dirs import VERIFYING
from .observer import observe
from .state import Actual, Desired, DesiredTree


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is not what it should be. ``paths`` are absolute: every place where it can be reached."""

    kind: str  # "corrupt" | "missing" | "drift"
    digest: Digest
    pieces: tuple[int, ...] = ()  # damaged ones, where a table tells
    bytes: int = 0  # to be fetched for a repair
    paths: tuple[str, ...] = ()
    foreign_links: int = 0  # hardlinks to the damaged inode that no tree of ours accounts for


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What a verification saw."""

    level: Level
    blobs: int
    files: int
    bytes: int  # read
    seconds: float
    faults: tuple[Finding, ...]


def audit(
    store: BlobStore,
    desired: Desired,
    level: Level,
    *,
    also: Mapping[Digest, int] | None = None,
    on_total: Callable[[int], None] = lambda total: None,
    on_bytes: Callable[[int], None] | None = None,
) -> VerifyReport:
    """Read or stat every blob and file of *desired*, and at the blobs in *also* (digest -> size in bytes).

    *on_total* is told of the bytes that will be read, if any, and *on_bytes*, from any thread, of those that were.

    Trees are VERIFYING meanwhile. A blob that was merely touched and reads right gets its proof back.
    Raises StoreStateError, OSError; content that cannot be read is a fault, not an error.
    """
    began = time.monotonic()
    with _marked(store, desired.trees):
        actual = observe(store, desired)
        sizes = {d: desired.size(d) for tree in desired.trees for d in tree.files.values()} | dict(also or {})
        sizes.pop(EMPTY, None)
        paths = _paths(desired)
        faults = list(_tree_faults(desired, actual))
        copies = _copies(store, desired, actual)
        present = [d for d in sorted(sizes) if store.blobs.stat(d, sizes[d]).state is not BlobState.ABSENT]
        faults += [
            Finding(kind="missing", digest=d, bytes=sizes[d], paths=tuple(paths.get(d, ())))
            for d in sorted(sizes.keys() - set(present))
        ]
        if level is not Level.QUICK:
            on_total(sum(sizes[d] for d in present) + sum(desired.size(tree.files[path]) for tree, path in copies))
        read = 0
        for digest, verdict in _verdicts(store, present, sizes, level, on_bytes):
            read += verdict.bytes_read
            if not verdict.intact:
                faults.append(_corrupt(store, verdict, paths.get(digest, ())))
                if level is not Level.QUICK:  # a stat asks for a re-proof, it convicts nobody
                    _put_on_record(store, digest)
            elif level is not Level.QUICK and store.blobs.stat(digest, sizes[digest]).state is BlobState.SUSPECT:
                _restamp(store, digest)
        for tree, path, verdict in _copy_verdicts(store, copies, desired, level, on_bytes):
            read += verdict.bytes_read
            if not verdict.intact:
                faults.append(replace(_corrupt(store, verdict, ()), paths=(str(tree.path / path),), foreign_links=0))
                _mark_copy(store, tree, path)
        files = sum(len(tree.files) for tree in desired.trees)
    seconds = time.monotonic() - began
    return VerifyReport(level=level, blobs=len(present), files=files, bytes=read, seconds=seconds, faults=tuple(faults))


def _paths(desired: Desired) -> dict[Digest, list[str]]:
    paths: dict[Digest, list[str]] = {}
    for tree in desired.trees:
        root = str(tree.path)
        for path, digest in tree.files.items():
            paths.setdefault(digest, []).append(f"{root}/{path}")
    return paths


def _tree_faults(desired: Desired, actual: Actual) -> Iterator[Finding]:
    for tree in desired.trees:
        seen = actual.trees[tree.key]
        if not seen.exists:
            every = tuple(str(tree.path / path) for path in tree.files)
            yield from (
                Finding(kind="missing", digest=tree.files[p], paths=(e,)) for p, e in zip(tree.files, every, strict=True)
            )
            continue
        for path, digest in tree.files.items():
            if path in seen.foreign or seen.placed.get(path, digest) != digest:
                yield Finding(kind="drift", digest=digest, paths=(str(tree.path / path),))
            elif path not in seen.placed:
                yield Finding(kind="missing", digest=digest, paths=(str(tree.path / path),))


def _copies(store: BlobStore, desired: Desired, actual: Actual) -> list[tuple[DesiredTree, str]]:
    """Tree files with bytes of their own: they need reading too."""
    found = []
    for tree in desired.trees:
        record = store.trees.read(tree.key.tree)
        for path in actual.trees[tree.key].placed:
            placed = record.files.get(path) if record else None
            if placed is not None and placed.kind in (LinkKind.COPY, LinkKind.REFLINK) and path in tree.files:
                found.append((tree, path))
    return found


def _verdicts(
    store: BlobStore,
    present: Sequence[Digest],
    sizes: Mapping[Digest, int],
    level: Level,
    on_bytes: Callable[[int], None] | None,
) -> Iterator[tuple[Digest, ScrubResult]]:
    layout = store.layout
    targets = [
        ScrubTarget(path=layout.blob(d), digest=d, size=sizes[d], table=layout.table(d), makes_table=True) for d in present
    ]
    if level is Level.QUICK:
        for target_file in targets:
            intact = store.blobs.stat(target_file.digest, target_file.size).state is BlobState.INTACT
            yield target_file.digest, ScrubResult(target_file=target_file, intact=intact)
        return
    # A blob that a verification convicted by sha256 may still agree with its table: it is read in full.
    convicted = store.blobs.suspects()
    for chosen, deep in (("fast", False), ("full", True)):
        rows = [t for t in targets if (t.digest.hex in convicted) is deep] if level is Level.FAST else targets
        if level is Level.FULL and chosen == "fast":
            continue
        how = Level.FULL if deep or level is Level.FULL else Level.FAST
        for verdict in scrub.scrub(rows, how, on_bytes=on_bytes):
            yield verdict.target_file.digest, verdict


def _copy_verdicts(
    store: BlobStore,
    copies: Sequence[tuple[DesiredTree, str]],
    desired: Desired,
    level: Level,
    on_bytes: Callable[[int], None] | None,
) -> Iterator[tuple[DesiredTree, str, ScrubResult]]:
    if level is Level.QUICK:
        return  # the observer has looked at them already
    targets = []
    for tree, path in copies:
        digest = tree.files[path]
        table = store.layout.table(digest)
        targets.append(ScrubTarget(path=str(tree.path / path), digest=digest, size=desired.size(digest), table=table))
    for (tree, path), verdict in zip(copies, scrub.scrub(targets, level, on_bytes=on_bytes), strict=True):
        yield tree, path, verdict


def _corrupt(store: BlobStore, verdict: ScrubResult, paths: Sequence[str]) -> Finding:
    target_file = verdict.target_file
    pieces = verdict.bad_pieces
    spans = (verdict.chunking.range(index, target_file.size) for index in pieces)
    damaged = sum(stop - start for start, stop in spans) if pieces else target_file.size
    links = 0
    with suppress(OSError):
        there = os.lstat(target_file.path)
        ours = sum(1 for path in paths if _inode(path) == there.st_ino)
        links = max(0, there.st_nlink - 1 - ours)
    return Finding(
        kind="corrupt", digest=target_file.digest, pieces=pieces, bytes=damaged, paths=tuple(paths), foreign_links=links
    )


def _inode(path: str) -> int:
    try:
        return os.lstat(path).st_ino
    except OSError:
        return 0


# ---- the record; a store that cannot be written to is verified all the same


def _put_on_record(store: BlobStore, digest: Digest) -> None:
    with suppress(OSError):
        store.blobs.note_suspect(digest)


def _restamp(store: BlobStore, digest: Digest) -> None:
    with suppress(OSError, LockTimeoutError):
        with store.lock_blob(digest, doing="giving a proven blob its proof back", timeout_s=1):
            store.blobs.restamp(digest)


def _mark_copy(store: BlobStore, tree: DesiredTree, path: str) -> None:
    with suppress(OSError, LockTimeoutError):
        with store.lock(f"tree-{tree_id(tree.key.tree)}", doing="marking a damaged copy", timeout_s=5):
            record = store.trees.read(tree.key.tree)
            if record is not None and path in record.files:
                files = {**record.files, path: replace(record.files[path], suspect=True)}
                store.trees.rewrite(replace(record, files=files))


@contextmanager
def _marked(store: BlobStore, trees: Sequence[DesiredTree]) -> Iterator[None]:
    """Tell others that these trees are being verified, while it lasts."""
    text = json.dumps(Holder.me("verifying").to_json()).encode()
    marks: list[Path] = []
    with suppress(OSError):  # a store that is only read has no such folder
        store.make_state_dir(VERIFYING)
    try:
        for tree in trees:
            mark = store.layout.state_dir(VERIFYING) / f"{tree_id(tree.key.tree)}-{secrets.token_hex(4)}"
            with suppress(OSError):
                mark.write_bytes(text)
                marks.append(mark)
        yield
    finally:
        for mark in marks:
            mark.unlink(missing_ok=True)
