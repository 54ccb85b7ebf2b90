"""Small files that are there whole or not at all, before and after a power cut."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path

import xxhash

from . import locks

UNFINISHED = ".tmp-"
"""How the names of files begin that are being written."""


def write_file(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace *path* by *data* in one step: write beside it, fsync, rename, fsync the folder.

    Durable on return. A crash leaves the old content or the new, and perhaps a ``.tmp-*`` neighbour, which is locked
    while its writer lives: ``remove_temp_files`` removes the others.
    """
    while not _replace(path, data, mode):
        pass
    fsync_folder(path.parent)


def _replace(path: Path, data: bytes, mode: int) -> bool:
    beside = path.with_name(f"{UNFINISHED}{secrets.token_hex(6)}")
    fd = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        locks.try_lock(fd, shared=False)
        os.fchmod(fd, mode)
        write_all(fd, data)
        os.fsync(fd)
        os.replace(beside, path)
    except FileNotFoundError:
        return False  # taken for the leftover of a dead writer, before it was locked or where locks lie
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    return True


def remove_temp_files(folders: Iterable[Path]) -> None:
    """Remove what ``write_file`` left in *folders* when it was killed. Raises OSError."""
    for folder in folders:
        for path in folder.glob(f"{UNFINISHED}*") if folder.is_dir() else ():
            if not locks.is_held(path):
                path.unlink(missing_ok=True)


_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_COMPRESS_FROM = 1 << 20  # below, loading the library takes longer than the bytes it saves take to write
_MOST_BYTES = 1 << 30


def seal(text: bytes) -> bytes:
    """A text of one line with its own checksum, so that a torn or altered file is told from a good one.

    A long one becomes a zstd frame, whose checksum serves: the inventory of 100,000 files halves, and it is written and
    synced twice for every change of its tree.
    """
    if len(text) >= _COMPRESS_FROM:
        import zstandard

        return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(text)
    return text + b"\n" + xxhash.xxh3_128_hexdigest(text).encode() + b"\n"


def unseal(raw: bytes) -> bytes:
    """The text that was sealed. Raises ValueError where the checksum does not hold."""
    if raw.startswith(_ZSTD_MAGIC):
        return _decompressed(raw)
    text, _, check = raw.rstrip(b"\n").rpartition(b"\n")
    if xxhash.xxh3_128_hexdigest(text).encode() != check:
        raise ValueError("its checksum does not hold")
    return text


def _decompressed(raw: bytes) -> bytes:
    import zstandard

    try:
        size = zstandard.frame_content_size(raw)
        if not 0 <= size <= _MOST_BYTES:  # what a frame declares is believed by the library, whatever cap is given
            raise ValueError(f"it declares {size:,} bytes")
        return zstandard.ZstdDecompressor().decompress(raw, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"its checksum does not hold ({error})") from error


def write_all(fd: int, data: bytes | memoryview, offset: int | None = None) -> None:
    """Write every byte; write(2) may do less than asked (a quota, a signal, RLIMIT_FSIZE)."""
    view = memoryview(data)
    while view:
        count = os.write(fd, view) if offset is None else os.pwrite(fd, view, offset)
        view = view[count:]
        if offset is not None:
            offset += count


def fsync_folder(path: Path | str) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
