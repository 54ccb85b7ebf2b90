"""The trash: removed trees with their inventories, kept for a while for processes that still read in them."""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .durable import fsync_folder, write_file
from .errors import FULL, StoreStateError
from .inventory import Inventory, read_inventory
from .layout import Layout
from .tree import Quarantine, remove_managed
from .untrusted import EVERYBODY, Writers

_INVENTORY = ".inventory"


def put(layout: Layout, folder: Path, record: Inventory) -> bool:
    """Rename a folder of managed files into ``trash/``, with its inventory; durable on return.

    False, with nothing moved, if the folder is on another file system or may not be moved, or if a full disk cannot take
    the inventory: the caller then deletes in place, which may be what frees space. Raises OSError.
    """
    name = f"{int(time.time())}-{secrets.token_hex(6)}"
    note = layout.trash / (name + _INVENTORY)
    try:
        write_file(note, record.encode())
    except OSError as error:
        if error.errno in FULL:
            return False
        raise
    try:
        os.rename(folder, layout.trash / name)
    except OSError as error:
        note.unlink(missing_ok=True)
        if error.errno in (errno.EXDEV, errno.EACCES, errno.EPERM):
            return False
        raise
    fsync_folder(layout.trash)
    return True


def content(layout: Layout, writers: Writers = EVERYBODY) -> Iterator[tuple[Path, Inventory, float]]:
    """Trees in the trash: the path of the inventory, the inventory, and its age in seconds (never negative)."""
    try:
        names = sorted(os.listdir(layout.trash))
    except FileNotFoundError:
        return
    for name in names:
        if name.endswith(_INVENTORY):
            path = layout.trash / name
            try:
                record = read_inventory(path, writers)
            except StoreStateError:  # which files are managed is unknown: they stay, and do not stop gc
                continue
            with suppress(FileNotFoundError):  # another process empties it too
                if record is not None:
                    yield path, record, max(0.0, time.time() - os.lstat(path).st_mtime)


def empty(layout: Layout, writers: Writers = EVERYBODY, *, older_than_s: float = 0.0, tree: str | None = None) -> None:
    """Remove trees older than *older_than_s* seconds from the trash, or only those that were *tree*.

    Files that are not as the inventory says go to quarantine. Raises OSError.
    """
    for note, record, age in list(content(layout, writers)):
        if age < older_than_s or tree not in (None, record.tree):
            continue
        folder = note.with_name(note.name.removesuffix(_INVENTORY))
        if not remove_managed(folder, record.files, Quarantine(layout.quarantine, "trash")):
            os.rename(folder, layout.quarantine / folder.name)
        note.unlink(missing_ok=True)
