"""The difference between two lockfiles: what an upgrade would fetch, keep and drop."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from modelstow.cas import Digest

from ..desired.lockfile import Lockfile


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobGroup:
    """Blobs with the files that they are: ``files`` counts pairs of path and digest, ``bytes`` each blob once."""

    files: int
    bytes: int
    paths: tuple[str, ...]  # within the trees, sorted


@dataclass(frozen=True, slots=True, kw_only=True)
class LockfileDiff:
    """The blobs of two lockfiles: only in the new one, in both, only in the old one."""

    fetch: BlobGroup
    keep: BlobGroup
    drop: BlobGroup


def compare(old: Lockfile, new: Lockfile) -> LockfileDiff:
    """The difference of two lockfiles as values; no store is read."""
    return LockfileDiff(
        fetch=_group(new, new.blobs.keys() - old.blobs.keys()),
        keep=_group(new, new.blobs.keys() & old.blobs.keys()),
        drop=_group(old, old.blobs.keys() - new.blobs.keys()),
    )


def _group(lock: Lockfile, digests: Collection[Digest]) -> BlobGroup:
    variants = (variant for model in lock.models.values() for variant in model.variants.values())
    files = sorted({(path, digest) for variant in variants for path, digest in variant.files.items() if digest in digests})
    bytes_ = sum(lock.blobs[digest].size for digest in digests)
    return BlobGroup(files=len(files), bytes=bytes_, paths=tuple(path for path, _ in files))
