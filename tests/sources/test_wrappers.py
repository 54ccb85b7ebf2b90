"""The wrappers keep the contract of what they wrap, and do what they were asked to."""

import pytest

from modelstow.backends import ConnectionFailed, Source
from modelstow.backends.conformance import TEN, SourceContract
from modelstow.backends.faulty import FaultySource
from modelstow.backends.memory import MemorySource
from modelstow.backends.throttle import RateBudget, ThrottledSource


def memory() -> MemorySource:
    return MemorySource({f"mem://host/models/{name}": data for name, data in SourceContract.OBJECTS.items()})


class TestFaultyWithoutFaults(SourceContract):
    def folder(self) -> str:
        return "mem://host/models"

    def make(self) -> Source:
        return FaultySource(memory())


class TestFaultyWithoutRanges(SourceContract):
    def folder(self) -> str:
        return "mem://host/models"

    def make(self) -> Source:
        return FaultySource(memory(), ignore_ranges=True)


class TestThrottledWithRoom(SourceContract):
    def folder(self) -> str:
        return "mem://host/models"

    def make(self) -> Source:
        return ThrottledSource(memory(), RateBudget(1e12))


def read(source: Source, locator: str, start: int = 0) -> bytes:
    body, data, view = source.open(locator, start=start), bytearray(), memoryview(bytearray(4))
    while count := body.read_into(view):
        data += view[:count]
    return bytes(data)


def test_a_cut_breaks_one_body_after_so_many_bytes_and_then_no_more():
    """The second opening behaves."""
    source = FaultySource(memory(), cuts=[6])

    with pytest.raises(ConnectionFailed):
        read(source, "mem://host/models/ten")

    assert read(source, "mem://host/models/ten", 6) == TEN[6:]
    assert source.opened_at == [("mem://host/models/ten", 0), ("mem://host/models/ten", 6)]


def test_failures_refuse_openings_in_order():
    """Each is used once."""
    failure = ConnectionFailed("down", locator="mem://host/models/ten")
    source = FaultySource(memory(), failures=[failure])

    with pytest.raises(ConnectionFailed, match="down"):
        source.open("mem://host/models/ten")

    assert read(source, "mem://host/models/ten") == TEN


def test_ignored_ranges_are_admitted():
    """The body says that it begins at 0 and keeps to no range."""
    source = FaultySource(memory(), ignore_ranges=True)

    body = source.open("mem://host/models/ten", start=5)

    assert (body.start, body.ranged) == (0, False)


def test_a_throttle_waits_for_what_was_read_by_the_clock_it_is_given():
    """A thousand bytes at a hundred a second take ten seconds, over any number of readers."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    budget = RateBudget(100, clock=lambda: now[0], sleep=sleep)
    source = ThrottledSource(MemorySource({"mem://h/x": bytes(1000)}), budget)

    assert read(source, "mem://h/x") == bytes(1000)
    assert now[0] == pytest.approx(10.0)
