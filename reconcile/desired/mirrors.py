"""Mirrors: places that hold blobs by digest, laid out like ``blobs/``. They are tried first and always verified."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from modelstow.backends import join_locator
from modelstow.cas import Digest
from modelstow.cas.layout import TABLE_FROM

COMPRESSED_SUFFIX = ".pzst"
"""The suffix of the name of a compressed blob."""


def mirrored(mirror: str, digest: Digest) -> str:
    """The locator of a blob in a mirror."""
    return join_locator(mirror, f"sha256/{digest.hex[:2]}/{digest.hex}")


class MirrorProvider(Protocol):
    """A provider of the locators that mirrors have for a blob.

    It is asked for each blob when its fetch begins, so its answers may change during a run.

    Contract: ``locators`` may be called from any thread, several at once; the fetch waits for it, so it should answer
    soon. What it raises (any Exception) is reported, and the blob is fetched from its other mirrors and sources.
    """

    def locators(self, digest: Digest, size: int) -> Iterable[str]:
        """Locators of a blob of *size* bytes in the order to try them. Compressed blobs' end in ``COMPRESSED_SUFFIX``."""
        ...


@dataclass(frozen=True, slots=True)
class PrefixMirrors:
    """The mirrors at *places*, each laid out like ``blobs/``: the compressed form of a blob first, if it may have one."""

    places: tuple[str, ...]

    def locators(self, digest: Digest, size: int) -> Iterator[str]:
        for place in self.places:
            plain = mirrored(place, digest)
            if size > TABLE_FROM:
                yield plain + COMPRESSED_SUFFIX
            yield plain
