"""Digests: the sha256 that names a blob, and the digest mtime that is computed from it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

_HEX = re.compile(r"[0-9a-f]{64}\Z")
_PREFIX = "sha256:"

# The digest mtime is an even whole second between 1990-01-01 and 2020-01-01: far from any clock that runs today, and even
# because FAT stores no odd ones.
_MTIME_FIRST = 631_152_000
_MTIME_SLOTS = (1_577_836_800 - _MTIME_FIRST) // 2


class Digest(str):
    """The name of some bytes, in its one canonical text form: ``sha256:<64 lower-case hex>``.

    Two blobs are the same blob if and only if their digests are equal. A str, because a lockfile holds a hundred
    thousand of them: hashing and comparing then happen in C, and JSON needs no conversion.
    """

    __slots__ = ()

    @classmethod
    def parse(cls, text: object) -> Digest:
        """The digest in canonical text form. Raises ValueError that names the part that is wrong."""
        if not isinstance(text, str):
            raise ValueError(f"a digest is text, not {type(text).__name__}")
        algorithm, colon, hex_ = text.partition(":")
        if not colon:
            raise ValueError(f"digest {text[:80]!r} has no algorithm; expected 'sha256:<64 hex digits>'")
        if algorithm != "sha256":
            raise ValueError(f"digest {text[:80]!r} uses unknown algorithm {algorithm[:20]!r}; known: sha256")
        if not _HEX.match(hex_):
            raise ValueError(f"digest {text[:80]!r} needs 64 lower-case hex digits, has {len(hex_)} characters")
        return cls(text)

    @classmethod
    def of_hex(cls, hex_: str) -> Digest:
        """The digest of 64 lower-case hex digits, which are not checked."""
        return cls(_PREFIX + hex_)

    @classmethod
    def of(cls, data: bytes | memoryview) -> Digest:
        """The digest of bytes in memory."""
        return cls(_PREFIX + hashlib.sha256(data).hexdigest())

    @classmethod
    def of_path(cls, path: str | Path) -> Digest:
        """The digest of a file's content. Raises OSError."""
        from .buffers import sha256_of_fd

        with open(path, "rb") as file:
            return cls(_PREFIX + sha256_of_fd(file.fileno()))

    @property
    def hex(self) -> str:
        """The 64 hex digits."""
        return self[len(_PREFIX) :]

    @property
    def short(self) -> str:
        """The first 12 hex digits, for messages only; never parsed."""
        return self[len(_PREFIX) : len(_PREFIX) + 12]

    @property
    def mtime(self) -> int:
        """The digest mtime, in whole seconds since 1970: the integrity stamp that a blob of this name carries.

        Any write through any link changes it. It can be forged, so it is no proof.
        """
        return _MTIME_FIRST + 2 * (int(self[len(_PREFIX) : len(_PREFIX) + 12], 16) % _MTIME_SLOTS)


EMPTY = Digest.of(b"")
"""The digest of zero bytes. Empty files are created, never linked, so the store keeps no blob of this name."""
