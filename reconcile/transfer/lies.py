"""Proven lies, by source and digest, remembered on disk: another process need not be sent_corrupt_data to again.

Only what was proven is shared: a source that could not be reached, or refused, may serve a neighbour who has the token.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from modelstow.backends import redact
from modelstow.cas import Digest
from modelstow.cas.durable import seal, unseal, write_file

KEPT_S = 7 * 86_400.0
"""How long a lie counts: the source may have been mended."""


@dataclass(slots=True)
class BadSources:
    """One file a digest in *folder*, safe for threads. What cannot be read or written is no lie: it costs a download."""

    folder: Path
    clock: Callable[[], float] = time.time
    _known: frozenset[str] | None = None  # the files that there are, looked at once
    _mutex: Lock = field(default_factory=Lock)

    def of(self, digest: Digest) -> frozenset[str]:
        """The redacted locators that sent wrong bytes for this digest lately."""
        with self._mutex:
            known, now = self._read(digest), self.clock()
        return frozenset(locator for locator, at in known.items() if abs(now - at) < KEPT_S)

    def note(self, digest: Digest, locator: str) -> None:
        """A source was proven to have sent wrong bytes."""
        with self._mutex:
            self._write(digest, {**self._read(digest), redact(locator): self.clock()})

    def clear(self, digest: Digest, locators: frozenset[str]) -> None:
        """Sources sent the right bytes."""
        with self._mutex:
            known = self._read(digest)
            if honest := {redact(locator) for locator in locators} & known.keys():
                self._write(digest, {locator: at for locator, at in known.items() if locator not in honest})

    def _read(self, digest: Digest) -> dict[str, float]:
        if self._known is None:
            try:
                self._known = frozenset(os.listdir(self.folder))
            except OSError:
                self._known = frozenset()
        if digest.hex not in self._known:
            return {}
        try:
            rows = json.loads(unseal((self.folder / digest.hex).read_bytes()))
            return {str(locator): float(at) for locator, at in rows.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _write(self, digest: Digest, rows: dict[str, float]) -> None:
        path, self._known = self.folder / digest.hex, None
        try:
            if rows:
                write_file(path, seal(json.dumps(rows, sort_keys=True).encode()))
            else:
                os.unlink(path)
        except OSError:
            return
