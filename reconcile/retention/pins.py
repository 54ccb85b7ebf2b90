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

from ..desired.selectors import VariantId

_KIND = "pin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """A pin: one variant, and the digests that it had when it was pinned."""

    id: VariantId
    digests: frozenset[Digest]


def read(folder: Path) -> Iterator[Pin]:
    """All pins in a folder. Raises StoreStateError for one that cannot be read."""
    for path, raw in files_in(folder):
        try:
            head = decode(raw, _KIND, version=1)
            yield Pin(id=VariantId(head["model"], head["variant"]), digests=frozenset(split_hex(head["digests"])))
        except INVALID as error:
            raise unreadable(path, error) from error


def pin(store: BlobStore, id_: VariantId, digests: Iterable[Digest]) -> bool:
    """Pin a variant; False if it was pinned already. Durable on return."""
    path = _pin_path(store, id_)
    existed = path.exists()
    kept = join_hex(sorted(set(digests) - {EMPTY}))
    write_file(path, encode(_KIND, 1, {"model": id_.model, "variant": id_.variant, "digests": kept}))
    return not existed


def unpin(store: BlobStore, id_: VariantId) -> bool:
    """Remove a pin; False if there was none."""
    try:
        _pin_path(store, id_).unlink()
    except FileNotFoundError:
        return False
    return True


def variants(store: BlobStore) -> frozenset[VariantId]:
    """The pinned variants by the names of the pins, without reading them."""
    try:
        names = os.listdir(store.layout.pins)
    except FileNotFoundError:
        return frozenset()
    return frozenset(VariantId.parse(unquote(name)) for name in names if not name.startswith(UNFINISHED))


def _pin_path(store: BlobStore, id_: VariantId) -> Path:
    return store.layout.pins / quote(str(id_), safe="@")
