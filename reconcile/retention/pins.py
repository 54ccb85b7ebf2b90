"""What users want kept: one file a variant, with the digests that it had, beside ``blobs/`` and not in ``state/``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from modelstow.cas import EMPTY, BlobStore, Digest
from modelstow.cas.durable import UNFINISHED, seal, unseal, write_file

from .files import UNREADABLE, digests_of, files_in, unreadable


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """What the user wants kept: one variant and the digests it had."""

    model: str
    variant: str
    digests: frozenset[Digest]

    @property
    def name(self) -> str:
        return f"{self.model}#{self.variant}"


def read(folder: Path) -> Iterator[Pin]:
    """Every pin in a folder. Raises StoreStateError for one that cannot be read."""
    for path, raw in files_in(folder):
        try:
            head = json.loads(unseal(raw))
            yield Pin(model=head["model"], variant=head["variant"], digests=digests_of(head["digests"]))
        except UNREADABLE as error:
            raise unreadable(path, error) from error


def pin(store: BlobStore, model: str, variant: str, digests: Iterable[Digest]) -> bool:
    """Pin a variant; False if it was."""
    path = _pin_path(store, model, variant)
    there = path.exists()
    kept = "".join(digest.hex for digest in sorted(set(digests) - {EMPTY}))
    head = {"model": model, "variant": variant, "digests": kept}
    write_file(path, seal(json.dumps(head).encode()))
    return not there


def unpin(store: BlobStore, model: str, variant: str) -> bool:
    """Take a pin away; False if there was none."""
    try:
        _pin_path(store, model, variant).unlink()
    except FileNotFoundError:
        return False
    return True


def names(store: BlobStore) -> frozenset[str]:
    """The pinned variants by name, without reading the pins."""
    try:
        return frozenset(unquote(name) for name in os.listdir(store.layout.pins) if not name.startswith(UNFINISHED))
    except FileNotFoundError:
        return frozenset()


def _pin_path(store: BlobStore, model: str, variant: str) -> Path:
    return store.layout.pins / quote(f"{model}#{variant}", safe="@")
