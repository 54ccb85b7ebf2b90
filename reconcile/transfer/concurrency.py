"""Concurrency control: connections for one blob, connections of one run, and whether another thread would help."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock


class Connections:
    """A counting semaphore that never blocks: the run's *most* connections. Safe for threads.

    The thread that fetches a blob has taken one for it. For more, a download takes what is free, one for each worker.
    """

    def __init__(self, most: int) -> None:
        self.most, self._free, self._mutex = most, most, Lock()

    def take(self) -> bool:
        """Take a permit for one connection; False if none is free."""
        with self._mutex:
            taken = self._free > 0
            self._free -= taken
            return taken

    @property
    def used(self) -> int:
        """The number of permits taken."""
        return self.most - self._free

    def give(self) -> None:
        """Return a permit. Any thread may, once for each that was taken."""
        with self._mutex:
            self._free += 1


_SAMPLE_S, _SAMPLE_BYTES = 0.05, 1 << 19  # a rate is measured over at least both, or ...
_LONG_SAMPLE_S = 0.2  # ... over this
_PROBE_S = 1.0  # the time in which more connections must show a gain
_GAIN = 1.15  # the least factor that counts as a gain
_NEARLY = 0.7
_QUIET_S, _LONGEST_QUIET_S = 5.0, 60.0  # between a probe without a gain and the next


@dataclass(slots=True)
class ConcurrencyController:
    """A hill-climbing controller of one blob's connections: 1, then 4, 8, … up to *most* while each step gains 15 %.

    No step is tried where bytes arrive at half the rate of sha256 or more: another connection could at best double a rate
    that hashing cannot follow, and would take processor time from it. Nor near the user's rate limit: what is in flight
    when a range is divided is lost. Not safe for threads.
    """

    most: int
    allowed: int = 1
    _sample: tuple[float, int] | None = None  # when the present sample began, and the bytes received until then
    _probe: tuple[int, float] | None = None  # the connections and the rate before the step that is being tried
    _probe_began_at: float = 0.0
    _quiet_until: float = 0.0
    _quiet_s: float = _QUIET_S

    def update(self, now: float, received: int, running: int, hash_rate: float | None, limit: float | None = None) -> int:
        """The connections allowed at *now* (monotonic seconds), after *received* bytes in all, with *running* connections.

        Rates in bytes a second: *hash_rate* of sha256, None before it is known; *limit* for this blob, None for none.
        """
        if self._sample is None:
            self._sample = (now, received) if received else None  # from the first byte on
            return self.allowed
        began_at, before = self._sample
        if now - began_at < (_SAMPLE_S if received - before >= _SAMPLE_BYTES else _LONG_SAMPLE_S):
            return self.allowed
        self._sample = (now, received)
        rate = (received - before) / (now - began_at)
        if self._probe is not None:
            self._judge(now, rate, running)
        elif now >= self._quiet_until and running >= self.allowed < self.most and _could_double(rate, hash_rate, limit):
            self._grow(now, rate)
        return self.allowed

    def _judge(self, now: float, rate: float, running: int) -> None:
        assert self._probe is not None
        connections, before = self._probe
        if rate >= before * _GAIN:
            self._probe, self._quiet_s = None, _QUIET_S
            if running >= self.allowed < self.most:
                self._grow(now, rate)
        elif now - self._probe_began_at >= _PROBE_S:
            self.allowed, self._probe = connections, None
            if running <= connections:
                return  # no connection was free: the probe says nothing
            self._quiet_until, self._quiet_s = now + self._quiet_s, min(2 * self._quiet_s, _LONGEST_QUIET_S)

    def _grow(self, now: float, rate: float) -> None:
        self._probe, self._probe_began_at = (self.allowed, rate), now
        self.allowed = min(self.most, max(4, 2 * self.allowed))


def _could_double(rate: float, hash_rate: float | None, limit: float | None) -> bool:
    return (hash_rate is None or 2 * rate < hash_rate) and (limit is None or rate < _NEARLY * limit)


_BUSY = 0.7  # of one processor: Python runs one thread at a time, and ...
_BUSY_ALONE = 0.5  # ... where this is all the work, two threads lose much of the gain to waiting for each other


class IdleDetector:
    """A detector of processor idle time: whether another worker thread could run.

    *one_works*: the first worker does all the work itself. Then its own processor time counts where most of the process's
    is spent elsewhere, by the caller's other threads.
    """

    def __init__(self, *, one_works: bool) -> None:
        self._one_works = one_works
        self._at, self._worked = time.monotonic(), time.process_time()
        self._clock, self._own = 0, 0.0  # of the first worker, where the system has one for each thread

    def watch_this_thread(self) -> None:
        """Declare the calling thread a worker."""
        if self._one_works and not self._clock and hasattr(time, "pthread_getcpuclockid"):
            self._clock = time.pthread_getcpuclockid(threading.get_ident())

    def seen(self) -> bool:
        """Whether the process was idle since the last call."""
        at, worked, own = time.monotonic(), time.process_time(), self._own
        if self._clock:
            with suppress(OSError):  # the thread has ended
                own = time.clock_gettime(self._clock)
        passed = max(at - self._at, 1e-6)
        share, own_share = (worked - self._worked) / passed, (own - self._own) / passed
        alone = bool(self._clock) and worked - self._worked > 2 * (own - self._own)  # most of the work is not the worker's
        self._at, self._worked, self._own = at, worked, own
        return share < (_BUSY_ALONE if self._one_works else _BUSY) or (alone and own_share < _BUSY_ALONE)
