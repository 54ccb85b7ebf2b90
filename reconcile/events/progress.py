"""Progress of long work: as task events (verifying, pushing, hashing), and as a callback of (bytes done, bytes in all)."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from types import TracebackType

from .events import BytesArrived, Event, Sink, TaskAdvanced, TaskBegan, TaskEnded

Progress = Callable[[int, int], None]
"""A progress callback: takes (bytes done, bytes in all). The first never falls, and the two are equal at the end."""


class Task:
    """A long task that emits its progress as events, once begun. A context manager; safe for threads."""

    def __init__(self, what: str, emit: Sink) -> None:
        self._what, self._emit = what, emit
        self._mutex, self._begun = Lock(), False

    def begin(self, size: int | None) -> None:
        """Begin, or begin again, with *size* bytes to process; None where the size is unknown."""
        with self._mutex:
            self._begun = True
            self._emit(TaskBegan(what=self._what, bytes=size))

    def advance(self, count: int) -> None:
        """Report *count* more bytes as done."""
        with self._mutex:
            self._emit(TaskAdvanced(what=self._what, count=count))

    def __enter__(self) -> Task:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._begun:
            self._emit(TaskEnded(what=self._what))


class Meter:
    """A fold of events into calls of a progress callback; every event is passed on."""

    def __init__(self, progress: Progress | None, onward: Sink) -> None:
        self._progress, self._onward = progress, onward
        self._done = self._total = 0

    def expect(self, total: int) -> None:
        """Set the number of bytes to fetch."""
        self._total = total
        if self._progress is not None:
            self._progress(0, self._total)

    def __call__(self, event: Event) -> None:
        if isinstance(event, BytesArrived) and self._progress is not None and self._done < self._total:
            self._done = min(self._total, self._done + event.count)
            self._progress(self._done, self._total)
        self._onward(event)

    def finish(self) -> None:
        """Report all bytes as done."""
        if self._progress is not None and self._done < self._total:
            self._progress(self._total, self._total)
