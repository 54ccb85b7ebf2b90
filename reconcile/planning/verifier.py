"""Verification: blobs and files of trees compared with their digests, by stat or by reading them.

Findings stay on record until they are repaired (suspects of the store, a mark in a tree's inventory), so that ``status``
says CORRUPT and ``ensure`` repairs. A repair is an ordinary plan and apply.
"""

from __future__ import annotations

import enum
import json
import os
import secrets
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from modelstow.cas import EMPTY, BlobState, BlobStore, Digest, LinkKind, LockTimeoutError, entries, scrub
from modelstow.cas.inventory import tree_id
from modelstow.cas.locks import Holder
from modelstow.cas.pieces import proven_table
from modelstow.cas.scrub import Level, ScrubResult, ScrubTarget

from ..state_dirs import VERIFYING
from .observer import observe
from .state import Actual, Desired, DesiredTree


class FindingKind(enum.StrEnum):
    """The kinds of finding: wrong content, nothing there, another file in the place of the one that was linked."""

    CORRUPT = "corrupt"
    MISSING = "missing"
    DRIFT = "drift"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A deviation of one blob or file from the desired state. ``paths`` are absolute: every path that is affected."""

    kind: FindingKind
    digest: Digest
    pieces: tuple[int, ...] = ()  # indexes of damaged pieces, where a piece table locates the damage
    bytes: int = 0  # to be fetched for a repair
    paths: tuple[str, ...] = ()
    foreign_links: int = 0  # hardlinks to the damaged inode outside the verified trees


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """The result of one verification."""

    level: Level
    blobs: int  # present, and so verified
    files: int  # of trees
    bytes: int  # read
    seconds: float
    faults: tuple[Finding, ...]


def audit(
    store: BlobStore,
    desired: Desired,
    level: Level,
    *,
    other_blobs: Mapping[Digest, int] | None = None,
    on_begin: Callable[[int], None] = lambda total: None,
    on_bytes: Callable[[int], None] | None = None,
) -> VerifyReport:
    """Verify every blob and file of *desired*, and *other_blobs* (digest -> size in bytes).

    *on_begin* is called once, with the number of bytes to read, if any are; *on_bytes* with each number of bytes that were
    read, from any thread.

    The trees are VERIFYING meanwhile. A blob whose mtime changed and whose content is right gets its digest mtime back.
    Raises StoreStateError, OSError; content that cannot be read is a finding, not an error.
    """
    began = time.monotonic()
    with _marked(store, desired.trees):
        actual = observe(store, desired)
        sizes = {d: desired.size(d) for tree in desired.trees for d in tree.files.values()} | dict(other_blobs or {})
        sizes.pop(EMPTY, None)
        paths = _paths(desired)
        faults = list(_tree_faults(desired, actual))
        copies = _copies(store, desired, actual)
        unseen = {digest: sizes[digest] for digest in sorted(sizes.keys() - actual.blobs.keys())}
        states = {**actual.blobs, **store.blobs.stat_all(unseen)}
        present = [digest for digest in sorted(sizes) if states[digest].state is not BlobState.ABSENT]
        faults += [
            Finding(kind=FindingKind.MISSING, digest=d, bytes=sizes[d], paths=tuple(paths.get(d, ())))
            for d in sorted(sizes.keys() - set(present))
        ]
        if level is not Level.QUICK:
            on_begin(sum(sizes[d] for d in present) + sum(desired.size(tree.files[path]) for tree, path in copies))
        # Only these: one that becomes suspect while it is read was written to.
        suspect = {d: os.lstat(store.layout.blob(d)) for d in present if states[d].state is BlobState.SUSPECT}
        read = 0
        for digest, result in _blob_results(store, present, sizes, level, on_bytes):
            read += result.bytes_read
            if _changed_meanwhile(store, digest, sizes[digest], result, level, suspect):
                result = next(_blob_results(store, [digest], sizes, level, on_bytes))[1]
                read += result.bytes_read
            if not result.intact:
                faults.append(_corrupt(store, result, paths.get(digest, ())))
                if level is not Level.QUICK:  # a stat calls for reading the blob, it does not prove corruption
                    _note_suspect(store, digest)
            elif level is not Level.QUICK and digest in suspect:
                _restamp(store, digest, suspect[digest])
        for tree, path, result in _copy_results(store, copies, desired, level, on_bytes):
            read += result.bytes_read
            if not result.intact:
                faults.append(replace(_corrupt(store, result, ()), paths=(str(tree.path / path),), foreign_links=0))
                _mark_copy(store, tree, path)
        files = sum(len(tree.files) + len(tree.others) for tree in desired.trees)
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
        for path, entry in tree.entries.items():
            if not seen.exists:
                kind = FindingKind.MISSING
            elif path in seen.foreign or seen.placed.get(path, entry) != entry:
                kind = FindingKind.DRIFT
            elif path not in seen.placed:
                kind = FindingKind.MISSING
            else:
                continue
            yield Finding(kind=kind, digest=entries.digest_of(entry), paths=(str(tree.path / path),))


def _copies(store: BlobStore, desired: Desired, actual: Actual) -> list[tuple[DesiredTree, str]]:
    """The files of trees that do not share the bytes of a blob's inode: they are read too."""
    copies = []
    for tree in desired.trees:
        record = store.trees.read(tree.key.tree)
        for path in actual.trees[tree.key].placed:
            placed = record.files.get(path) if record else None
            if placed is not None and placed.kind in (LinkKind.COPY, LinkKind.REFLINK) and path in tree.files:
                copies.append((tree, path))
    return copies


