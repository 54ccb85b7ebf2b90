"""Mirrors: places that hold blobs by digest, laid out like ``blobs/``. They are asked first and trusted never."""

from __future__ import annotations

from collections.abc import Iterable

from modelstow.backends import join_locator
from modelstow.cas import Digest
from modelstow.cas.layout import TABLE_FROM

COMPRESSED_SUFFIX = ".pzst"
"""What the name of a blob's compressed form ends in."""


def mirrored(mirror: str, digest: Digest) -> str:
    """Where a mirror holds a blob."""
    return join_locator(mirror, f"sha256/{digest.hex[:2]}/{digest.hex}")


def addresses(mirrors: Iterable[str], digest: Digest, size: int) -> tuple[list[str], dict[str, str]]:
    """Where to ask mirrors for a blob, in order; and of these the compressed ones, by the plain one of the same mirror."""
    plain = [mirrored(mirror, digest) for mirror in mirrors]
    packed = {url: url + COMPRESSED_SUFFIX for url in plain} if size > TABLE_FROM else {}
    return [each for url in plain for each in (packed.get(url), url) if each], packed
