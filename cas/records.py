"""Records: the one encoding, versioned and checksummed, of the small files that hold a store's state.

A record is one line of JSON, an object with the keys ``kind`` and ``version`` and the fields of that kind, followed by a
line with the xxh3-128 of the first in hex. From 1 MiB on it is a zstd frame of that JSON instead, which has a checksum
of its own. So readers recognise a torn or altered file, and one of a later version.

Inventories, roots, pins, leases, corrupt-source records and the hash cache are records.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from .digest import Digest
from .durable import UNFINISHED
from .errors import Cause, StoreStateError
from .untrusted import EVERYBODY, MOST_BYTES, Writers, read_state

_T = TypeVar("_T")

INVALID = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError, MemoryError)
"""The errors of ``decode``, and of reading fields of the wrong shape."""

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_COMPRESS_FROM = 1 << 20  # below, loading the library takes longer than the bytes it saves take to write


def encode(kind: str, version: int, fields: Mapping[str, object]) -> bytes:
    """The bytes of a record. Keeps paths that are not Unicode (surrogate escapes)."""
    document = {"kind": kind, "version": version, **fields}
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
    if len(text) >= _COMPRESS_FROM:
        import zstandard

        # The inventory of 100,000 files halves, and it is written and synced at every change of its tree.
        return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(text)
    return text + b"\n" + xxhash.xxh3_128_hexdigest(text).encode() + b"\n"


def decode(raw: bytes, kind: str, *, version: int) -> dict[str, Any]:
    """The fields of a record. Raises ValueError if it is torn, altered, or of another kind or version.

    Records of modelstow 0.1 have no version, and most no kind: they are read as version 1.
    """
    fields = json.loads(_verified(raw))
    if not isinstance(fields, dict):
        raise ValueError("it is not a record")
    found_kind, found_version = fields.pop("kind", kind), fields.pop("version", 1)
    if found_kind != kind or found_version != version:
        raise ValueError(
            f"it is a record of kind {found_kind!r}, version {found_version!r}, which this version does not know"
        )
    return fields


def _verified(raw: bytes) -> bytes:
    if raw.startswith(_ZSTD_MAGIC):
        return _decompressed(raw)
    text, _, check = raw.rstrip(b"\n").rpartition(b"\n")
    if xxhash.xxh3_128_hexdigest(text).encode() != check:
        raise ValueError("its checksum does not match")
    return text


def _decompressed(raw: bytes) -> bytes:
    import zstandard

    try:
        size = zstandard.frame_content_size(raw)
        if not 0 <= size <= MOST_BYTES:  # the library trusts what a frame declares, whatever limit it is given
            raise ValueError(f"it declares {size:,} bytes")
        return zstandard.ZstdDecompressor().decompress(raw, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"its checksum does not match ({error})") from error


# ---- digests in records


def join_hex(digests: Iterable[Digest]) -> str:
    """Digests as one string, 64 hex digits each: short, and quick to read from JSON."""
    return "".join(digest.hex for digest in digests)


def split_hex(hexes: str) -> list[Digest]:
    """The digests in a string of ``join_hex``. Raises ValueError for a length that is not a multiple of 64."""
    check_hex(hexes)
    return [Digest.of_hex(hexes[at : at + 64]) for at in range(0, len(hexes), 64)]


def check_hex(hexes: str) -> None:
    """Raises one of ``INVALID`` for anything but digests in a row: a path is made of them."""
    if len(hexes) % 64:
        raise ValueError("its digests are cut off")
    if hexes.encode().translate(None, b"0123456789abcdef"):
        raise ValueError("its digests are not lower-case hex")


def check_path(path: str) -> None:
    """Raises one of ``INVALID`` for anything but an absolute path in its shortest form."""
    if not path.startswith("/") or "\0" in path or os.path.normpath(path) != path:
        raise ValueError(f"{path[:80]!a} is not an absolute path")
    path.encode("utf-8", "surrogateescape")


# ---- folders of records, each of which is a root for garbage collection


def files_in(folder: Path) -> list[Path]:
    """The record files of a folder, sorted by name. Raises OSError."""
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    return [folder / name for name in names if not name.startswith(UNFINISHED)]


def read_root(path: Path, decode: Callable[[bytes], _T], writers: Writers = EVERYBODY) -> _T | None:
    """The root in a record file; None where the file is gone. Raises StoreStateError where it cannot be read: what it keeps
    is unknown then, so nothing may be deleted."""
    try:
        return decode(read_state(path, writers))
    except FileNotFoundError:
        return None
    except (OSError, *INVALID) as error:
        what = f"root {path} cannot be read ({reason(error)}), so nothing may be deleted"
        raise StoreStateError(what, cause=Cause.ROOT_UNREADABLE) from error


def reason(error: BaseException) -> str:
    """Why a record cannot be read, for a message that names the file."""
    return str((error.strerror if isinstance(error, OSError) else "") or error or type(error).__name__)
