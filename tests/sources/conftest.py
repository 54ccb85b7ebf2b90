"""Fixtures of the tests of sources."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import CalledCli
from http_responses import Clock

from modelstow.backends.http import connection, fast_response


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock by which the HTTP source measures its deadlines; it stands still until a test advances it."""
    clock = Clock()
    for module in (connection, fast_response):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def cli(tmp_path: Path) -> CalledCli:
    """The command line as a function, in an empty folder with an empty store."""
    return CalledCli(tmp_path)