def _blob_results(
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
        for target in targets:
            intact = store.blobs.stat(target.digest, target.size).state is BlobState.INTACT
            yield target.digest, ScrubResult(target_file=target, intact=intact)
        return
    # A blob that was found corrupt by sha256 may still agree with its piece table: it is read in full.
    suspects = store.blobs.suspects()
    for depth in (Level.FAST, Level.FULL):
        full = depth is Level.FULL
        at_depth = [t for t in targets if (level is Level.FULL or t.digest.hex in suspects) is full]
        for result in scrub.scrub(at_depth, depth, on_bytes=on_bytes):
            yield result.target_file.digest, result


def _copy_results(
    store: BlobStore,
    copies: Sequence[tuple[DesiredTree, str]],
    desired: Desired,
    level: Level,
    on_bytes: Callable[[int], None] | None,
) -> Iterator[tuple[DesiredTree, str, ScrubResult]]:
    if level is Level.QUICK:
        return  # the observer did that already
    targets = []
    for tree, path in copies:
        digest = tree.files[path]
        table = store.layout.table(digest)
        targets.append(ScrubTarget(path=str(tree.path / path), digest=digest, size=desired.size(digest), table=table))
    for (tree, path), result in zip(copies, scrub.scrub(targets, level, on_bytes=on_bytes), strict=True):
        yield tree, path, result


def _corrupt(store: BlobStore, result: ScrubResult, paths: Sequence[str]) -> Finding:
    target, pieces = result.target_file, result.bad_pieces
    ranges = (result.chunking.range(index, target.size) for index in pieces)
    damaged = sum(stop - start for start, stop in ranges) if pieces else target.size
    foreign_links = 0
    with suppress(OSError):
        found = os.lstat(target.path)
        known = sum(1 for path in paths if _inode(path) == found.st_ino)
        foreign_links = max(0, found.st_nlink - 1 - known)
    return Finding(
        kind=FindingKind.CORRUPT,
        digest=target.digest,
        pieces=pieces,
        bytes=damaged,
        paths=tuple(paths),
        foreign_links=foreign_links,
    )


def _inode(path: str) -> int:
    try:
        return os.lstat(path).st_ino
    except OSError:
        return 0


# ---- records; a read-only store is verified without them


def _note_suspect(store: BlobStore, digest: Digest) -> None:
    with suppress(OSError):
        store.blobs.note_suspect(digest)


def _changed_meanwhile(
    store: BlobStore, digest: Digest, size: int, result: ScrubResult, level: Level, suspect: Container[Digest]
) -> bool:
    """Whether a blob that was found intact was written to while it was read, so that it has to be read again."""
    if level is Level.QUICK or not result.intact or digest in suspect:
        return False
    return store.blobs.stat(digest, size).state is BlobState.SUSPECT


def _restamp(store: BlobStore, digest: Digest, before: os.stat_result) -> None:
    """Give an intact blob its mtime back, unless it shares its inode with another tool's file, whose times are not ours."""
    with suppress(OSError, LockTimeoutError):
        with store.lock_blob(digest, doing="restoring the mtime of an intact blob", timeout_s=1):
            table = proven_table(store.layout.table(digest), digest, before.st_size)
            if table is None or table.stamp is None:
                store.blobs.restamp(digest, before)


def _mark_copy(store: BlobStore, tree: DesiredTree, path: str) -> None:
    with suppress(OSError, LockTimeoutError):
        with store.lock(f"tree-{tree_id(tree.key.tree)}", doing="marking a damaged copy", timeout_s=5):
            record = store.trees.read(tree.key.tree)
            if record is not None and path in record.files:
                files = {**record.files, path: replace(record.files[path], suspect=True)}
                store.trees.rewrite(replace(record, files=files))


@contextmanager
def _marked(store: BlobStore, trees: Sequence[DesiredTree]) -> Iterator[None]:
    """Mark these trees as VERIFYING for other processes while the block runs."""
    text = json.dumps(Holder.me("verifying").to_json()).encode()
    marks: list[Path] = []
    with suppress(OSError):  # a read-only store may have no such folder
        store.make_state_dir(VERIFYING)
    try:
        for tree in trees:
            mark = store.layout.state_dir(VERIFYING) / f"{tree_id(tree.key.tree)}-{secrets.token_hex(4)}"
            with suppress(OSError):
                with mark.open("xb") as file:
                    file.write(text)
                marks.append(mark)
        yield
    finally:
        for mark in marks:
            mark.unlink(missing_ok=True)
