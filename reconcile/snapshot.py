"""The stat snapshot: what a run that found nothing to do saw, so that the next one sees by stats alone that it holds.

It is a cache next to the store's records, ``state/snapshots/<id of the lockfile>``, in the manner of git's index: written
without a sync, replaced by rename, and never believed where anything differs. A check compares

* lockfile, manifest, format file and epoch: device, inode, mode, size, mtime and ctime (a lockfile that was written again
  with the same bytes is read and hashed);
* the folders of inventories and roots, in which every change is a rename or a new name, and that there are no suspects,
  leases and live verifications;
* each folder of a tree: unchanged mtime and ctime mean unchanged names and inodes;
* each blob, and each file of a tree that is not a blob's inode: inode, size and mtime.

Nothing of a tree that changed less than ``_RACY_NS`` before the snapshot was taken is believed, since a second change could
carry the same time: then, as for anything else that differs, the caller observes as if there were no snapshot. Only trees
and stores on local file systems get one. What this module imports is the start-up cost of a command that has nothing to do:
next to nothing, and no dataclass.
"""

from __future__ import annotations

import os
from array import array
from operator import attrgetter

import xxhash

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

FOLDER = "snapshots"
_MAGIC = b"MSTOWSN1"
_RACY_NS = 100_000_000  # twice the coarsest clock tick of a local Linux file system, and more
_SECOND_NS = 1_000_000_000
_MOST_BYTES = 1 << 30
_IDENTITY = attrgetter("st_dev", "st_ino", "st_mode", "st_size", "st_mtime_ns", "st_ctime_ns")
_FOLDER_IDENTITY = attrgetter("st_dev", "st_ino", "st_mtime_ns", "st_ctime_ns")
_CONTENT = attrgetter("st_ino", "st_size", "st_mtime_ns")


class Tree:
    """One complete tree, as the answers of commands need it. ``extra``: the user's files in it."""

    __slots__ = ("blobs", "default", "extra", "folders", "id", "model", "others", "path", "variant")

    def __init__(self, id_: str, model: str, variant: str, path: str, *, default: bool, extra: Sequence[str]) -> None:
        self.id, self.model, self.variant, self.path = id_, model, variant, path
        self.default, self.extra = default, tuple(extra)
        self.folders: tuple[int, int] = (0, 0)  # first and end, in the snapshot's columns
        self.others: tuple[int, int] = (0, 0)
        self.blobs: array[int] = array("I")  # numbers of its blobs


class Snapshot:
    """The observed state: lists of names, and columns of integers of as many rows."""

    __slots__ = (
        "blob_names",
        "blob_rows",
        "control_names",
        "control_rows",
        "folder_names",
        "folder_rows",
        "lock_hash",
        "lockfile",
        "manifest",
        "other_names",
        "other_rows",
        "root",
        "trees",
    )

    def __init__(self, root: str, lockfile: str, manifest: str, lock_hash: str) -> None:
        self.root, self.lockfile, self.manifest, self.lock_hash = root, lockfile, manifest, lock_hash
        self.trees: list[Tree] = []
        self.control_names: list[str] = []
        self.folder_names: list[str] = []
        self.other_names: list[str] = []  # files of trees that are not a blob's inode, absolute
        self.blob_names: list[str] = []  # relative to blobs/sha256
        self.control_rows, self.folder_rows = array("q"), array("q")
        self.other_rows, self.blob_rows = array("q"), array("q")


# ---- the file


def path_of(root: str, lockfile: str) -> str:
    """The path of the snapshot of a lockfile in a store."""
    return f"{root}/state/{FOLDER}/{xxhash.xxh3_128_hexdigest(os.fsencode(lockfile))}"


def encode(snapshot: Snapshot) -> bytes:
    """Names first, separated by NUL, which no path holds; then the columns; then a checksum of all."""
    s = snapshot
    fields: list[str] = [s.root, s.lockfile, s.manifest, s.lock_hash]
    for names in (s.control_names, s.folder_names, s.other_names, s.blob_names):
        fields += (str(len(names)), *names)
    fields.append(str(len(s.trees)))
    numbers = array("q")
    for tree in s.trees:
        fields += (tree.id, tree.model, tree.variant, tree.path, "1" if tree.default else "", str(len(tree.extra)))
        fields += tree.extra
        numbers.extend((*tree.folders, *tree.others, len(tree.blobs)))
    text = os.fsencode("\0".join(fields))
    columns = (s.control_rows, s.folder_rows, s.other_rows, s.blob_rows, numbers)
    body = b"".join(
        (
            _MAGIC,
            len(text).to_bytes(8, "little"),
            text,
            *(column.tobytes() for column in columns),
            *(tree.blobs.tobytes() for tree in s.trees),
        )
    )
    return body + xxhash.xxh3_64_digest(body)


