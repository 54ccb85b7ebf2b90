"""Fault injection for any source."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from threading import Lock

from .errors import ConnectionFailed, SourceError
from .source import Body, Source, Wrapper, replaced


class FaultySource(Wrapper):
    """A source with injected faults, each used once, in order; after them it behaves.

    ``cuts``: each drops the connection of one body after that many bytes. ``failures``: each is
    raised by one ``open``. ``corrupt(locator, offset, view)`` may change bytes in place.
    """

    def __init__(
        self,
        inner: Source,
        *,
        cuts: Iterable[int] = (),
        failures: Iterable[SourceError] = (),
        corrupt: Callable[[str, int, memoryview], None] | None = None,
        ignore_ranges: bool = False,
    ) -> None:
        super().__init__(inner)
        self._cuts, self._failures = list(cuts), list(failures)
        self._corrupt, self._ignore_ranges = corrupt, ignore_ranges
        self._mutex = Lock()
        self.opened_at: list[tuple[str, int]] = []

    def open(self, locator: str, *, start: int = 0, stop: int | None = None) -> Body:
        with self._mutex:
            self.opened_at.append((locator, start))
            failure = self._failures.pop(0) if self._failures else None
            remaining = self._cuts.pop(0) if self._cuts and failure is None else None
        if failure is not None:
            raise failure
        body = self._inner.open(locator) if self._ignore_ranges else self._inner.open(locator, start=start, stop=stop)
        at = body.start

        def read_into(view: memoryview) -> int:
            nonlocal remaining, at
            if remaining == 0:
                raise ConnectionFailed("connection dropped", locator=locator)
            count = body.read_into(view if remaining is None else view[:remaining])
            if self._corrupt is not None and count:
                self._corrupt(locator, at, view[:count])
            at += count
            remaining = None if remaining is None else remaining - count
            return count

        return replaced(body, read_into, ranged=not self._ignore_ranges)
