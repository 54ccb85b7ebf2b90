"""Profiles and fixtures of all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from builders import Cli
from hypothesis import HealthCheck, settings

_RELAXED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
settings.register_profile("fast", derandomize=True, max_examples=60, deadline=None, suppress_health_check=_RELAXED)
settings.register_profile("deep", max_examples=2_000, deadline=None, print_blob=True, suppress_health_check=_RELAXED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """The real command line, in an empty folder with an empty store."""
    return Cli(tmp_path)
