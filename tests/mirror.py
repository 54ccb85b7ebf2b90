"""Mirrors in tests: weights that compress as bf16 does, a store that holds them, and the content of a pushed folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from builders import IMPATIENT, PIECE, Cli, ensurer_of, lock_of, memory, some_bytes, write_lock

from modelstow.backends import Registry
from modelstow.cas import BlobStore, Digest
from modelstow.cas.chunking import DEFAULT, Chunking
from modelstow.cas.compressed import CompressedIndex, compress
from modelstow.reconcile.interop.push import Push

CONFIG = b'{"hidden_size": 384}'
_EXPONENTS = bytes(b"\x3c\x3d\xbc\xbd"[byte & 3] for byte in range(256))


def weights(size: int, seed: int = 0) -> bytes:
    """As of bf16: the low byte of each number is noise, the high byte one of a few."""
    data = bytearray(size)
    data[::2] = some_bytes((size + 1) // 2, seed)
    data[1::2] = some_bytes(size // 2, seed + 1).translate(_EXPONENTS)
    return bytes(data)


WEIGHTS = weights(2 * PIECE + 1001)
NOISE = some_bytes(PIECE + 7, seed=9)
FILES = {"config.json": CONFIG, "model.bin": WEIGHTS, "noise.bin": NOISE}


def filled(cli: Cli, files: Mapping[str, bytes] = FILES, *, sources: Iterable[str] = ("gone",)) -> Cli:
    """A command line whose store holds *files* as ``m@1#v``; its lockfile names sources where there is nothing."""
    lock = lock_of({"m@1": {"v": files}}, sources=["src"])
    (cli.folder / "src").mkdir()
    for path, data in files.items():
        (cli.folder / "src" / path).write_bytes(data)
    write_lock(cli.folder, lock)
    cli.ok("ensure", "m")
    shutil.rmtree(cli.folder / "src")
    write_lock(cli.folder, lock_of({"m@1": {"v": files}}, sources=list(sources)))
    return cli


def store_of(folder: Path, files: Mapping[str, bytes] = FILES) -> tuple[BlobStore, dict[Digest, int]]:
    """A store that holds *files*, and the sizes that a push of them takes."""
    ensurer_of(folder, lock_of({"m@1": {"v": files}}), memory(files)).ensure("m")
    return BlobStore.open(folder / "root"), {Digest.of(data): len(data) for data in files.values()}


def push_of(store: BlobStore, url: str | Path, **more: object) -> Push:
    """A push that never sleeps."""
    return Push(store=store, url=str(url), **{"policy": IMPATIENT, "registry": Registry(), **more})  # type: ignore[arg-type]


def name_of(data: bytes, suffix: str = "") -> str:
    """Where a mirror holds these bytes, below its address."""
    hex_ = Digest.of(data).hex
    return f"sha256/{hex_[:2]}/{hex_}{suffix}"


def names_in(mirror: Path) -> set[str]:
    """Every file of a mirror that is a folder."""
    return {str(path.relative_to(mirror)) for path in mirror.rglob("*") if path.is_file()}


def packed(data: bytes, *, as_if: bytes | None = None, chunking: Chunking = DEFAULT) -> tuple[CompressedIndex, bytes]:
    """A ``.pzst`` of *data*, and its index; *as_if*: it claims to be the pack of those bytes, of the same length."""
    frames = [compress(data[slice(*chunking.range(piece, len(data)))]) for piece in range(chunking.count(len(data)))]
    index = CompressedIndex.of(Digest.of(data if as_if is None else as_if), len(data), map(len, frames), chunking)
    return index, index.encode() + b"".join(frames)
