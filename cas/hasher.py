"""Background sha256 of a partial, so that its verification ends soon after the last byte arrives."""

from __future__ import annotations

import time
from threading import Event, Thread

from .partial import Partial

_STEP = 8 << 20  # bytes between two looks at whether to stop


class BackgroundHasher:
    """Thread that extends the sha256 of one partial as far as its pieces are contiguous, until ``finish``."""

    def __init__(self, partial: Partial) -> None:
        """Start the thread. No other may call ``Partial.hash_to`` before ``finish`` returned."""
        self._partial, self._progress, self._ended = partial, Event(), False
        self._failure: BaseException | None = None
        self._hashed, self._busy_s = 0, 0.0
        self._thread = Thread(target=self._run, name="sha256", daemon=True)
        self._progress.set()
        self._thread.start()

    @property
    def rate(self) -> float | None:
        """Bytes hashed per second while not waiting; None before the first step."""
        return self._hashed / self._busy_s if self._hashed else None

    def advance(self) -> None:
        """Wake the thread: pieces were finished. Any thread may call it."""
        self._progress.set()

    def finish(self) -> None:
        """Stop and join the thread, which may not have reached the end. Raises what reading the file raised."""
        self._ended = True
        self._progress.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            while not self._ended:
                self._progress.wait()
                self._progress.clear()
                # In steps, so that the end of the transfer does not wait for a long backlog.
                while not self._ended and (end := self._partial.contiguous_end()) > self._partial.hashed_to:
                    began, stop = time.monotonic(), min(end, self._partial.hashed_to + _STEP)
                    step = stop - self._partial.hashed_to
                    self._partial.hash_to(stop)
                    self._hashed, self._busy_s = self._hashed + step, self._busy_s + time.monotonic() - began
        except BaseException as failure:
            self._failure = failure
