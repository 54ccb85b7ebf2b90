"""A thread that follows a partial's front with sha256, so that the proof ends when the last byte arrives."""

from __future__ import annotations

import time
from threading import Event, Thread

from .partial import Partial
from .pieces import PIECE


class BackgroundHasher:
    """Follows one partial from its making until ``finish``."""

    def __init__(self, partial: Partial) -> None:
        self._partial, self._news, self._ended = partial, Event(), False
        self._failure: BaseException | None = None
        self._hashed, self._busy_s = 0, 0.0
        self._thread = Thread(target=self._run, name="sha256", daemon=True)
        self._news.set()
        self._thread.start()

    @property
    def rate(self) -> float | None:
        """Bytes a second that it proves while it is not waiting; None before it had any."""
        return self._hashed / self._busy_s if self._hashed else None

    def advance(self) -> None:
        """The front may have moved."""
        self._news.set()

    def finish(self) -> None:
        """Stop following and join. Raises what reading the file raised."""
        self._ended = True
        self._news.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            while not self._ended:
                self._news.wait()
                self._news.clear()
                # By the step, so that the end of the transfer does not wait for a long catching-up.
                while not self._ended and (front := self._partial.contiguous_end()) > self._partial.hashed_to:
                    began, stop = time.monotonic(), min(front, self._partial.hashed_to + PIECE)
                    step = stop - self._partial.hashed_to
                    self._partial.hash_to(stop)
                    self._hashed, self._busy_s = self._hashed + step, self._busy_s + time.monotonic() - began
        except BaseException as failure:
            self._failure = failure
