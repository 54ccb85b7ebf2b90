"""These tests run on the disk of the temporary folder, so that not every test runs in memory."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder for one test, on disk."""
    return tmp_path_factory.mktemp("disk")
