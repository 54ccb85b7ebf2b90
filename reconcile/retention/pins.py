"""Pins: users' requests to keep variants. One file a variant, in ``pins/`` and not in ``state/``, which may be lost."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from modelstow.cas import EMPTY, BlobStore, Digest
from modelstow.cas.durable import UNFINISHED, write_file
from modelstow.cas.records import INVALID, decode, encode, files_in, join_hex, split_hex, unreadable

_KIND = "pin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """A pin: one variant, and the digests that it had when it was pinned."""

    model: str  # name@version
    variant: str
    digests: frozenset[Digest]

    @property
    def name(self) -> str:
        """The variant: name@version#variant."""
        return f"{self.model}#{self.variant}"


def read(folder: Path) -> Iterator[Pin]:
    """All pins in a folder. Raises StoreStateError for one that cannot be read."""
    for path, raw in files_in(folder):
        try:
            head = decode(raw, _KIND, version=1)
            yield Pin(model=head["model"], variant=head["variant"], digests=frozenset(split_hex(head["digests"])))
        except INVALID as error:
            raise unreadable(path, error) from error


def pin(store: BlobStore, model: str, variant: str, digests: Iterable[Digest]) -> bool:
    """Pin a variant; False if it was pinned already. Durable on return."""
    path = _pin_path(store, model, variant)
    existed = path.exists()
    kept = join_hex(sorted(set(digests) - {EMPTY}))
    write_file(path, encode(_KIND, 1, {"model": model, "variant": variant, "digests": kept}))
    return not existed


def unpin(store: BlobStore, model: str, variant: str) -> bool:
    """Remove a pin; False if there was none."""
    try:
        _pin_path(store, model, variant).unlink()
    except FileNotFoundError:
        return False
    return True


def names(store: BlobStore) -> frozenset[str]:
    """The names of the pinned variants, without reading the pins."""
    try:
        return frozenset(unquote(name) for name in os.listdir(store.layout.pins) if not name.startswith(UNFINISHED))
    except FileNotFoundError:
        return frozenset()


def _pin_path(store: BlobStore, model: str, variant: str) -> Path:
    return store.layout.pins / quote(f"{model}#{variant}", safe="@")
