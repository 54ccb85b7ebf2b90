"""A bandwidth limit for any source; one budget may be shared by several."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock

from .source import Body, Source, Wrapper, replaced

_SLICE_S = 0.05  # seconds of budget per read, so that the rate is smooth


class RateBudget:
    """A rate limiter, shared by threads: ``bytes_per_s``. Tests inject clock and sleep."""

    def __init__(
        self,
        bytes_per_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.bytes_per_s = bytes_per_s
        self._clock, self._sleep, self._idle_at, self._mutex = clock, sleep, clock(), Lock()

    @property
    def slice(self) -> int:
        """Maximum bytes per read under this budget."""
        return max(1, int(self.bytes_per_s * _SLICE_S))

    def spend(self, count: int) -> None:
        """Block until the budget covers *count* bytes that were just received."""
        with self._mutex:
            self._idle_at = max(self._idle_at, self._clock()) + count / self.bytes_per_s
            wait = self._idle_at - self._clock()
        if wait > 0:
            self._sleep(wait)


class ThrottledSource(Wrapper):
    """A source whose bodies are limited to a budget's rate."""

    def __init__(self, inner: Source, budget: RateBudget) -> None:
        super().__init__(inner)
        self._budget = budget

    def open(self, locator: str, *, start: int = 0, stop: int | None = None) -> Body:
        body = self._inner.open(locator, start=start, stop=stop)

        def read_into(view: memoryview) -> int:
            count = body.read_into(view[: self._budget.slice])
            self._budget.spend(count)
            return count

        return replaced(body, read_into)
