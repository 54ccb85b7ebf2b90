"""The report of an apply, in figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from modelstow.cas import LinkKind

if TYPE_CHECKING:
    from .events import Displaced, Pruned, TreePublished, TreeRemoved


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """A damaged blob that was repaired. ``pieces`` are indexes; empty where the whole blob was fetched."""

    digest: str
    pieces: tuple[int, ...]
    fetched_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The figures of one apply. Sizes are bytes, times seconds."""

    fetched_blobs: int = 0
    fetched_bytes: int = 0  # from sources, for the content of blobs
    resumed_bytes: int = 0  # that partials saved
    repaired_bytes: int = 0
    reused_blobs: int = 0
    reused_bytes: int = 0
    linked_files: int = 0
    links: Mapping[LinkKind, int] = field(default_factory=dict)
    published: tuple[TreePublished, ...] = ()
    removed: tuple[TreeRemoved, ...] = ()
    displaced: tuple[Displaced, ...] = ()
    repairs: tuple[Repair, ...] = ()
    pruned: tuple[Pruned, ...] = ()
    seconds: float = 0.0


def link_counts(report: Report) -> dict[str, int]:
    """The number of files by kind of link; empty files, which are created, are not counted."""
    kinds = (LinkKind.HARDLINK, LinkKind.REFLINK, LinkKind.SYMLINK, LinkKind.COPY)
    return {kind.value: report.links.get(kind, 0) for kind in kinds}
