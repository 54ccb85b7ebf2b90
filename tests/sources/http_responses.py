"""What web servers and buckets answer, and what it means for every source."""

from __future__ import annotations

import pytest
from origin import Fault, Origin

from modelstow.backends import AccessDenied, ConnectionFailed, NotFound, Source, SourceError, Throttled
from modelstow.backends.conformance import TEN

Meaning = tuple[int, type[SourceError], bool]
"""A status, the error that it becomes, and whether asking again can help."""

MEANINGS: list[Meaning] = [
    (404, NotFound, False),
    (401, AccessDenied, False),
    (403, AccessDenied, False),
    (400, SourceError, False),
    (429, Throttled, True),
    (503, Throttled, True),
    (500, ConnectionFailed, True),
]


class Clock:
    """Replaces the module ``time`` where deadlines are measured."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def status_of(meaning: Meaning) -> str:
    """What a test of one is called."""
    return str(meaning[0])


def refusal_of(source: Source, locator: str, origin: Origin, path: str, meaning: Meaning) -> SourceError:
    """The error that opening *locator*, which *origin* has at *path*, ends in when the answer has the status.

    It is what is meant, and there was one request: whether another is made is decided elsewhere.
    """
    status, kind, transient = meaning
    origin.fail(path, Fault(status=status, headers={"Retry-After": "7"}))
    with pytest.raises(SourceError) as caught:
        source.open(locator)
    assert type(caught.value) is kind and caught.value.transient is transient
    assert len(origin.gets()) == 1
    return caught.value


def assert_simply_ends(source: Source, locator: str, origin: Origin, path: str) -> None:
    """Ten bytes that were announced as twenty are over after ten, and that is no error: the reader counts (N2)."""
    origin.fail(path, Fault(headers={"Content-Length": "20", "Connection": "close"}))
    body, view = source.open(locator), memoryview(bytearray(100))
    counts = [body.read_into(view[at:]) for at in (0, 10, 10)]
    body.close()
    assert (counts, bytes(view[:10]), body.total) == ([10, 0, 0], TEN, 20)
