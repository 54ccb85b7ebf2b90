"""How many connections a blob uses, and how many blobs are fetched at once: more while that helps."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock


class Connections:
    """The connections that no blob uses just now: whoever fetches a large one may take them. Safe for threads."""

    def __init__(self, most: int) -> None:
        self.most, self._free, self._mutex = most, most, Lock()

    def take(self) -> bool:
        """Take one; False if all are in use."""
        with self._mutex:
            taken = self._free > 0
            self._free -= taken
            return taken

    @property
    def used(self) -> int:
        """How many are taken."""
        return self.most - self._free

    def give(self) -> None:
        """Give one back."""
        with self._mutex:
            self._free += 1


_SAMPLE_S, _SAMPLE_BYTES = 0.05, 1 << 19  # a rate is known after both, or ...
_LONG_SAMPLE_S = 0.2  # ... after this
_PROBE_S = 1.0  # how long more connections may take to show that they help
_GAIN = 1.15  # what counts as help
_NEARLY = 0.7
_QUIET_S, _LONGEST_QUIET_S = 5.0, 60.0  # after a try that did not help


@dataclass(slots=True)
class ConcurrencyController:
    """Starts with one connection, then 4, 8, … up to *most*, as long as the rate grows by 15 % at each step.

    Where the bytes arrive at half the rate of sha256 or faster, another connection could at best double a rate that the
    proof cannot follow, and takes processor time from it: so it is not tried. Nor where the user's limit is nearly reached:
    what is on its way over a connection when its range is divided is lost.
    """

    most: int
    allowed: int = 1
    _from: tuple[float, int] | None = None  # when this sample began, and the bytes received until then
    _before: tuple[int, float] | None = None  # the step that is being tried: connections and rate before it
    _since: float = 0.0
    _quiet_until: float = 0.0
    _quiet_s: float = _QUIET_S

    def look(self, now: float, received: int, running: int, proof_rate: float | None, limit: float | None = None) -> int:
        """How many connections may run now. *received* bytes so far by *running*; *proof_rate*: sha256's bytes a second;
        *limit*: those that this blob may have, as far as that is limited."""
        if self._from is None:
            self._from = (now, received) if received else None  # from the first byte on
            return self.allowed
        began, before = self._from
        if now - began < (_SAMPLE_S if received - before >= _SAMPLE_BYTES else _LONG_SAMPLE_S):
            return self.allowed
        self._from = (now, received)
        rate = (received - before) / (now - began)
        if self._before is not None:
            self._judge(now, rate, running)
        elif now >= self._quiet_until and running >= self.allowed < self.most and _could_double(rate, proof_rate, limit):
            self._grow(now, rate)
        return self.allowed

    def _judge(self, now: float, rate: float, running: int) -> None:
        assert self._before is not None
        connections, before = self._before
        if rate >= before * _GAIN:
            self._before, self._quiet_s = None, _QUIET_S
            if running >= self.allowed < self.most:
                self._grow(now, rate)
        elif now - self._since >= _PROBE_S:
            self.allowed, self._before = connections, None
            if running <= connections:
                return  # none was free: nothing was learnt
            self._quiet_until, self._quiet_s = now + self._quiet_s, min(2 * self._quiet_s, _LONGEST_QUIET_S)

    def _grow(self, now: float, rate: float) -> None:
        self._before, self._since = (self.allowed, rate), now
        self.allowed = min(self.most, max(4, 2 * self.allowed))


def _could_double(rate: float, proof_rate: float | None, limit: float | None) -> bool:
    return (proof_rate is None or 2 * rate < proof_rate) and (limit is None or rate < _NEARLY * limit)


_BUSY = 0.7  # of one processor: Python runs one thread at a time, and ...
_BUSY_ALONE = 0.5  # ... where that is all the work, two lose much of what they gain to waiting for each other


class IdleDetector:
    """Whether this process waits more than it works. One that is busy gains nothing by another thread, unless it is busy
    with what is none of ours: where *one_works*, what a worker does it does itself, and its own time tells."""

    def __init__(self, *, one_works: bool) -> None:
        self._one_works = one_works
        self._at, self._worked = time.monotonic(), time.process_time()
        self._clock, self._own = 0, 0.0  # of the first worker, where the system tells

    def watch_this_thread(self) -> None:
        """The calling thread is a worker."""
        if self._one_works and not self._clock and hasattr(time, "pthread_getcpuclockid"):
            self._clock = time.pthread_getcpuclockid(threading.get_ident())

    def seen(self) -> bool:
        """Whether that was so since the last look."""
        at, worked, own = time.monotonic(), time.process_time(), self._own
        if self._clock:
            with suppress(OSError):  # it has ended
                own = time.clock_gettime(self._clock)
        passed = max(at - self._at, 1e-6)
        share, own_share = (worked - self._worked) / passed, (own - self._own) / passed
        alone = bool(self._clock) and worked - self._worked > 2 * (own - self._own)  # most of the work is another's
        self._at, self._worked, self._own = at, worked, own
        return share < (_BUSY_ALONE if self._one_works else _BUSY) or (alone and own_share < _BUSY_ALONE)
