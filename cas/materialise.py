"""Materialising: a folder filled with entries, by hardlinks alone where possible, else path by path.

No step follows a symlink inside a tree: folders are opened one by one from the tree's top, and files are named relative
to them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

from . import links
from .digest import EMPTY, Digest
from .entries import Inline, Other
from .inventory import EntryColumns, InventoryEntry
from .links import UNAVAILABLE, Linker, LinkKind
from .tree import OPEN_FOLDER, open_below

G = TypeVar("G")
R = TypeVar("R")
_NOTHING = Inline(b"")
_MANY = 2_000  # from so many files on a second thread pays: link(2) releases the GIL


@dataclass(frozen=True, slots=True)
class TreeEntry:
    """The desired content of one path of a tree."""

    digest: Digest
    size: int  # bytes
    ino: int = 0  # the blob's inode as it was last seen; 0: a stat after linking tells
    other: Other | None = None  # instead of a blob; the digest is then that of zero bytes

    @classmethod
    def of(cls, other: Other) -> TreeEntry:
        """An entry that is no blob."""
        return cls(EMPTY, 0, other=other)


@contextmanager
def _opened(path: Path | str) -> Iterator[int]:
    fd = os.open(path, OPEN_FOLDER)
    try:
        yield fd
    finally:
        os.close(fd)


def link_all(root: Path, entries: EntryColumns, blobs: Path, *, folder_mode: int = 0o755) -> EntryColumns | None:
    """Hardlink every blob of a new tree into the empty folder *root*, and create the others; durable on return.

    What was linked, by the inodes that the folders list afterwards: *entries* itself where they are the expected ones.
    None where hardlinks cannot be had here; then *root* holds no file. Raises OSError.
    """
    groups: dict[str, list[tuple[str, int]]] = {}
    for row, path in enumerate(entries.paths):
        folder, _, name = path.rpartition("/")
        groups.setdefault(folder, []).append((name, row))
    inodes = list(entries.inodes)
    with _opened(root) as top, _opened(blobs) as source:
        made = _make_folders(top, groups, folder_mode)

        def link(group: tuple[str, list[tuple[str, int]]]) -> bool:
            fd = open_below(top, group[0])
            try:
                _link_rows(source, fd, group[1], entries)
                os.fsync(fd)
                _list_inodes(fd, group[1], entries, inodes)
            except OSError as error:
                if error.errno not in UNAVAILABLE:
                    raise _with_path(error, f"{root}/{group[0]}") from error
                return False
            finally:
                os.close(fd)
            return True

        if not all(_for_each(groups.items(), link, files=len(inodes))):
            _unlink_all(top, groups)
            return None
        _sync_folders(top, made - groups.keys())
    if inodes == entries.inodes:
        return entries
    return EntryColumns(entries.paths, entries.digests, entries.kinds, inodes, others=entries.others)


def _for_each(groups: Iterable[G], place: Callable[[G], R], *, files: int) -> list[R]:
    """Call *place* with each group, in two threads where there are many files."""
    if files < _MANY:
        return list(map(place, groups))
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(place, groups))


def _with_path(error: OSError, folder: str) -> OSError:
    """The same error with a whole path: calls relative to an open folder name only what is below it."""
    name = error.filename2 or error.filename
    path = os.path.join(folder, name) if isinstance(name, str) and "/" not in name else folder
    return OSError(error.errno, error.strerror, path)


def _link_rows(source: int, folder: int, rows: Iterable[tuple[str, int]], entries: EntryColumns) -> None:
    for name, row in rows:
        if entries.kinds[row] == "h":
            blob = entries.hex(row)
            os.link(f"{blob[:2]}/{blob}", name, src_dir_fd=source, dst_dir_fd=folder, follow_symlinks=False)
        else:
            links.create(entries.others.get(entries.paths[row], _NOTHING), folder, name)


def _list_inodes(folder: int, rows: Iterable[tuple[str, int]], entries: EntryColumns, inodes: list[int]) -> None:
    """Put the inodes that a folder lists into *inodes*, where others were expected: a repair may replace a blob."""
    with os.scandir(folder) as listing:
        found = {entry.name: entry.inode() for entry in listing}
    for name, row in rows:
        if inodes[row] not in (0, found.get(name)):
            # Some overlays list other numbers than stat gives.
            inodes[row] = os.stat(name, dir_fd=folder, follow_symlinks=False).st_ino


def _unlink_all(top: int, groups: Mapping[str, Iterable[tuple[str, int]]]) -> None:
    for folder, rows in groups.items():
        fd = open_below(top, folder)
        try:
            for name, _ in rows:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=fd)
        finally:
            os.close(fd)


def _sync_folders(top: int, folders: Iterable[str]) -> None:
    for folder in folders:
        fd = open_below(top, folder)
        os.fsync(fd)
        os.close(fd)
    os.fsync(top)


def populate(
    root: Path,
    items: Mapping[str, TreeEntry],
    blob: Callable[[Digest], str],
    linker: Linker,
    *,
    replace: bool = False,
    target: Callable[[str, Digest], str] | None = None,
    folder_mode: int = 0o755,
) -> dict[str, InventoryEntry]:
    """Place *items* below the existing folder *root*; names and copies are durable on return.

    With *replace* a name that is taken gives way in one step; what stood there must have been displaced or be ours.
    *target* says what a symlink at a path should hold. Raises LinkError, FileExistsError, OSError.
    """
    groups: dict[str, list[tuple[str, str, TreeEntry]]] = {}
    for path, item in items.items():
        folder, _, name = path.rpartition("/")
        groups.setdefault(folder, []).append((name, path, item))

    def placing(path: str, item: TreeEntry, fd: int) -> Callable[[str], LinkKind]:
        if item.other is not None:
            return partial(links.create, item.other, fd)
        say = target(path, item.digest) if target else ""
        return partial(linker.place, blob(item.digest), item.digest, item.size, fd, target=say)

    with _opened(root) as top:
        made = _make_folders(top, groups, folder_mode)

        def one(group: tuple[str, list[tuple[str, str, TreeEntry]]]) -> list[tuple[str, InventoryEntry]]:
            folder, rows = group
            fd = open_below(top, folder)
            try:
                placed = []
                if replace:
                    links.remove_temp_names(fd)
                for name, path, item in rows:
                    place = placing(path, item, fd)
                    kind = links.replace(place, fd, name) if replace else place(name)
                    linked = kind is LinkKind.HARDLINK and item.ino
                    ino = item.ino if linked else os.stat(name, dir_fd=fd, follow_symlinks=False).st_ino
                    placed.append((path, InventoryEntry(item.digest, kind, ino, other=item.other)))
                os.fsync(fd)
                return placed
            except OSError as error:
                raise _with_path(error, f"{root}/{folder}") from error
            finally:
                os.close(fd)

        rows = [row for batch in _for_each(groups.items(), one, files=len(items)) for row in batch]
        _sync_folders(top, made - groups.keys())
    result = dict(rows)
    return {path: result[path] for path in items}


def _make_folders(top: int, folders: Iterable[str], mode: int) -> set[str]:
    made: set[str] = set()
    for folder in sorted(folders):
        walked = ""
        for part in PurePosixPath(folder).parts:
            walked = f"{walked}/{part}" if walked else part
            if walked in made:
                continue
            fd = open_below(top, walked.rpartition("/")[0])
            try:
                os.mkdir(part, dir_fd=fd)
                os.chmod(part, mode, dir_fd=fd)
            except FileExistsError:
                pass
            finally:
                os.close(fd)
            made.add(walked)
    return made
