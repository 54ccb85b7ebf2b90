"""Corruption isolation: which sender corrupted a blob whose digest does not match, found without trusting any sender.

Only the digest of the whole is known; it does not say which piece is wrong. With one sender, that sender is corrupt.
With several, the usable one that sent the most pieces becomes the *reference source*: its pieces are kept, the others'
are invalidated and fetched again from it alone. Then either the digest matches, and every sender whose replaced piece had
another hash was corrupt; or it does not, and the reference source is corrupt, and everything is fetched again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .state import Held


class Isolation(NamedTuple):
    """The consequence of a digest mismatch."""

    invalidate: tuple[int, ...]  # pieces to fetch again
    corrupt: tuple[str, ...]  # senders that are proven corrupt


@dataclass(slots=True)
class CorruptionIsolation:
    """The corruption state of all senders of one blob: pure, neither clock nor I/O. Not safe for threads.

    A sender is a locator, or a name for pieces of an earlier run. *retrusts*: how often a corrupt source may serve again,
    where no other source can: a proxy in between may have been at fault.
    """

    retrusts: int
    reference: str | None = None  # the only source that may serve, while there is one
    _corrupt: set[str] = field(default_factory=set)
    _retrusted: dict[str, int] = field(default_factory=dict)  # by locator: how often
    _replaced: dict[int, Held] = field(default_factory=dict)  # by piece: what the reference source replaces

    def may_serve(self, locator: str) -> bool:
        """Whether this source may be requested: it is not corrupt, and no other is the reference source."""
        return locator not in self._corrupt and self.reference in (None, locator)

    def digest_mismatch(self, held: Mapping[int, Held], usable: Sequence[str]) -> Isolation:
        """Isolate the corruption of a blob whose pieces are all *held* and whose digest does not match.

        *usable*: sources with attempts left; of those that sent equally many pieces the first becomes the reference source.
        """
        senders = [piece.sender for piece in held.values()]
        several = len(set(senders)) > 1
        if several and self.reference is None:
            able = [locator for locator in usable if locator in senders and locator not in self._corrupt]
            if able:
                self.reference = max(able, key=senders.count)
                others = {index: piece for index, piece in held.items() if piece.sender != self.reference}
                self._replaced |= others
                return Isolation(tuple(others), ())
        # Of several senders none of which can serve again, no one is marked: another may have been the corrupt one.
        corrupt = () if several and self.reference is None else (self.reference or senders[0],) if senders else ()
        for sender in corrupt:
            self.mark_corrupt(sender)
        return Isolation(tuple(held), corrupt)

    def verified(self, held: Mapping[int, Held]) -> tuple[str, ...]:
        """The senders that are proven corrupt by a digest that matches: those whose replaced piece had another hash."""
        return tuple(dict.fromkeys(old.sender for index, old in self._replaced.items() if held[index].hash != old.hash))

    def mark_corrupt(self, sender: str) -> None:
        """Exclude a sender that is proven corrupt; a reference source is one no longer."""
        self._corrupt.add(sender)
        self.release_reference(sender)

    def release_reference(self, locator: str) -> None:
        """Let the other sources serve again if this one, which cannot any more, was the reference source."""
        if self.reference == locator:
            self.reference = None

    def retrust(self, usable: Iterable[str]) -> None:
        """Let corrupt sources serve again, each at most ``retrusts`` times. For when no other source can serve."""
        for locator in self._corrupt.intersection(usable):
            if self._retrusted.get(locator, 0) < self.retrusts:
                self._retrusted[locator] = self._retrusted.get(locator, 0) + 1
                self._corrupt.remove(locator)
