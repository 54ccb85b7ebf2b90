"""Profiles and fixtures of all tests.

Tests sync thousands of small files: where there is a file system in memory, they run there, but for those of `original/`
and of the README. ``--basetemp DIR`` puts all of them on the disk of that folder instead.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import Cli, in_memory
from hypothesis import HealthCheck, settings
from s3servers import moto_without_auth

from modelstow.backends.http import client as http_client
from modelstow.backends.s3 import client as s3_client

# A run that a shell started in the background ignores Ctrl-C, and so would every command that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_RELAXED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
settings.register_profile("fast", derandomize=True, max_examples=60, deadline=None, suppress_health_check=_RELAXED)
settings.register_profile("quick", derandomize=True, max_examples=15, deadline=None, suppress_health_check=_RELAXED)
settings.register_profile("deep", max_examples=2_000, deadline=None, print_blob=True, suppress_health_check=_RELAXED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


@pytest.hookimpl(optionalhook=True)  # of xdist
def pytest_configure_node(node: Any) -> None:
    """Tell each worker whether the user asked for a folder: xdist gives every worker one of its own."""
    node.workerinput["on_disk"] = bool(node.config.option.basetemp)


def on_disk(config: pytest.Config) -> bool:
    """Whether the user chose the folder of temporary files, or there is none in memory."""
    chosen = getattr(config, "workerinput", {"on_disk": config.option.basetemp})["on_disk"]
    return bool(chosen) or in_memory() is None


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder for one test."""
    if on_disk(request.config):
        yield tmp_path_factory.mktemp("test")
        return
    folder = Path(tempfile.mkdtemp(prefix="modelstow-", dir=in_memory()))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """The real command line, in an empty folder with an empty store."""
    return Cli(tmp_path)


@pytest.fixture
def endless_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """No read from a socket times out, so that only what the test does can end one: without it, the test hangs."""
    for module in (http_client, s3_client):
        monkeypatch.setattr(module, "READ_TIMEOUT_S", 3600.0)


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """The endpoint of an S3 server that only this file's tests use."""
    with moto_without_auth() as endpoint:
        yield endpoint
