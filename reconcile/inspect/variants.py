"""The variants of a lockfile with their state on disk, size and pin, as `ls` lists them."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..desired.lockfile import Lockfile
from ..desired.selectors import VariantId
from ..planning.state import ModelState, VariantStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantEntry:
    """One locked variant. ``bytes`` counts each of its blobs once, optional components included."""

    model: str  # name@version
    variant: str
    state: ModelState
    path: Path  # of its tree, whether it exists or not
    bytes: int
    pinned: bool  # by the user or the manifest


def list_variants(lock: Lockfile, statuses: Iterable[VariantStatus], pinned: Container[VariantId]) -> list[VariantEntry]:
    """One entry for each status, in order; *pinned* holds the user's pins."""
    entries = []
    for status in statuses:
        model = lock.models[status.model]
        digests = set(model.variants[status.variant].files.values())
        entries.append(
            VariantEntry(
                model=status.model,
                variant=status.variant,
                state=status.state,
                path=status.local_path,
                bytes=sum(lock.blobs[digest].size for digest in digests),
                pinned=model.pin or VariantId(status.model, status.variant) in pinned,
            )
        )
    return entries
