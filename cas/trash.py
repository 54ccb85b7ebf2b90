"""What is on its way out: folders that hold nothing but our links, each with its inventory, for readers inside them."""

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

_INVENTORY = ".inventory"


def put(layout: Layout, folder: Path, record: Inventory) -> bool:
    """Rename a folder that holds nothing but ours into ``trash/``, with its inventory; False across file systems, and
    where the disk is so full that the inventory cannot be written: what is to be freed may be all that would help."""
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


def content(layout: Layout) -> Iterator[tuple[Path, Inventory, float]]:
    """Folders in the trash with their inventories and ages in seconds (never negative)."""
    try:
        names = sorted(os.listdir(layout.trash))
    except FileNotFoundError:
        return
    for name in names:
        if name.endswith(_INVENTORY):
            path = layout.trash / name
            try:
                record = read_inventory(path)
            except StoreStateError:  # it cannot be told whose what is: it stays, and does not stop gc
                continue
            with suppress(FileNotFoundError):  # another empties it too
                if record is not None:
                    yield path, record, max(0.0, time.time() - path.stat().st_mtime)


def empty(layout: Layout, *, older_than_s: float = 0.0, tree: str | None = None) -> None:
    """Remove what has been in the trash long enough, or only what was the one *tree*.

    What is not ours goes to quarantine, nothing is lost. Raises OSError.
    """
    for note, record, age in list(content(layout)):
        if age < older_than_s or tree not in (None, record.tree):
            continue
        folder = note.with_name(note.name.removesuffix(_INVENTORY))
        if not remove_managed(folder, record.files, Quarantine(layout.quarantine, "trash")):
            os.rename(folder, layout.quarantine / folder.name)
        note.unlink(missing_ok=True)