def decode(raw: bytes) -> Snapshot:
    """The snapshot in *raw*. Raises ValueError, IndexError or UnicodeError unless ``encode`` made it on this machine."""
    if raw[:8] != _MAGIC or xxhash.xxh3_64_digest(raw[:-8]) != raw[-8:]:
        raise ValueError("it is no snapshot")
    start = 16 + int.from_bytes(raw[8:16], "little")
    fields = os.fsdecode(raw[16:start]).split("\0")
    s = Snapshot(*fields[:4])
    at = 4

    def names() -> list[str]:
        nonlocal at
        first = at + 1
        at = first + int(fields[at])
        return fields[first:at]

    s.control_names, s.folder_names, s.other_names, s.blob_names = names(), names(), names(), names()
    count, at = int(fields[at]), at + 1
    for _ in range(count):
        id_, model, variant, path, default = fields[at : at + 5]
        at += 5
        s.trees.append(Tree(id_, model, variant, path, default=bool(default), extra=names()))
    view = memoryview(raw)[start:-8]

    def column(kind: str, length: int) -> array[int]:
        nonlocal view
        values = array(kind)
        values.frombytes(view[: length * values.itemsize])
        view = view[length * values.itemsize :]
        return values

    s.control_rows, s.folder_rows = column("q", 6 * len(s.control_names)), column("q", 4 * len(s.folder_names))
    s.other_rows, s.blob_rows = column("q", 3 * len(s.other_names)), column("q", 3 * len(s.blob_names))
    numbers = column("q", 5 * count)
    for number, tree in enumerate(s.trees):
        first, end, other_first, other_end, blobs = numbers[5 * number : 5 * number + 5]
        tree.folders, tree.others, tree.blobs = (first, end), (other_first, other_end), column("I", blobs)
    return s


