"""Connections that break inside a piece: their source resumes where they ended."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import PIECE, ensurer_of, lock_of, some_bytes, tree_of
from origin import Fault, Origin

from modelstow.reconcile.desired.lockfile import Lockfile

SIZE = 2 * PIECE + 3_000_000
MODEL = some_bytes(SIZE, seed=5)


def lock(*sources: str) -> Lockfile:
    return lock_of({"m@1": {"v": {"model.bin": MODEL}}}, sources)


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin({"m/model.bin": MODEL}) as origin:
        yield origin


def starts(origin: Origin) -> list[int]:
    """Where each request for the model began."""
    return [int((seen.range or "bytes=0-").removeprefix("bytes=").split("-")[0]) for seen in origin.gets("m/model.bin")]


def test_a_source_that_cuts_every_connection_early_serves_all_the_same(tmp_path: Path, origin: Origin):
    """Three mebibytes a connection are less than a piece; nothing is sent twice."""
    origin.fail("m/model.bin", Fault(cut_after=3 << 20, reset=False, times=-1))

    path = ensurer_of(tmp_path, lock(f"{origin.url}/m")).ensure("m")

    assert tree_of(path) == {"model.bin": MODEL}
    assert origin.sent("m/model.bin") == SIZE and starts(origin) == list(range(0, SIZE, 3 << 20))


def test_a_wrong_beginning_costs_the_blob_once_more(tmp_path: Path, origin: Origin):
    """The corrupt sender is requested again from the start if no other source is left."""
    origin.fail("m/model.bin", Fault(cut_after=3 << 20, reset=False, flip=1000))

    path = ensurer_of(tmp_path, lock(f"{origin.url}/m")).ensure("m")

    assert tree_of(path) == {"model.bin": MODEL}
    assert starts(origin) == [0, 3 << 20, 0]


def test_a_source_that_forgets_ranges_after_a_break_starts_from_scratch(tmp_path: Path, origin: Origin):
    """What was there of the piece is written over."""
    origin.fail("m/model.bin", Fault(cut_after=3 << 20, reset=False))
    origin.fail("m/model.bin", Fault(ignore_range=True, times=-1))

    path = ensurer_of(tmp_path, lock(f"{origin.url}/m")).ensure("m")

    assert tree_of(path) == {"model.bin": MODEL}
    assert starts(origin) == [0, 3 << 20] and origin.sent("m/model.bin") == (3 << 20) + SIZE
