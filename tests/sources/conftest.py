"""Fixtures of the tests of sources."""

from __future__ import annotations

import pytest
from http_responses import Clock

from modelstow.backends.http import connection, fast_response


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock by which the HTTP source measures its deadlines; it stands still until a test advances it."""
    clock = Clock()
    for module in (connection, fast_response):
        monkeypatch.setattr(module, "time", clock)
    return clock
