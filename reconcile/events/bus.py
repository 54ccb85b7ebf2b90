"""The event bus: one stream of events that any number of listeners join and leave."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from threading import RLock
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # with nothing to do no event is made
    from .events import Event, Sink


class EventBus:
    """The distribution of events to any number of listeners, in the order in which they joined. Safe for threads.

    One event is delivered at a time, and those of one thread in the order in which it emits them; what a listener emits
    itself comes after the event that it is called with. A slow listener delays the thread that emits, and so the work;
    one that waits for a run whose events it hears waits for ever.

    A listener that raises an exception is dropped with one ``Warning`` to those that remain, or where none does in the
    log of ``modelstow`` (``logging``). Neither the other listeners nor the thread that emits are affected.

    The events of a bus with a *parent* go there too: the bus of a run has its ensurer's as parent, so that what joins
    the first hears one run, and what joins the second hears all of them.
    """

    def __init__(self, parent: EventBus | None = None) -> None:
        self._parent = parent
        self._listeners: tuple[Sink, ...] = ()
        self._queue: deque[Event] = deque()
        self._mutex, self._delivering = RLock(), False

    def subscribe(self, listener: Sink) -> ExitStack:
        """Add a listener, until the context that is returned ends or is closed."""
        with self._mutex:
            self._listeners = (*self._listeners, listener)
        context = ExitStack()
        context.callback(self.unsubscribe, listener)
        return context

    def unsubscribe(self, listener: Sink) -> None:
        """Remove a listener if it is there. Unless a listener calls this, the one removed is not called afterwards.

        Waits while events are delivered: a listener must not wait for the thread that calls this.
        """
        with self._mutex:
            remaining = list(self._listeners)
            with suppress(ValueError):
                remaining.remove(listener)
            self._listeners = tuple(remaining)

    def emit(self, event: Event) -> None:
        """Deliver an event to all listeners before returning, unless a listener emits it."""
        with self._mutex:
            self._queue.append(event)
            if self._delivering:
                return
            self._delivering = True
            try:
                while self._queue:
                    self._deliver(self._queue.popleft())
            finally:
                self._delivering = False

    def warn(self, what: object) -> None:
        """Emit a warning."""
        from .events import Warning

        self.emit(Warning(text=str(what)))

    def call(self, listener: Sink, action: Callable[[], object]) -> None:
        """Call something else that belongs to a listener, as an event is delivered: not if it is gone, and it may raise."""
        with self._mutex:
            if listener in self._listeners:
                try:
                    action()
                except Exception as error:
                    self._drop(listener, error)

    def _deliver(self, event: Event) -> None:
        for listener in self._listeners:
            try:
                listener(event)
            except Exception as error:
                self._drop(listener, error)
        if self._parent is not None:
            self._parent.emit(event)

    def _drop(self, listener: Sink, error: Exception) -> None:
        self.unsubscribe(listener)
        text = f"a listener of events failed and is not called again ({type(error).__name__}: {error})"
        if (self._parent or self)._listeners:
            self.warn(text)
        else:
            import logging

            logging.getLogger("modelstow").warning(text, exc_info=error)
