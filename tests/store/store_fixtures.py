"""What the store's tests share: bytes of every size, stores, half-finished partials, and damage on request."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from builders import PIECE, some_bytes

from modelstow.cas import BlobStore, Digest
from modelstow.cas.partial import Partial
from modelstow.cas.pieces import piece_hash

SMALL = b"a few bytes"
MIDDLE = some_bytes((1 << 20) + 1000, 11)
BIG = some_bytes(2 * PIECE + 12_345, 12)


root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")


def store_at(folder: Path, *, shared: bool = False) -> BlobStore:
    """A new store below *folder*."""
    return BlobStore.open(folder / "root", shared=shared)


def put(partial: Partial, data: bytes, *indexes: int) -> None:
    """Write some pieces of *data* into a partial and put them on record."""
    view = memoryview(data)
    for index in indexes:
        start, stop = partial.table.range(index)
        partial.write(start, view[start:stop])
        partial.finish(index, piece_hash(view[start:stop]), 7)


def partial_with(store: BlobStore, data: bytes, *indexes: int) -> Partial:
    """An open partial of *data* that holds some pieces."""
    partial = store.ingest.open(Digest.of(data), len(data))
    put(partial, data, *indexes)
    return partial


def flip(path: str | Path, at: int, *, forge: bool = False) -> None:
    """Flip a bit of a file's byte, as an edit (its mtime changes) or, with *forge*, as rot (it does not)."""
    before = os.stat(path)
    os.chmod(path, 0o644)
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.chmod(path, before.st_mode & 0o7777)
    if forge:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def age(path: str | Path, seconds: float) -> None:
    """Make a file look *seconds* older than now."""
    import time

    then = time.time() - seconds
    os.utime(path, (then, then), follow_symlinks=False)


@contextmanager
def mounted(folder: Path, *how: str) -> Iterator[Path]:
    """Something mounted on *folder* while the block runs; skips where that cannot be had."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *how, str(folder)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount {how}: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """Another umask while the block runs."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
