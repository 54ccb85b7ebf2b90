"""The threads of one run: they end together, and whoever waits for them can be stopped."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from threading import Event
from types import TracebackType

from modelstow.cas import Stopped

POLL_S = 0.2
"""How often a stop is looked for while threads work."""


class WorkerPool:
    """Up to *most* threads. A context manager; where it is left by an error, *stop* is set, which the threads heed.

    *outer* is the caller's, and ends this run and others: Stopped with the text *stopped* is raised then.
    """

    def __init__(self, most: int, name: str, *, stop: Event, outer: Event, stopped: str) -> None:
        self._pool = ThreadPoolExecutor(most, thread_name_prefix=name)
        self._stop, self._outer, self._stopped = stop, outer, stopped
        self._at_work: set[Future[None]] = set()

    @property
    def at_work(self) -> bool:
        """Whether anything is left to be done."""
        return bool(self._at_work)

    def start(self, work: Callable[..., None], *args: object) -> None:
        """Let a thread do this, as soon as one is free."""
        self._at_work.add(self._pool.submit(work, *args))

    def wait(self, longest_s: float = POLL_S) -> None:
        """Until something is done, or so long. Raises what the work raised, and Stopped."""
        done, self._at_work = wait(self._at_work, timeout=longest_s, return_when=FIRST_COMPLETED)
        if self._outer.is_set() and self._at_work:
            raise Stopped(self._stopped)
        for future in done:
            future.result()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._pool.shutdown()
            return
        self._stop.set()
        # Whoever interrupts or stops waits for no socket: every thread ends at its next read or write, and what it leaves
        # is what a kill would leave.
        self._pool.shutdown(wait=isinstance(error, Exception) and not self._outer.is_set(), cancel_futures=True)
