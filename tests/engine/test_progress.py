"""What people see while bytes arrive."""

import io

import pytest
from rich.console import Console
from rich.progress import Progress

from cas import Digest
from reconcile.cli.progress import _Bars
from reconcile.telemetry.events import BlobFetched, BlobReused, BytesArrived, FetchesPlanned, FetchStarted, Note

ONE, TWO = Digest.of(b"one"), Digest.of(b"two")


@pytest.fixture
def progress() -> Progress:
    return Progress(console=Console(file=io.StringIO(), force_terminal=True, width=100), disable=True)


def rows(progress: Progress) -> list[tuple[str, int, int]]:
    return [(task.description, int(task.completed), int(task.total or 0)) for task in progress.tasks]


def start(bars: _Bars, digest: Digest, size: int, name: str, held: int = 0) -> None:
    bars(FetchStarted(digest=digest, size=size, held=held, name=name))


def test_the_total_stands_first_and_knows_everything_from_the_start(progress: Progress):
    """It does not grow as blobs begin; what an earlier run left is done, and is called resumed."""
    bars = _Bars(progress, lambda event: None)
    bars(FetchesPlanned(blobs=2, bytes=5_000_000, held=1_000_000))
    start(bars, ONE, 3_000_000, "m@1#a  x.bin", held=1_000_000)
    bars(BytesArrived(digest=ONE, count=500_000))

    total = ("2 blobs (1.0 MB resumed)", 1_500_000, 5_000_000)
    assert rows(progress) == [total, ("m@1#a  x.bin (1.0 MB resumed)", 1_500_000, 3_000_000)]


def test_a_finished_blob_gives_way_and_one_alone_stays(progress: Progress):
    """Else a thousand small files would scroll the terminal away."""
    bars = _Bars(progress, lambda event: None)
    bars(FetchesPlanned(blobs=2, bytes=4 << 20, held=0))
    start(bars, ONE, 2 << 20, "x")
    start(bars, TWO, 2 << 20, "y")
    bars(BytesArrived(digest=ONE, count=2 << 20))
    bars(BlobFetched(digest=ONE, size=2 << 20, fetched_bytes=2 << 20, resumed_bytes=0))
    assert rows(progress) == [("2 blobs", 2 << 20, 4 << 20), ("y", 0, 2 << 20)]


def test_small_blobs_count_in_the_total_alone(progress: Progress):
    """Their bars would be gone before anybody reads them."""
    bars = _Bars(progress, lambda event: None)
    bars(FetchesPlanned(blobs=2, bytes=20, held=0))
    start(bars, ONE, 10, "x")
    bars(BytesArrived(digest=ONE, count=10))
    bars(BlobReused(digest=TWO, size=10))

    assert rows(progress) == [("2 blobs", 20, 20)]


def test_bytes_that_came_twice_are_no_progress(progress: Progress):
    """A bar never passes its end, whatever was taken over or was wrong."""
    bars = _Bars(progress, lambda event: None)
    bars(FetchesPlanned(blobs=1, bytes=10, held=0))
    start(bars, ONE, 10, "x")
    bars(BytesArrived(digest=ONE, count=8))
    bars(BytesArrived(digest=ONE, count=8))

    assert rows(progress) == [("x", 10, 10)]


def test_other_events_are_told_in_words(progress: Progress):
    """Notes go past the bars."""
    heard: list[object] = []
    _Bars(progress, heard.append)(Note(text="hello"))

    assert heard == [Note(text="hello")]
