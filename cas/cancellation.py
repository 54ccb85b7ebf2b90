"""Cancellation tokens: one for the caller, a child of it for each run."""

from __future__ import annotations

from threading import Event, RLock
from weakref import WeakSet

from .errors import Cancelled


class CancellationToken:
    """A request that work end soon. Cancelling a token cancels its children, never its parent.

    Threads poll ``cancelled`` between reads and writes, and call ``wait`` instead of sleeping. Safe for threads and
    signal handlers.
    """

    def __init__(self, parent: CancellationToken | None = None) -> None:
        self.parent = parent
        self._event, self._mutex = Event(), RLock()
        self._children: WeakSet[CancellationToken] = WeakSet()
        if parent is not None:
            with parent._mutex:
                parent._children.add(self)
            if parent.cancelled:
                self.cancel()

    @property
    def cancelled(self) -> bool:
        """Whether ``cancel`` was called on this token or a parent."""
        return self._event.is_set()

    def cancel(self) -> None:
        """Cancel this token and its children, for good; may be called again."""
        self._event.set()
        with self._mutex:
            children = list(self._children)
        for child in children:
            child.cancel()

    def wait(self, seconds: float) -> bool:
        """Wait *seconds*, or until cancelled; whether it is cancelled."""
        return self._event.wait(seconds)

    def check(self, what: str) -> None:
        """Raise Cancelled with the message *what* if cancelled."""
        if self._event.is_set():
            raise Cancelled(what)
