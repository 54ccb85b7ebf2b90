"""Retries: the reasons for failures, and for each the schedule of attempts and pauses. All limits of time are set here."""

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
    """The *attempts* in a row without progress, and the seconds before each further one: *pause_s*, growing by *factor*."""

    attempts: int = 1
    pause_s: float = 0.0
    factor: float = 1.0
    longest_s: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """The retry schedules and limits of a transfer. A full disk is never retried: it ends the run, and what was fetched is
    kept."""

    transient: RetrySchedule = RetrySchedule(attempts=5, pause_s=1.0, factor=2.0, longest_s=30.0)
    rate_limit: RetrySchedule = RetrySchedule(attempts=10, pause_s=5.0, factor=1.5, longest_s=300.0)
    # At once: waiting repairs no credential, but a signed address that expired is signed again.
    authentication: RetrySchedule = RetrySchedule(attempts=2)
    # The second one only where no other source can serve.
    integrity: RetrySchedule = RetrySchedule(attempts=2)
    retry_after_cap_s: float = 300.0
    stall_s: float = 5.0  # without data, after which a range goes to another connection if there is one
    floor_bytes_s: int = 1024  # the minimum rate of a source, ...
    floor_window_s: float = 60.0  # ... measured over this time
    piece_s: float = 1800.0  # the longest time for one piece of up to 8 MiB, at any rate; larger ones in proportion
    range_s: float = 4.0  # the length of one request, in seconds at the source's rate
    worth_s: float = 0.5  # the least time that dividing or taking over a range must save
    takeovers: int = 3  # how often one piece may be taken over in flight
    progress: int = _MiB // 4  # bytes of a piece that count as progress before a connection that broke
    window: int = 512 * _MiB  # bytes ahead of the first gap that may be requested

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
    """A failed request to a source. *code* and *what* are for reports; *reason* decides what follows."""

    code: str
    what: str
    reason: Reason = Reason.PERMANENT
    retry_after: float | None = None  # seconds, as the source demands
    actual: str | int | None = None  # the wrong digest or size, where that is the reason
    hint: str = ""


@dataclass(slots=True)
class RetryState:
    """The attempts left to one source. *single_attempt*: before any progress the first transient failure is the last."""

    policy: RetryPolicy
    single_attempt: bool = False
    jitter: Callable[[], float] = random.random
    ready_at: float = 0.0  # the earliest time of the next request
    _failed: dict[Reason, int] = field(default_factory=dict)  # in a row

    def failed(self, failure: Failure, now: float) -> bool:
        """Count a failure and schedule the next attempt; False if none is left."""
        schedule, transient = self.policy.of(failure.reason), failure.reason.transient
        counted = Reason.TRANSIENT if transient else failure.reason
        failures = self._failed[counted] = self._failed.get(counted, 0) + 1
        if failures >= (1 if self.single_attempt and transient else schedule.attempts):
            return False
        pause = min(schedule.pause_s * schedule.factor ** (failures - 1), schedule.longest_s)
        # With jitter, so that clients that failed together do not retry together.
        self.ready_at = now + pause * (0.5 + self.jitter() / 2)
        self.honor_retry_after(failure, now)
        return True

    def honor_retry_after(self, failure: Failure, now: float) -> None:
        """Delay the next request as the source demands, up to the cap; also for a failure that is not counted."""
        self.ready_at = max(self.ready_at, now + min(failure.retry_after or 0.0, self.policy.retry_after_cap_s))

    def reset(self) -> None:
        """Progress was made: restore all attempts."""
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
    attempt: Callable[[], _T],
    policy: RetryPolicy,
    token: CancellationToken,
    clock: Callable[[], float] = time.monotonic,
    *,
    progressed: Callable[[], bool] = lambda: False,
) -> _T:
    """The result of the first attempt that succeeds. Raises the last SourceError when no attempt is left; Cancelled.

    *progressed*: whether the attempt that has just failed made progress, which restores all attempts.
    """
    state = RetryState(policy)
    while True:
        try:
            return attempt()
        except SourceError as error:
            if progressed():
                state.reset()
            if not state.failed(failure_of(error), clock()):
                raise
            if token.wait(max(0.0, state.ready_at - clock())):
                raise Cancelled("cancelled") from error
