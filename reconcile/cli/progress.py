"""Progress of a command as bars (on a terminal), JSON lines or plain messages: folds of the stream of events."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from .output import size
from .session import Session, event_row

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ..events.events import Event, Sink

_SMALL = 1 << 20  # bytes up to which a blob has no bar of its own, where there is one for all


@contextmanager
def progress_shown(session: Session) -> Iterator[None]:
    """While it lasts the events of the session are drawn as bars on a terminal, and logged to the file of MODELSTOW_LOG."""
    with ExitStack() as listeners:
        if path := session.environ.get("MODELSTOW_LOG"):
            listeners.enter_context(session.events.subscribe(listeners.enter_context(_log(path))))
        if session.progress_enabled:
            listeners.enter_context(session.events.subscribe(listeners.enter_context(_bars(session))))
        yield


@contextmanager
def _log(path: str) -> Iterator[Sink]:
    """A listener that appends each event, except those that only count bytes, as a JSON line to a file."""
    from ..errors import InvalidConfigError
    from ..events.events import BytesArrived, TaskAdvanced
    from ..paths import absolute_path

    try:
        file = open(absolute_path(path), "a", encoding="utf-8")  # noqa: SIM115  # closed below
    except OSError as error:
        hint = "name a file in a folder that exists"
        raise InvalidConfigError(f"MODELSTOW_LOG: {error.strerror}: {path}", hint=hint) from error
    with file:

        def log(event: Event) -> None:
            if not isinstance(event, BytesArrived | TaskAdvanced):
                file.write(event_row(event, time=round(time.time(), 3)) + "\n")
                file.flush()

        yield log


@contextmanager
def _bars(session: Session) -> Iterator[Sink]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),  # a name may look like a tag
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True, no_color=bool(session.environ.get("NO_COLOR")) or None)
    with Progress(*columns, console=console, transient=False) as progress:
        yield _Bars(progress)


class _Bars:
    """Progress bars: one for all bytes to fetch, above those of the blobs in flight. Resumed bytes count as done."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._remaining: dict[str, int] = {}  # bytes of each blob that are still to be fetched
        self._all: TaskID | None = None

    def __call__(self, event: Event) -> None:
        from ..events.events import (
            BlobFailed,
            BlobFetched,
            BlobReused,
            BytesArrived,
            FetchesPlanned,
            FetchStarted,
            TaskAdvanced,
            TaskBegan,
            TaskEnded,
        )

        match event:
            case FetchesPlanned(blobs=blobs, bytes=total, held=held) if blobs > 1:
                self._all = self._progress.add_task(f"{blobs:,} blobs{_resumed(held)}", total=total, completed=held)
            case FetchStarted(digest=digest, size=whole, held=held, name=name):
                self._remaining[digest] = whole - held
                if self._all is None or whole > _SMALL:  # its bar would vanish before it is read
                    self._tasks[digest] = self._progress.add_task(name + _resumed(held), total=whole, completed=held)
            case BytesArrived(digest=digest, count=count):
                self._arrived(digest, count)
            case BlobFetched(digest=digest) | BlobFailed(digest=digest) | BlobReused(digest=digest):
                if isinstance(event, BlobReused) and digest not in self._remaining and self._all is not None:
                    self._progress.advance(self._all, event.size)
                # The bars of a thousand finished blobs would scroll the terminal away; a single one stays.
                if digest in self._tasks and self._all is not None:
                    self._progress.remove_task(self._tasks.pop(digest))
            case TaskBegan(what=what, bytes=total):
                self._end_task(what)
                if total is None or total > _SMALL:
                    self._tasks[what] = self._progress.add_task(what, total=total)
            case TaskAdvanced(what=what, count=count):
                if what in self._tasks:
                    self._progress.advance(self._tasks[what], count)
            case TaskEnded(what=what):
                self._end_task(what)
            case _:
                pass

    def _end_task(self, what: str) -> None:
        if what in self._tasks:
            self._progress.remove_task(self._tasks.pop(what))

    def _arrived(self, digest: str, count: int) -> None:
        # Bytes that are fetched again are no progress.
        count = min(count, self._remaining.get(digest, 0))
        if count:
            self._remaining[digest] -= count
            if digest in self._tasks:
                self._progress.advance(self._tasks[digest], count)
            if self._all is not None:
                self._progress.advance(self._all, count)


def _resumed(held: int) -> str:
    return f" ({size(held)} resumed)" if held else ""
