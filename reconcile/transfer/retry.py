"""How often and when a source is asked again. Every attempt, pause and deadline of the engine is set here."""

from __future__ import annotations

import enum
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event
from typing import TypeVar

from modelstow.backends import Denied, SourceError, Throttled
from modelstow.cas import Stopped

_T = TypeVar("_T")
_MiB = 1 << 20


class Kind(enum.Enum):
    """What kind of failure it was; each has its own patience."""

    TRANSIENT = "transient"  # a connection that broke, a server that failed, silence
    RATE_LIMIT = "rate limit"  # 429, 503
    AUTHENTICATION = "authentication"  # 401, 403
    INTEGRITY = "integrity"  # wrong bytes
    PERMANENT = "permanent"  # not there, another length, an answer that makes no sense


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """*attempts* in a row without progress; the pause before each further one, growing by *factor*. Seconds."""

    attempts: int = 1
    pause_s: float = 0.0
    factor: float = 1.0
    longest_s: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """All waiting of the engine. A full disk is never tried again: it ends the run, and what was fetched is kept."""

    transient: Backoff = Backoff(attempts=5, pause_s=1.0, factor=2.0, longest_s=30.0)
    rate_limit: Backoff = Backoff(attempts=10, pause_s=5.0, factor=1.5, longest_s=300.0)
    # At once: waiting mends no credential, but a signed address that ran out is signed anew.
    authentication: Backoff = Backoff(attempts=2)
    # The second is asked for only where no other source can serve.
    integrity: Backoff = Backoff(attempts=2)
    retry_after_cap_s: float = 300.0
    stall_s: float = 5.0  # silence after which a range goes to another connection, if one can be had
    floor_bytes_s: int = 1024  # a source must give so much a second, ...
    floor_window_s: float = 60.0  # ... looked at so often
    piece_s: float = 1800.0  # a piece that takes longer is given up, however it drips
    range_s: float = 4.0  # how much is asked for at once, in seconds of the source's rate
    worth_s: float = 0.5  # a range is divided or taken over only to save more than this
    takeovers: int = 3  # how often one piece may change hands in flight
    progress: int = _MiB // 4  # bytes of a piece that make up for the connection that broke behind them
    window: int = 512 * _MiB  # bytes ahead of the first gap that may be asked for

    def of(self, kind: Kind) -> Backoff:
        """The patience for one kind of failure."""
        if kind is Kind.TRANSIENT:
            return self.transient
        if kind is Kind.RATE_LIMIT:
            return self.rate_limit
        if kind is Kind.AUTHENTICATION:
            return self.authentication
        return self.integrity if kind is Kind.INTEGRITY else Backoff()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """Why a source did not give what was asked."""

    code: str
    what: str
    kind: Kind = Kind.PERMANENT
    retry_after: float | None = None  # seconds, as the source asked
    actual: str | int | None = None  # the wrong digest or size, where that is the reason
    hint: str = ""


@dataclass(slots=True)
class Patience:
    """What is left of one source's attempts. *late*: it failed lately elsewhere, and breaks only once more."""

    policy: RetryPolicy
    late: bool = False
    jitter: Callable[[], float] = random.random
    ready_at: float = 0.0  # not to be asked before
    _failed: dict[Kind, int] = field(default_factory=dict)  # in a row

    def failed(self, fact: Fact, now: float) -> bool:
        """Count a failure; False when there is no attempt left."""
        backoff = self.policy.of(fact.kind)
        failures = self._failed[fact.kind] = self._failed.get(fact.kind, 0) + 1
        if failures >= (1 if self.late and fact.kind is Kind.TRANSIENT else backoff.attempts):
            return False
        pause = min(backoff.pause_s * backoff.factor ** (failures - 1), backoff.longest_s)
        # With jitter, so that many who failed together do not come back together.
        self.ready_at = now + pause * (0.5 + self.jitter() / 2)
        self.heed(fact, now)
        return True

    def heed(self, fact: Fact, now: float) -> None:
        """Wait as long as the source asks for, up to the cap, whether the failure counts or not."""
        self.ready_at = max(self.ready_at, now + min(fact.retry_after or 0.0, self.policy.retry_after_cap_s))

    def progressed(self) -> None:
        """A new piece arrived: all attempts are there again."""
        self._failed.clear()
        self.late = False


def fact_of(error: SourceError) -> Fact:
    """An error of a source as the transfer judges it."""
    kind = Kind.PERMANENT
    if isinstance(error, Throttled):
        kind = Kind.RATE_LIMIT
    elif isinstance(error, Denied):
        kind = Kind.AUTHENTICATION
    elif error.transient:
        kind = Kind.TRANSIENT
    elif error.code == "CHECKSUM_FAIL":
        kind = Kind.INTEGRITY
    return Fact(code=error.code, what=error.what, kind=kind, retry_after=error.retry_after, hint=error.hint)


def patiently(
    ask: Callable[[], _T],
    policy: RetryPolicy,
    stop: Event,
    clock: Callable[[], float] = time.monotonic,
    *,
    progressed: Callable[[], bool] = lambda: False,
) -> _T:
    """Ask a source until it answers or its patience is over. Raises SourceError, Stopped.

    *progressed*: whether the attempt that has just failed got so far that all attempts are there again.
    """
    patience = Patience(policy)
    while True:
        try:
            return ask()
        except SourceError as error:
            if progressed():
                patience.progressed()
            if not patience.failed(fact_of(error), clock()):
                raise
            if stop.wait(max(0.0, patience.ready_at - clock())):
                raise Stopped("stopped") from error
