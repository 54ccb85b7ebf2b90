"""Pins: users' requests to keep variants. One file a variant, in ``pins/`` and not in ``state/``, which may be lost."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from modelstow.cas import EMPTY, BlobStore, Digest
from modelstow.cas.durable import UNFINISHED, write_file
from modelstow.cas.records import decode, encode, files_in, join_hex, read_root, split_hex

from ..desired.selectors import VariantId

_KIND = "pin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """A pin: one variant, and the digests that it had when it was pinned."""

    id: VariantId
    digests: frozenset[Digest]


def read(store: BlobStore) -> list[Pin]:
    """All pins of a store. Raises StoreStateError for one that cannot be read."""
    found = (read_root(path, _decode, store.writers) for path in files_in(store.layout.pins))
    return [pin for pin in found if pin is not None]


def _decode(raw: bytes) -> Pin:
    head = decode(raw, _KIND, version=1)
    id_ = VariantId.parse(head["model"] + "#" + head["variant"])
    return Pin(id=id_, digests=frozenset(split_hex(head["digests"])))


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
