"""Progress of long work: as task events (verifying, pushing, hashing), and as a callback of (bytes done, bytes in all)."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from types import TracebackType

from .events import BlobsReused, BytesArrived, Event, FetchesPlanned, Sink, TaskAdvanced, TaskBegan, TaskEnded

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
    """A listener that folds the events of one run into calls of a progress callback."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._done = self._total = 0

    def __call__(self, event: Event) -> None:
        match event:
            case FetchesPlanned(bytes=size, held=held):
                self._total = size - held
            case BlobsReused():  # fetching begins
                self._progress(0, self._total)
            case BytesArrived(count=count) if self._done < self._total:
                self._done = min(self._total, self._done + count)
                self._progress(self._done, self._total)
            case _:
                pass

    def finish(self) -> None:
        """Report all bytes as done."""
        if self._done < self._total:
            self._progress(self._total, self._total)
