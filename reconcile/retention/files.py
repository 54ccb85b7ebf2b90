"""The files that keep blobs, as bytes: each is a root by itself, and one that cannot be read stops garbage collection."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from modelstow.cas import Digest, StoreStateError
from modelstow.cas.durable import UNFINISHED

UNREADABLE = (ValueError, KeyError, TypeError, IndexError, RecursionError)
"""What decoding one may raise."""


def digests_of(hexes: str) -> frozenset[Digest]:
    """Digests that were written one behind the other. Raises ValueError."""
    return frozenset(Digest.of_hex(hexes[at : at + 64]) for at in range(0, len(hexes), 64))


def files_in(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Each file with its content. Raises StoreStateError for one that cannot be read."""
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return
    for name in names:
        if not name.startswith(UNFINISHED):
            try:
                yield folder / name, (folder / name).read_bytes()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise StoreStateError(f"root {folder / name} cannot be read: {error.strerror}") from error


def unreadable(path: Path, error: Exception) -> StoreStateError:
    return StoreStateError(
        f"root {path} cannot be read ({error}), so nothing may be deleted",
        hint="use the modelstow that wrote it, or `modelstow gc --forget` it by the file's name",
    )
