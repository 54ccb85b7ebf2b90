"""Cancellation: one token for the caller, a child of it for each run."""

from __future__ import annotations

from threading import Event, RLock
from weakref import WeakSet

from .errors import Cancelled


class CancellationToken:
    """Says that work should end soon. Cancelling a token cancels its children; a child's end concerns no other.

    Threads poll ``cancelled`` between reads and writes, and wait with ``wait`` where they would sleep. Safe for threads
    and for signal handlers.
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
        return self._event.is_set()

    def cancel(self) -> None:
        self._event.set()
        with self._mutex:
            children = list(self._children)
        for child in children:
            child.cancel()

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until cancelled; whether it is."""
        return self._event.wait(seconds)

    def check(self, what: str) -> None:
        """Raises Cancelled with this text if cancelled."""
        if self._event.is_set():
            raise Cancelled(what)
