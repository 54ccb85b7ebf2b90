"""The store's tests sync thousands of small files: where there is a file system in memory, they run there.

``--basetemp DIR`` puts them on the disk of that folder instead.
"""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_fixtures import in_memory


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder for one test."""
    if request.config.option.basetemp or in_memory() is None:
        yield tmp_path_factory.mktemp("store")
        return
    folder = Path(tempfile.mkdtemp(prefix="modelstow-", dir=in_memory()))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
