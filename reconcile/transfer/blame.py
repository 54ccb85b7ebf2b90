"""What is held against the sources of one blob: noted as it happens, remembered where it concerns others, and told."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress

from modelstow.backends import SourceError, redact

from ..events.events import SourceFailed
from .compressed import CompressedForms
from .context import BlobRequest, TransferContext
from .retry import Failure


class FailureAttribution:
    """``note``, ``clear`` and ``right`` are called under the download's lock, ``tell`` outside of it."""

    def __init__(
        self, engine: TransferContext, wanted: BlobRequest, locators: Mapping[str, str], pairs: CompressedForms
    ) -> None:
        self._engine, self._wanted, self._locators, self._pairs = engine, wanted, locators, pairs
        self._lied: dict[str, set[int]] = {}  # who sent wrong bytes, and the pieces that it has not sent right since
        self._untold = deque[tuple[str, Failure]]()

    def late(self) -> frozenset[str]:
        """Who failed lately, or lied about this blob: asked last."""
        failures, lies = self._engine.failures, self._engine.lies.of(self._wanted.digest)
        failed = self._locators if failures.any else ()  # mostly nothing is on record: then nobody looks up keys
        late = {locator for locator in failed if any(key in failures for key in self._keys(locator))}
        return frozenset(late | {locator for locator in self._locators if redact(locator) in lies})

    def spent(self, late: Iterable[str]) -> frozenset[str]:
        """Of those, who had no attempt left."""
        return frozenset(locator for locator in late if self._engine.failures.given_up(self._keys(locator)))

    def note(
        self, locator: str, fact: Failure, *, exactly: bool = False, given_up: bool = False, wrong: Iterable[int] = ()
    ) -> None:
        """A source failed: *exactly* at this locator, else what fails together with it; *wrong* pieces were lies."""
        if locator not in self._locators:
            return
        if self._pairs.shows_absence(locator, fact):
            plain = self._pairs.note_absent(locator)
            if plain is None:
                return
            locator, exactly = plain, True
        corrupt = fact.code == "CHECKSUM_FAIL"
        if corrupt:
            self._lied.setdefault(locator, set()).update(wrong)
        key = self._keys(locator)[0 if exactly or corrupt else 1]
        self._engine.failures.note(key, fact.code, fact.what, given_up=given_up)
        self._untold.append((locator, fact))

    def right(self, locator: str, piece: int) -> None:
        """A source sent a piece that may be right now."""
        if lies := self._lied.get(locator):
            lies.discard(piece)

    def clear(self, senders: Iterable[str]) -> None:
        """The blob is proven: whoever sent something of it, and nothing wrong, serves well."""
        lied = {locator for locator, pieces in self._lied.items() if pieces}
        honest = (frozenset(senders) & self._locators.keys()) - lied
        if self._engine.failures.any:
            self._engine.failures.clear(key for locator in honest for key in self._keys(locator))
        self._engine.lies.clear(self._wanted.digest, honest)

    def tell(self) -> None:
        """Write down and show what was noted: a disk and a terminal take their time."""
        with suppress(IndexError):  # told by now, by whoever was first
            while True:
                locator, fact = self._untold.popleft()
                corrupt = fact.code == "CHECKSUM_FAIL"
                if corrupt:
                    self._engine.lies.note(self._wanted.digest, locator)
                self._engine.emit(SourceFailed(locator=redact(locator), what=fact.what, corrupt=corrupt))

    def _keys(self, locator: str) -> tuple[str, str]:
        """Under what a failure of this locator may be on record: itself, and what fails together with it."""
        try:
            return redact(locator), redact(self._engine.registry.find(locator).origin(locator))
        except SourceError:
            return redact(locator), redact(locator)
