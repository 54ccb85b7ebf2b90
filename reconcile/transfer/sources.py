"""The sources of one transfer: their order, which of them may serve, and which is the fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from .corruption import CorruptionIsolation, Isolation
from .retry import Failure, Reason, RetryPolicy, RetryState
from .state import Held, SourceState

_NOT_REQUESTED = Failure(code="SOURCE_UNAVAILABLE", what="not requested")
_STALE_RATE_S = 30.0  # a source without a measurement for so long is measured again


class SourceSet:
    """The sources in order of preference, with what each has done so far. Times are the caller's. Not safe for threads.

    At first the order is that of the locators, with those that failed recently last; a source that fails goes to the end.
    """

    def __init__(
        self,
        locators: Sequence[str],
        policy: RetryPolicy,
        *,
        recently_failed: frozenset[str],
        exhausted: frozenset[str],
        jitter: Callable[[], float],
    ) -> None:
        self._isolation = CorruptionIsolation(policy.integrity.attempts - 1)
        self._sources = [
            SourceState(locator, locator in recently_failed, RetryState(policy, locator in exhausted, jitter))
            for locator in dict.fromkeys(locators)
        ]
        self._sources.sort(key=lambda source: source.recently_failed)

    # ---- failures

    def failed(self, source: SourceState, failure: Failure, now: float, *, claim: int, last_claim: int) -> None:
        """Count a failure of a range by its *claim*; *last_claim*: of the last range requested from any source."""
        source.failure = failure
        # Ranges in flight when the last failure was counted broke with it: one restart of a server is one failure.
        if claim > source.counted_to or failure.reason.permanent:
            source.counted_to = last_claim
            source.exhausted = not source.retry_state.failed(failure, now) or source.exhausted
        else:
            source.retry_state.honor_retry_after(failure, now)
        if failure.reason is Reason.RATE_LIMIT:
            source.max_connections = max(1, source.running)
        self._sources.remove(source)
        self._sources.append(source)
        if source.exhausted:
            self._isolation.release_reference(source.locator)

    def exhaust(self, failure: Failure) -> None:
        """Exclude every source for good."""
        for source in self._sources:
            source.exhausted, source.failure = True, failure

    def failures(self) -> dict[str, Failure]:
        """The last failure of each source, by locator."""
        return {source.locator: source.failure or _NOT_REQUESTED for source in self._sources}

    def is_exhausted(self, locator: str) -> bool:
        """Whether a source has no attempts left for this blob."""
        return any(source.exhausted for source in self._sources if source.locator == locator)

    # ---- corruption

    def verified(self, held: Mapping[int, Held]) -> tuple[str, ...]:
        """The senders that are proven corrupt by a digest that matches."""
        return self._isolation.verified(held)

    def digest_mismatch(self, held: Mapping[int, Held], failure: Failure) -> Isolation:
        """Isolate the corruption of a blob whose digest does not match; *failure* is that of the corrupt senders."""
        isolation = self._isolation.digest_mismatch(held, [s.locator for s in self._sources if not s.exhausted])
        self._note(isolation.corrupt, failure)
        return isolation

    def mark_corrupt(self, locator: str, failure: Failure) -> None:
        """Exclude a source that is proven corrupt."""
        self._isolation.mark_corrupt(locator)
        self._note([locator], failure)

    def _note(self, locators: Iterable[str], failure: Failure) -> None:
        for source in self._sources:
            if source.locator in locators:
                source.failure = failure

    # ---- selection

    def usable(self) -> list[SourceState]:
        """The sources that may serve, at some time."""
        return [s for s in self._sources if not s.exhausted and self._isolation.may_serve(s.locator)]

    def candidates(self, *, retrust: bool) -> list[SourceState]:
        """The usable sources; one that ignores ranges only if all do. *retrust*: corrupt ones, if there are no others."""
        usable = self.usable()
        if not usable and retrust and self._isolation.reference is None:
            self._isolation.retrust(s.locator for s in self._sources if not s.exhausted)
            usable = self.usable()
        return [s for s in usable if not s.ignores_ranges] or usable


def fastest(ready: Sequence[SourceState], now: float, *, several: bool) -> SourceState:
    """The fastest source at this time; with *several* connections, each source is measured by one of them first."""
    for source in ready if several else ready[:1]:
        unmeasured = source.rate is None or now - source.rated_at > _STALE_RATE_S
        if unmeasured and not source.recently_failed and not source.running:
            return source
    measured = [s for s in ready if s.rate is not None]
    return max(measured, key=lambda s: s.rate or 0.0, default=ready[0])
