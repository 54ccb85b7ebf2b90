"""The event bus: who hears what, in which order, and what a listener that fails costs."""

from __future__ import annotations

import logging
from pathlib import Path
from threading import Thread

import pytest
from builders import ensurer_of, lock_of, objects_of

from modelstow.backends.memory import MemorySource
from modelstow.reconcile.events.bus import EventBus
from modelstow.reconcile.events.events import BlobFetched, Event, Info, TreePublished, Warning
from modelstow.reconcile.events.recorder import Recorder

ONE, TWO = Info(text="one"), Info(text="two")


def failing(event: Event) -> None:
    raise ValueError("of no use")


def test_a_listener_hears_what_is_emitted_while_it_is_subscribed():
    """Leaving the context, closing it and unsubscribing are the same, and can be done twice."""
    bus, heard, other = EventBus(), list[Event](), list[Event]()
    bus.emit(ONE)
    with bus.subscribe(heard.append):
        subscription = bus.subscribe(other.append)
        bus.emit(ONE)
        subscription.close()
        bus.emit(TWO)
    bus.emit(ONE)
    bus.unsubscribe(heard.append)

    assert heard == [ONE, TWO] and other == [ONE]


def test_a_listener_that_raises_is_dropped_with_one_warning_to_the_others():
    """The thread that emits does not notice, and no other listener misses an event."""
    bus, first, last = EventBus(), list[Event](), list[Event]()
    for listener in (first.append, failing, last.append):
        bus.subscribe(listener)

    for event in (ONE, TWO):
        bus.emit(event)

    warning = Warning(text="a listener of events failed and is not called again (ValueError: of no use)")
    assert first == last == [ONE, warning, TWO]


def test_the_failure_of_the_only_listener_is_logged(caplog: pytest.LogCaptureFixture):
    """With its traceback: it must not go unseen."""
    bus = EventBus()
    run = EventBus(bus)
    run.subscribe(failing)
    run.subscribe(Recorder())

    with caplog.at_level(logging.WARNING, "modelstow"):
        run.emit(ONE)
        run.emit(TWO)

    [record] = caplog.records
    assert "ValueError: of no use" in record.message and record.exc_info


def test_what_a_listener_emits_comes_after_the_event_that_it_answers():
    """Every listener hears one order."""
    bus, before, after = EventBus(), list[Event](), list[Event]()
    bus.subscribe(before.append)
    bus.subscribe(lambda event: bus.emit(TWO) if event is ONE else None)
    bus.subscribe(after.append)

    bus.emit(ONE)

    assert before == after == [ONE, TWO]


def test_events_of_one_thread_keep_their_order_and_come_one_at_a_time():
    """Whoever else emits meanwhile: a listener needs no lock of its own."""
    bus, heard, inside = EventBus(), list[Event](), list[bool]()

    def listener(event: Event) -> None:
        inside.append(True)
        heard.append(event)
        assert len(inside) == 1
        inside.pop()

    bus.subscribe(listener)
    lanes = [[Info(text=f"{lane} {number}") for number in range(2000)] for lane in range(4)]
    threads = [Thread(target=lambda lane=lane: [bus.emit(event) for event in lane]) for lane in lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(heard) == 8000
    for lane, events in enumerate(lanes):
        assert [event for event in heard if isinstance(event, Info) and event.text.startswith(f"{lane} ")] == events


def test_listeners_of_an_ensurer_hear_all_its_runs_and_a_report_is_of_one(tmp_path: Path):
    """A long-lived program joins once, and several listeners at once."""
    files = {"a.bin": b"a" * 10, "b.bin": b"b" * 20}
    lock = lock_of({"a@1": {"v": {"a.bin": files["a.bin"]}}, "b@1": {"v": {"b.bin": files["b.bin"]}}})
    models, heard = ensurer_of(tmp_path, lock, MemorySource(objects_of(files))), list[Event]()
    total = Recorder()

    with models.events.subscribe(total), models.events.subscribe(heard.append):
        first, second = models.ensure_all(["a"]), models.ensure_all(["b"])

    assert (first.report.fetched_bytes, second.report.fetched_bytes, total.report().fetched_bytes) == (10, 20, 30)
    assert [event.model for event in heard if isinstance(event, TreePublished)] == ["a@1", "b@1"]
    assert sum(isinstance(event, BlobFetched) for event in heard) == 2
