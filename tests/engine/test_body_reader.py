"""Reading by steps that fit the rate, with a clock of our own."""

import pytest

from modelstow.backends import Body, TimedOut
from modelstow.reconcile.transfer.retry import RetryPolicy
from modelstow.reconcile.transfer.worker import MOST_STEP, BodyReader


class SlowBody:
    """A body that returns at most *at_once* bytes per read, each read taking *seconds* of its clock."""

    def __init__(self, at_once: int, seconds: float) -> None:
        self.at_once, self.seconds, self.now = at_once, seconds, 0.0
        self.lengths: list[int] = []

    def read_into(self, view: memoryview) -> int:
        self.lengths.append(len(view))
        self.now += self.seconds
        return min(len(view), self.at_once)

    def reader(self, **policy: float) -> BodyReader:
        body = Body(start=0, total=None, read_into=self.read_into)
        return BodyReader(body, "mem://h/a", RetryPolicy(**policy), lambda: self.now)


VIEW = memoryview(bytearray(MOST_STEP))


def test_a_server_that_trickles_ends_in_a_timeout():
    """100 bytes each 0.3 seconds are less than 1 KiB a second: it ends after the first minute (N11)."""
    body = SlowBody(100, 0.3)
    reader = body.reader()

    with pytest.raises(TimedOut, match="1024 bytes a second"):
        while True:
            reader.read(VIEW)
    assert 60 <= body.now < 61


def test_a_slow_server_above_the_floor_is_waited_for():
    """Two kilobytes a second are slow and not hostile."""
    body = SlowBody(2_000, 1.0)
    reader = body.reader()

    assert sum(reader.read(VIEW) for _ in range(500)) == 1_000_000


def test_steps_grow_where_bytes_come_quickly_and_shrink_where_they_do_not():
    """A large read returns only when it is full, so that much would be noticed late."""
    quick = SlowBody(1 << 30, 0.001)
    reader = quick.reader()
    for _ in range(8):
        reader.read(VIEW)
    assert quick.lengths[0] == 1 << 16 and quick.lengths[-1] == MOST_STEP

    quick.seconds = 0.5
    for _ in range(8):
        reader.read(VIEW)
    assert quick.lengths[-1] == 1 << 14
