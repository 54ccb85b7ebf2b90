"""Reading a body by steps that fit its rate, and not for ever: a server that drips would never time out by itself."""

from __future__ import annotations

from collections.abc import Callable

from modelstow.backends import Body, ProtocolError, TimedOut

from .retry import RetryPolicy

MOST_STEP = 1 << 20
FIRST_STEP, _LEAST_STEP = 1 << 16, 1 << 14
_QUICK_S, _SLOW_S = 0.005, 0.1  # a large read returns when its buffer is full: it should take neither less nor more

SOURCE_BUGS = (ValueError, KeyError, TypeError, AttributeError)
"""What a source may raise that stumbles over an answer. What others raise, a caller's progress callback say, is theirs."""


def malformed_response(error: Exception, locator: str) -> ProtocolError:
    return ProtocolError(f"its answer makes no sense ({type(error).__name__})", locator=locator)


class BodyReader:
    """One body, read by one thread."""

    def __init__(self, body: Body, locator: str, policy: RetryPolicy, clock: Callable[[], float]) -> None:
        self._body, self._locator, self._policy, self._clock = body, locator, policy, clock
        self._step = FIRST_STEP
        self._began, self._bytes = clock(), 0  # of the window in which the rate is looked at

    def read(self, view: memoryview) -> int:
        """Put some bytes at the beginning of *view*; how many, 0 at the end. Raises SourceError, TimedOut among them."""
        before = self._clock()
        try:
            count = self._body.read_into(view[: self._step])
        except SOURCE_BUGS as error:
            raise malformed_response(error, self._locator) from error
        now = self._clock()
        if now - before < _QUICK_S:
            self._step = min(2 * self._step, MOST_STEP)
        elif now - before > _SLOW_S:
            self._step = max(self._step // 2, _LEAST_STEP)
        self._bytes += count
        floor, window_s = self._policy.floor_bytes_s, self._policy.floor_window_s
        if now - self._began >= window_s:
            if self._bytes < window_s * floor:
                raise TimedOut(f"less than {floor} bytes a second for {window_s:.0f} s", locator=self._locator)
            self._began, self._bytes = now, 0
        return count
