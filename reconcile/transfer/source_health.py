"""Sources that failed lately, in this process: they are asked last, not never."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from threading import Lock


@dataclass(frozen=True, slots=True)
class SourceFailure:
    """When (monotonic seconds) and why a source failed."""

    at: float
    code: str
    what: str
    given_up: bool = False  # it had no attempt left


class FailureTable:
    """Failures by what fails together: a host or folder that cannot be reached, a locator that is not there.

    Other processes are not told: one may have the token that this one lacks. Safe for threads.
    """

    def __init__(self, *, ttl_s: float = 300.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.ttl_s, self._clock = ttl_s, clock
        self._failures: dict[str, SourceFailure] = {}
        self._mutex = Lock()

    def note(self, key: str, code: str, what: str, *, given_up: bool = False) -> None:
        with self._mutex:
            before = self._active(key)
            given_up |= before is not None and before.given_up
            self._failures[key] = SourceFailure(self._clock(), code, what, given_up)

    def given_up(self, keys: Iterable[str]) -> bool:
        """Whether one of these failed until no attempt was left, and none succeeded since."""
        with self._mutex:
            return any((failure := self._active(key)) is not None and failure.given_up for key in keys)

    def clear(self, keys: Iterable[str]) -> None:
        """Success: forget what failed before."""
        with self._mutex:
            for key in keys:
                self._failures.pop(key, None)

    def expire(self) -> None:
        """Forget what is older than ``ttl_s`` seconds."""
        with self._mutex:
            self._failures = {key: f for key in self._failures if (f := self._active(key)) is not None}

    @property
    def any(self) -> bool:
        """Whether anything is on record that still counts."""
        if not self._failures:  # mostly
            return False
        self.expire()
        return bool(self._failures)

    def __contains__(self, key: str) -> bool:
        with self._mutex:
            return self._active(key) is not None

    def _active(self, key: str) -> SourceFailure | None:
        failure = self._failures.get(key)
        return failure if failure is not None and self._clock() - failure.at < self.ttl_s else None

    def active(self) -> dict[str, SourceFailure]:
        """Every failure that still counts."""
        self.expire()
        with self._mutex:
            return dict(self._failures)
