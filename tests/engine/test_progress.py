"""What people see while bytes arrive."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import pytest
from builders import Cli, manifest_of, some_bytes
from origin import Origin
from rich.progress import Progress

from modelstow.cas import Digest
from modelstow.reconcile.cli import parser
from modelstow.reconcile.cli.progress import progress_shown
from modelstow.reconcile.cli.session import Session
from modelstow.reconcile.events.events import (
    BlobFetched,
    BlobReused,
    BytesArrived,
    FetchesPlanned,
    FetchStarted,
    Info,
    Sink,
    TaskAdvanced,
    TaskBegan,
    TaskEnded,
)

ONE, TWO = Digest.of(b"one"), Digest.of(b"two")


class Terminal(io.StringIO):
    """Keeps what is written to it."""

    def isatty(self) -> bool:
        return True


@dataclass
class Screen:
    """A terminal on which the events of one command are drawn."""

    terminal: Terminal
    progress: Progress
    tell: Sink

    @property
    def rows(self) -> list[tuple[str, int, int]]:
        """The bars from the top: each one's label, how far it is, and its end."""
        return [(task.description, int(task.completed), int(task.total or 0)) for task in self.progress.tasks]

    def plan(self, blobs: int, size: int, held: int = 0) -> None:
        self.tell(FetchesPlanned(blobs=blobs, bytes=size, held=held))

    def start(self, digest: Digest, size: int, name: str, held: int = 0) -> None:
        self.tell(FetchStarted(digest=digest, size=size, held=held, name=name))

    def arrive(self, digest: Digest, count: int) -> None:
        self.tell(BytesArrived(digest=digest, count=count))


@contextmanager
def opened() -> Iterator[Screen]:
    """Not a fixture: between setting up and testing pytest puts its own stderr back."""
    made: list[Progress] = []

    class Kept(Progress):
        def __init__(self, *columns: Any, **options: Any) -> None:
            super().__init__(*columns, **options)
            made.append(self)

    session = Session(parser.build_parser("").parse_args(["reconcile", "--root", "nowhere"]), environ={})
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(Terminal()) as terminal:
        patch.setattr("rich.progress.Progress", Kept)
        with progress_shown(session):
            [progress] = made
            yield Screen(terminal, progress, session.events.emit)


def test_the_total_is_first_and_complete_from_the_start():
    """It does not grow as blobs begin; what an earlier run left is done, and is called resumed."""
    with opened() as screen:
        screen.plan(2, 5_000_000, held=1_000_000)
        screen.start(ONE, 3_000_000, "m@1#a  x.bin", held=1_000_000)
        screen.arrive(ONE, 500_000)

        total = ("2 blobs (1.0 MB resumed)", 1_500_000, 5_000_000)
        assert screen.rows == [total, ("m@1#a  x.bin (1.0 MB resumed)", 1_500_000, 3_000_000)]


def test_a_finished_blob_gives_way_and_one_alone_stays():
    """Else a thousand small files would scroll the terminal away."""
    with opened() as screen:
        screen.plan(2, 4 << 20)
        screen.start(ONE, 2 << 20, "x")
        screen.start(TWO, 2 << 20, "y")
        screen.arrive(ONE, 2 << 20)
        screen.tell(BlobFetched(digest=ONE, size=2 << 20, fetched_bytes=2 << 20, resumed_bytes=0))

        assert screen.rows == [("2 blobs", 2 << 20, 4 << 20), ("y", 0, 2 << 20)]


def test_small_blobs_count_in_the_total_alone():
    """Their bars would be gone before anyone could read them."""
    with opened() as screen:
        screen.plan(2, 20)
        screen.start(ONE, 10, "x")
        screen.arrive(ONE, 10)
        screen.tell(BlobReused(digest=TWO, size=10))

        assert screen.rows == [("2 blobs", 20, 20)]


@pytest.mark.parametrize("name", ["a[/x].bin", "[red]w.bin", "[/]", "[link=x]"])
def test_a_name_that_looks_like_a_tag_is_shown_as_it_is(name: str):
    """Legal file names hold brackets; they neither end the command nor vanish."""
    with opened() as seen:
        seen.start(ONE, 5_000_000, name)
        seen.progress.refresh()
    assert name in seen.terminal.getvalue()


def test_bytes_that_came_twice_are_no_progress():
    """A bar never passes its end, whatever was taken over or was wrong."""
    with opened() as screen:
        screen.plan(1, 10)
        screen.start(ONE, 10, "x")
        screen.arrive(ONE, 8)
        screen.arrive(ONE, 8)

        assert screen.rows == [("x", 10, 10)]


def test_a_task_has_a_bar_while_it_lasts():
    """Also for tasks other than a fetch; one of unknown size pulses, and a small one is not drawn."""
    with opened() as screen:
        screen.tell(TaskBegan(what="verifying", bytes=5 << 20))
        screen.tell(TaskBegan(what="http://host/x", bytes=None))
        screen.tell(TaskBegan(what="http://host/config.json", bytes=600))
        for what in ("verifying", "http://host/x", "http://host/config.json"):
            screen.tell(TaskAdvanced(what=what, count=600))
        assert screen.rows == [("verifying", 600, 5 << 20), ("http://host/x", 600, 0)]

        screen.tell(TaskBegan(what="http://host/x", bytes=None))  # asked once more
        screen.tell(TaskEnded(what="verifying"))
        assert screen.rows == [("http://host/x", 0, 0)]


@pytest.mark.parametrize("command", [("lock", "--upgrade"), ("verify", "--full"), ("push", "m", "mirror", "--compress")])
def test_a_long_task_reports_how_far_it_is(cli: Cli, command: tuple[str, ...]):
    """Naming a file, reading and on_send: each begins with its bytes, advances by all of them and ends."""
    data = some_bytes(3 << 20)
    with Origin({"m/weights.bin": data}) as origin:
        (cli.folder / "models.toml").write_text(manifest_of(f"{origin.url}/m"))
        cli.ok("lock")
        cli.ok("ensure", "m")
        ran = cli.ok(*command, "--progress", "json")
    reported = [json.loads(line) for line in ran.err.splitlines()]
    reported = [row for row in reported if row["event"].startswith("Task")]

    [what] = {row["what"] for row in reported}
    assert "weights.bin" in what or what in ("verifying", "sending 1 blob")
    assert reported[0] == {"event": "TaskBegan", "what": what, "bytes": len(data)}
    assert sum(row.get("count", 0) for row in reported) == len(data)
    assert reported[-1] == {"event": "TaskEnded", "what": what}


def test_other_events_are_reported_in_words():
    """Notes go past the bars."""
    with opened() as screen:
        screen.plan(2, 20)
        screen.tell(Info(text="hello"))

        assert "note: hello\n" in screen.terminal.getvalue()
        assert screen.rows == [("2 blobs", 0, 20)]
