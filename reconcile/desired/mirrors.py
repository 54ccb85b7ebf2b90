"""Mirrors: places that hold blobs by digest, laid out like ``blobs/``. They are tried first and always verified."""

from __future__ import annotations

from collections.abc import Iterable

from modelstow.backends import join_locator
from modelstow.cas import Digest
from modelstow.cas.layout import TABLE_FROM

COMPRESSED_SUFFIX = ".pzst"
"""The suffix of the name of a compressed blob."""


def mirrored(mirror: str, digest: Digest) -> str:
    """The locator of a blob in a mirror."""
    return join_locator(mirror, f"sha256/{digest.hex[:2]}/{digest.hex}")


def addresses(mirrors: Iterable[str], digest: Digest, size: int) -> tuple[list[str], dict[str, str]]:
    """The locators of a blob of *size* bytes in mirrors, in the order to try them: the compressed one of each first.

    The second value maps each mirror's plain locator to its compressed one; small blobs have none.
    """
    plain = [mirrored(mirror, digest) for mirror in mirrors]
    compressed = {url: url + COMPRESSED_SUFFIX for url in plain} if size > TABLE_FROM else {}
    return [each for url in plain for each in (compressed.get(url), url) if each], compressed
