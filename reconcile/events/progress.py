"""Something that takes long and is no fetch: reading for a verification, sending to a mirror, naming a file."""

from __future__ import annotations

from threading import Lock
from types import TracebackType

from .events import Sink, TaskAdvanced, TaskBegan, TaskEnded


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
