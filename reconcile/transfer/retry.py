"""How often and when a source is asked again. Every attempt, pause and deadline of the engine is set here."""

from __future__ import annotations

import enum
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from modelstow.backends import AccessDenied, EndedEarly, NotFound, ProtocolError, SourceError, Throttled, TimedOut
from modelstow.cas import CancellationToken, Cancelled

from ..hints import hint_of

_T = TypeVar("_T")
_MiB = 1 << 20


class Reason(enum.Enum):
    """The reason for a failed request; it decides the retry schedule, the record of the source and the error raised."""

    TRANSIENT = "transient"  # a connection that failed or was lost, a server error (5xx)
    STALLED = "stalled"  # no data within a timeout, or a rate below the minimum
    TRUNCATED = "truncated"  # a body shorter than announced
    RATE_LIMIT = "rate limit"  # 429, 503
    AUTHENTICATION = "authentication"  # 401, 403
    CORRUPT_DATA = "corrupt data"  # bytes that do not match their digest or hash
    NOT_FOUND = "not found"
    WRONG_SIZE = "wrong size"  # not the size in the lockfile
    PERMANENT = "permanent"  # any other that a retry cannot repair: an invalid response, offline

    @property
    def transient(self) -> bool:
        """Whether it is retried by the schedule for transient failures; all of these count as one."""
        return self in _TRANSIENT

    @property
    def permanent(self) -> bool:
        """Whether it excludes the source for this blob at once."""
        return self in _PERMANENT


_TRANSIENT = frozenset({Reason.TRANSIENT, Reason.STALLED, Reason.TRUNCATED})
_PERMANENT = frozenset({Reason.NOT_FOUND, Reason.WRONG_SIZE, Reason.PERMANENT})


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

    def of(self, reason: Reason) -> RetrySchedule:
        """The retry schedule for failures with this reason."""
        if reason.transient:
            return self.transient
        if reason is Reason.RATE_LIMIT:
            return self.rate_limit
        if reason is Reason.AUTHENTICATION:
            return self.authentication
        return self.integrity if reason is Reason.CORRUPT_DATA else RetrySchedule()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a source did not give what was asked."""

    code: str
    what: str
    reason: Reason = Reason.PERMANENT
    retry_after: float | None = None  # seconds, as the source asked
    actual: str | int | None = None  # the wrong digest or size, where that is the reason
    hint: str = ""


@dataclass(slots=True)
class RetryState:
    """What is left of one source's attempts. *single_attempt*: the first transient failure is the last."""

    policy: RetryPolicy
    single_attempt: bool = False
    jitter: Callable[[], float] = random.random
    ready_at: float = 0.0  # not to be asked before
    _failed: dict[Reason, int] = field(default_factory=dict)  # in a row

    def failed(self, failure: Failure, now: float) -> bool:
        """Count a failure; False when there is no attempt left."""
        schedule, transient = self.policy.of(failure.reason), failure.reason.transient
        counted = Reason.TRANSIENT if transient else failure.reason
        failures = self._failed[counted] = self._failed.get(counted, 0) + 1
        if failures >= (1 if self.single_attempt and transient else schedule.attempts):
            return False
        pause = min(schedule.pause_s * schedule.factor ** (failures - 1), schedule.longest_s)
        # With jitter, so that many who failed together do not come back together.
        self.ready_at = now + pause * (0.5 + self.jitter() / 2)
        self.honor_retry_after(failure, now)
        return True

    def honor_retry_after(self, failure: Failure, now: float) -> None:
        """Backoff as long as the source asks for, up to the cap, whether the failure counts or not."""
        self.ready_at = max(self.ready_at, now + min(failure.retry_after or 0.0, self.policy.retry_after_cap_s))

    def reset(self) -> None:
        """A new piece arrived: all attempts are there again."""
        self._failed.clear()
        self.single_attempt = False


class CorruptResponse(ProtocolError):
    """Corrupt data that was recognized before it was written: an index or a frame that does not belong to the blob."""

    code = "CHECKSUM_FAIL"


_REASONS: tuple[tuple[type[SourceError], Reason], ...] = (
    (Throttled, Reason.RATE_LIMIT),
    (AccessDenied, Reason.AUTHENTICATION),
    (TimedOut, Reason.STALLED),
    (EndedEarly, Reason.TRUNCATED),
    (NotFound, Reason.NOT_FOUND),
    (CorruptResponse, Reason.CORRUPT_DATA),
)


def failure_of(error: SourceError) -> Failure:
    """The failure that an error of a source stands for. The first class that fits gives its reason."""
    other = Reason.TRANSIENT if error.transient else Reason.PERMANENT
    reason = next((reason for kind, reason in _REASONS if isinstance(error, kind)), other)
    return Failure(code=error.code, what=error.what, reason=reason, retry_after=error.retry_after, hint=hint_of(error))


def with_retries(
    ask: Callable[[], _T],
    policy: RetryPolicy,
    token: CancellationToken,
    clock: Callable[[], float] = time.monotonic,
    *,
    progressed: Callable[[], bool] = lambda: False,
) -> _T:
    """Request a source until it answers or its retry_state is over. Raises SourceError, Cancelled.

    *progressed*: whether the attempt that has just failed got so far that all attempts are there again.
    """
    retry_state = RetryState(policy)
    while True:
        try:
            return ask()
        except SourceError as error:
            if progressed():
                retry_state.reset()
            if not retry_state.failed(failure_of(error), clock()):
                raise
            if token.wait(max(0.0, retry_state.ready_at - clock())):
                raise Cancelled("cancelled") from error
