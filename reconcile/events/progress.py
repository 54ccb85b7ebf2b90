"""Something that takes long and is no fetch: reading for a verification, uploading to a mirror, hashing a file."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from types import TracebackType

from .events import BytesArrived, Event, Sink, TaskAdvanced, TaskBegan, TaskEnded

Progress = Callable[[int, int], None]
"""Takes (bytes done, bytes in all): never falls, and ends with the two equal."""


class Task:
    """Tells how far it is. A context manager; safe for threads. Who never began tells nothing."""

    def __init__(self, what: str, emit: Sink) -> None:
        self._what, self._emit = what, emit
        self._mutex, self._begun = Lock(), False

    def begin(self, size: int | None) -> None:
        """So many bytes are to be dealt with, as far as is known; None where it is not."""
        with self._mutex:
            self._begun = True
            self._emit(TaskBegan(what=self._what, bytes=size))

    def advance(self, count: int) -> None:
        """So many more are."""
        with self._mutex:
            self._emit(TaskAdvanced(what=self._what, count=count))

    def __enter__(self) -> Task:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._begun:
            self._emit(TaskEnded(what=self._what))


class Meter:
    """Folds events into (bytes done, bytes in all): never falls, and ends with the two equal."""

    def __init__(self, progress: Progress | None, onward: Sink) -> None:
        self._progress, self._onward = progress, onward
        self._done = self._total = 0

    def expect(self, total: int) -> None:
        """*total* bytes have to be fetched."""
        self._total = total
        if self._progress is not None:
            self._progress(0, self._total)

    def __call__(self, event: Event) -> None:
        if isinstance(event, BytesArrived) and self._progress is not None and self._done < self._total:
            self._done = min(self._total, self._done + event.count)
            self._progress(self._done, self._total)
        self._onward(event)

    def finish(self) -> None:
        if self._progress is not None and self._done < self._total:
            self._progress(self._total, self._total)
