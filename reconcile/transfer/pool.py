"""The threads of one run: they end together, and waiting for them can be cancelled."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from types import TracebackType

from modelstow.cas import CancellationToken

POLL_S = 0.2
"""How often a cancellation is looked for while threads work."""


class WorkerPool:
    """Up to *most* threads. A context manager; left by an error, it cancels *token*, which the threads poll.

    *token* is a child of the caller's: where that is cancelled, ``wait`` raises Cancelled with the text *cancelled*.
    """

    def __init__(self, most: int, name: str, *, token: CancellationToken, cancelled: str) -> None:
        self._pool = ThreadPoolExecutor(most, thread_name_prefix=name)
        self._token, self._cancelled = token, cancelled
        self._pending, self._done = 0, SimpleQueue[Future[None]]()

    @property
    def busy(self) -> bool:
        """Whether any task is left to run, or to wait for."""
        return self._pending > 0

    def start(self, work: Callable[..., None], *args: object) -> None:
        """Run a task in a thread, as soon as one is free."""
        self._pending += 1
        self._pool.submit(work, *args).add_done_callback(self._done.put)

    def wait(self, longest_s: float = POLL_S) -> None:
        """Wait until something is done, or so long. Raises what the work raised, and Cancelled."""
        timeout = longest_s
        try:
            while True:  # whatever else is done by now costs no further wait
                future = self._done.get(timeout=timeout) if timeout else self._done.get_nowait()
                self._pending, timeout = self._pending - 1, 0.0
                future.result()
        except Empty:
            pass
        if self._pending:
            self._token.check(self._cancelled)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._pool.shutdown()
            return
        by_caller = self._token.cancelled
        self._token.cancel()
        # An interrupt or a cancellation waits for no socket: every thread ends at its next read or write, and what it
        # leaves is what a kill would leave.
        self._pool.shutdown(wait=isinstance(error, Exception) and not by_caller, cancel_futures=True)
