"""Fixtures of the tests of the engine and its commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import CalledCli


@pytest.fixture
def cli(tmp_path: Path) -> CalledCli:
    """The command line as a function, in an empty folder with an empty store."""
    return CalledCli(tmp_path)
