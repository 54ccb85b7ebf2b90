"""What the questions are asked about: large files with their source, and trees of many small files in a full store."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from modelstow.cas import BlobStore, Digest
from modelstow.reconcile.desired.lockfile import LockedBlob, LockedModel, LockedVariant, Lockfile

from .measure import environment

FOLDERS = 256
_PIECE = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A folder with a lockfile and a store. ``tree`` is where the one variant stands once it is reconciled."""

    folder: Path
    lock: Lockfile

    @property
    def root(self) -> Path:
        return self.folder / "root"

    @property
    def tree(self) -> Path:
        return self.root / "models" / "bench@1.0.0" / "all"

    @property
    def env(self) -> dict[str, str]:
        return environment(self.root)


def lock_of(files: dict[str, tuple[Digest, int]], source: str) -> Lockfile:
    """A lockfile of one variant, ``bench@1.0.0#all``; *files* maps paths to digests and sizes in bytes."""
    blobs = {digest: LockedBlob(size=size, urls=(f"{source}/{path}",)) for path, (digest, size) in files.items()}
    variant = LockedVariant(files={path: digest for path, (digest, _) in files.items()})
    models = {"bench@1.0.0": LockedModel(variants={"all": variant}, default="all")}
    return Lockfile(manifest="", models=models, blobs=blobs)


def write_lock(folder: Path, lock: Lockfile) -> World:
    """Write the lockfile of a world."""
    (folder / "models.lock").write_text(lock.format())
    return World(folder=folder, lock=lock)


def small_files(folder: Path, count: int) -> World:
    """A store that holds *count* tiny blobs, each of its own content, and a lockfile that spreads them over 256 folders.

    The blobs are put in place directly, as a finished ingest leaves them: a hundred thousand fsyncs would be most of the
    preparation and no part of the question. The tree is not linked yet.
    """
    world = write_lock(folder, _small_lock(count))
    _put_tiny(world.root, count)
    return world


def many_models(folder: Path, models: int, *, files: int) -> World:
    """As ``small_files``, with *models* models of *files* files each: ``bench000@1.0.0#all`` and so on."""
    blobs: dict[Digest, LockedBlob] = {}
    locked: dict[str, LockedModel] = {}
    for number in range(models):
        tree = {f"file{n:02d}.bin": _tiny(number * files + n) for n in range(files)}
        blobs |= {Digest.of(data): LockedBlob(size=len(data), urls=("source/tiny",)) for data in tree.values()}
        variant = LockedVariant(files={path: Digest.of(data) for path, data in tree.items()})
        locked[f"bench{number:03d}@1.0.0"] = LockedModel(variants={"all": variant}, default="all")
    world = write_lock(folder, Lockfile(manifest="", models=locked, blobs=blobs))
    _put_tiny(world.root, models * files)
    return world


def _put_tiny(root: Path, count: int) -> None:
    store = BlobStore.open(root)
    store.prepare()
    for number in range(count):
        data = _tiny(number)
        digest = Digest.of(data)
        path = store.layout.blob(digest)
        with open(path, "wb") as file:
            file.write(data)
        os.chmod(path, 0o444)
        os.utime(path, (digest.mtime, digest.mtime))
    os.sync()


def _small_lock(count: int) -> Lockfile:
    files = {}
    for number in range(count):
        data = _tiny(number)
        files[f"part{number % FOLDERS:03d}/file{number:06d}.bin"] = (Digest.of(data), len(data))
    return lock_of(files, "source")


def _tiny(number: int) -> bytes:
    return b"tiny file number %d\n" % number


def large_file(path: Path, size: int, *, sparse: bool = False) -> Digest:
    """Write a file of *size* bytes of which no two pieces are alike; its digest.

    *sparse* writes one block of data in each MiB and leaves holes between: little disk, every byte still goes through
    whoever reads it.
    """
    noise, hasher = os.urandom(_PIECE), hashlib.sha256()
    block = (b"".join(noise[at : at + 4096].ljust(1 << 20, b"\0") for at in range(0, _PIECE, 1 << 20))) if sparse else noise
    with open(path, "wb") as file:
        for start in range(0, size, _PIECE):
            data = (start.to_bytes(8, "little") + block[8:])[: size - start]
            hasher.update(data)
            if sparse:
                _write_blocks(file.fileno(), data, start)
            else:
                file.write(data)
        file.truncate(size)
    return Digest.of_hex(hasher.hexdigest())


def _write_blocks(fd: int, data: bytes, start: int) -> None:
    for at in range(0, len(data), 1 << 20):
        os.pwrite(fd, data[at : at + 4096], start + at)
