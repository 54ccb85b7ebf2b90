"""How often and when a source is asked again. Every attempt, pause and deadline of the engine is set here."""

from __future__ import annotations

import enum
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from modelstow.backends import AccessDenied, SourceError, Throttled
from modelstow.cas import CancellationToken, Cancelled

from ..hints import hint_of

_T = TypeVar("_T")
_MiB = 1 << 20


class Reason(enum.Enum):
    """What kind of failure it was; each has its own patience."""

    TRANSIENT = "transient"  # a connection that broke, a server that failed, silence
    RATE_LIMIT = "rate limit"  # 429, 503
    AUTHENTICATION = "authentication"  # 401, 403
    INTEGRITY = "integrity"  # wrong bytes
    PERMANENT = "permanent"  # not there, another length, an answer that makes no sense


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrySchedule:
    """*attempts* in a row without progress; the pause before each further one, growing by *factor*. Seconds."""

    attempts: int = 1
    pause_s: float = 0.0
    factor: float = 1.0
    longest_s: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """All waiting of the engine. A full disk is never tried again: it ends the run, and what was fetched is kept."""

    transient: RetrySchedule = RetrySchedule(attempts=5, pause_s=1.0, factor=2.0, longest_s=30.0)
    rate_limit: RetrySchedule = RetrySchedule(attempts=10, pause_s=5.0, factor=1.5, longest_s=300.0)
    # At once: waiting mends no credential, but a signed address that ran out is signed anew.
    authentication: RetrySchedule = RetrySchedule(attempts=2)
    # The second is asked for only where no other source can serve.
    integrity: RetrySchedule = RetrySchedule(attempts=2)
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

    def of(self, kind: Reason) -> RetrySchedule:
        """The patience for one kind of failure."""
        if kind is Reason.TRANSIENT:
            return self.transient
        if kind is Reason.RATE_LIMIT:
            return self.rate_limit
        if kind is Reason.AUTHENTICATION:
            return self.authentication
        return self.integrity if kind is Reason.INTEGRITY else RetrySchedule()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a source did not give what was asked."""

    code: str
    what: str
    kind: Reason = Reason.PERMANENT
    retry_after: float | None = None  # seconds, as the source asked
    actual: str | int | None = None  # the wrong digest or size, where that is the reason
    hint: str = ""


@dataclass(slots=True)
class RetryState:
    """What is left of one source's attempts. *late*: it failed lately elsewhere, and breaks only once more."""

    policy: RetryPolicy
    late: bool = False
    jitter: Callable[[], float] = random.random
    ready_at: float = 0.0  # not to be asked before
    _failed: dict[Reason, int] = field(default_factory=dict)  # in a row

    def failed(self, fact: Failure, now: float) -> bool:
        """Count a failure; False when there is no attempt left."""
        backoff = self.policy.of(fact.kind)
        failures = self._failed[fact.kind] = self._failed.get(fact.kind, 0) + 1
        if failures >= (1 if self.late and fact.kind is Reason.TRANSIENT else backoff.attempts):
            return False
        pause = min(backoff.pause_s * backoff.factor ** (failures - 1), backoff.longest_s)
        # With jitter, so that many who failed together do not come back together.
        self.ready_at = now + pause * (0.5 + self.jitter() / 2)
        self.honor_retry_after(fact, now)
        return True

    def honor_retry_after(self, fact: Failure, now: float) -> None:
        """Backoff as long as the source asks for, up to the cap, whether the failure counts or not."""
        self.ready_at = max(self.ready_at, now + min(fact.retry_after or 0.0, self.policy.retry_after_cap_s))

    def progressed(self) -> None:
        """A new piece arrived: all attempts are there again."""
        self._failed.clear()
        self.late = False


def failure_of(error: SourceError) -> Failure:
    """An error of a source as the transfer judges it."""
    kind = Reason.PERMANENT
    if isinstance(error, Throttled):
        kind = Reason.RATE_LIMIT
    elif isinstance(error, AccessDenied):
        kind = Reason.AUTHENTICATION
    elif error.transient:
        kind = Reason.TRANSIENT
    elif error.code == "CHECKSUM_FAIL":
        kind = Reason.INTEGRITY
    return Failure(code=error.code, what=error.what, kind=kind, retry_after=error.retry_after, hint=hint_of(error))


def with_retries(
    ask: Callable[[], _T],
    policy: RetryPolicy,
    token: CancellationToken,
    clock: Callable[[], float] = time.monotonic,
    *,
    progressed: Callable[[], bool] = lambda: False,
) -> _T:
    """Request a source until it answers or its patience is over. Raises SourceError, Cancelled.

    *progressed*: whether the attempt that has just failed got so far that all attempts are there again.
    """
    patience = RetryState(policy)
    while True:
        try:
            return ask()
        except SourceError as error:
            if progressed():
                patience.progressed()
            if not patience.failed(failure_of(error), clock()):
                raise
            if token.wait(max(0.0, patience.ready_at - clock())):
                raise Cancelled("cancelled") from error