def read(root: str, lockfile: str) -> Snapshot | None:
    """The snapshot of this lockfile in this store; None where there is none that can be used."""
    try:
        fd = os.open(path_of(root, lockfile), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        found = os.fstat(fd)
        if found.st_uid not in (os.geteuid(), 0) or not 24 < found.st_size < _MOST_BYTES:
            return None  # another user's word is not believed
        with open(fd, "rb", closefd=False) as file:
            snapshot = decode(file.read())
    except (OSError, ValueError, IndexError, TypeError, OverflowError, MemoryError):
        return None
    finally:
        os.close(fd)
    return snapshot if (snapshot.root, snapshot.lockfile) == (root, lockfile) else None


# ---- checking


def holds(s: Snapshot, trees: Sequence[Tree], *, whole: bool, every_blob: Callable[[Snapshot], bool] | None = None) -> bool:
    """Whether everything that matters for *trees* is as it was; *whole*: they are all. *every_blob* calls
    ``blobs_between`` for all of them, if the caller has more than one process to do so. Reads no content but, at most, the
    lockfile's. Raises no OSError: what cannot be looked at has changed."""
    try:
        return (
            _controls_hold(s)
            and _is_empty(f"{s.root}/state/leases")
            and _is_empty(f"{s.root}/state/suspects")
            and _is_empty(f"{s.root}/state/verifying")
            and _folders_hold(s, trees)
            and _others_hold(s, trees)
            and _blobs_hold(s, trees, (every_blob or _every_blob) if whole else None)
        )
    except OSError:
        return False


def _is_empty(folder: str) -> bool:
    try:
        return not os.listdir(folder)
    except FileNotFoundError:
        return True


def _controls_hold(s: Snapshot) -> bool:
    for number, name in enumerate(s.control_names):
        wanted = tuple(s.control_rows[6 * number : 6 * number + 6])
        if _identity(name) != wanted and not (name == s.lockfile and _hash_of(name, wanted[3]) == s.lock_hash):
            return False
    return True


def _identity(path: str) -> tuple[int, ...]:
    try:
        return _IDENTITY(os.stat(path))
    except FileNotFoundError:
        return (0,) * 6


def _hash_of(path: str, size: int) -> str:
    """The xxh3-128 of a file that has still this size; empty otherwise."""
    with open(path, "rb") as file:
        raw = file.read(size + 1)
    return xxhash.xxh3_128_hexdigest(raw) if len(raw) == size else ""


def _rows(names: Iterable[str], identity: attrgetter[tuple[int, ...]]) -> array[int]:
    found = array("q")
    for row in map(identity, map(os.lstat, names)):
        found.extend(row)
    return found


def _folders_hold(s: Snapshot, trees: Sequence[Tree]) -> bool:
    return all(
        _rows(s.folder_names[slice(*tree.folders)], _FOLDER_IDENTITY)
        == s.folder_rows[4 * tree.folders[0] : 4 * tree.folders[1]]
        for tree in trees
    )


def _others_hold(s: Snapshot, trees: Sequence[Tree]) -> bool:
    return all(
        _rows(s.other_names[slice(*tree.others)], _CONTENT) == s.other_rows[3 * tree.others[0] : 3 * tree.others[1]]
        for tree in trees
        if tree.others[0] != tree.others[1]
    )


def _blobs_hold(s: Snapshot, trees: Sequence[Tree], every_blob: Callable[[Snapshot], bool] | None) -> bool:
    here = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    os.chdir(f"{s.root}/blobs/sha256")  # relative names are looked up in a third of the time
    try:
        if every_blob is not None:
            return every_blob(s)
        numbers = sorted({number for tree in trees for number in tree.blobs})
        wanted = array("q")
        for number in numbers:
            wanted.extend(s.blob_rows[3 * number : 3 * number + 3])
        return _rows((s.blob_names[number] for number in numbers), _CONTENT) == wanted
    finally:
        os.fchdir(here)
        os.close(here)


def blobs_between(s: Snapshot, first: int, end: int) -> bool:
    """Whether blobs of a range of numbers are as they were, by one stat each. The current folder is that of the blobs."""
    return _rows(s.blob_names[first:end], _CONTENT) == s.blob_rows[3 * first : 3 * end]


def _every_blob(s: Snapshot) -> bool:
    return blobs_between(s, 0, len(s.blob_names))


def touch(s: Snapshot, trees: Iterable[Tree]) -> None:
    """Record the use of trees, for eviction, as an observation does."""
    for tree in trees:
        mark = f"{s.root}/state/used/{tree.id}"
        try:
            try:
                os.utime(mark, follow_symlinks=False)
            except FileNotFoundError:
                os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644))
        except OSError:
            pass  # a store that cannot be written to keeps no such record


# ---- taking


class Unsettled(Exception):
    """Something changed too lately, or is not where a snapshot can tell a change."""


def control_identities(names: Sequence[str], before_ns: int) -> array[int]:
    """Identities of files and folders that last changed clearly before a time. Raises Unsettled, OSError."""
    rows = array("q")
    for name in names:
        row = _identity(name)
        _require_settled(row[4:], before_ns)
        rows.extend(row)
    return rows


def folder_identities(names: Iterable[str], before_ns: int) -> array[int]:
    """The same for folders of trees."""
    rows = array("q")
    for row in map(_FOLDER_IDENTITY, map(os.lstat, names)):
        _require_settled(row[2:], before_ns)
        rows.extend(row)
    return rows


def content_identities(names: Iterable[str], before_ns: int) -> array[int]:
    """The same for files of trees that are not a blob's inode. Raises Unsettled, OSError."""
    rows = array("q")
    for found in map(os.lstat, names):
        _require_settled((found.st_ctime_ns,), before_ns)
        rows.extend(_CONTENT(found))
    return rows


def _require_settled(times: Sequence[int], before_ns: int) -> None:
    # A time without a fraction is that of a file system with whole seconds (ext4 with inodes of 128 bytes).
    if any(time + (0 if time % _SECOND_NS else _SECOND_NS) > before_ns - _RACY_NS for time in times):
        raise Unsettled


def write(snapshot: Snapshot) -> None:
    """Replace the snapshot; not synced, since losing it costs an observation. Raises OSError."""
    path = path_of(snapshot.root, snapshot.lockfile)
    temp = f"{os.path.dirname(path)}/.tmp-{os.getpid():x}-{os.urandom(4).hex()}"
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(encode(snapshot))
        os.replace(temp, path)
    except BaseException:
        os.unlink(temp)
        raise


def names_below(root: str, folders: Iterable[str]) -> Iterator[str]:
    """A tree's folder and those in it, by absolute path, in a stable order."""
    yield root
    for folder in sorted(folders):
        yield f"{root}/{folder}"
