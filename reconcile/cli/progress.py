"""Progress for people (rich bars, only on a terminal) or for programs (one JSON event a line), from one stream."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING

from .session import Session

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ..telemetry.events import Event, Sink


@contextmanager
def shown(session: Session) -> Iterator[Sink]:
    """A sink for events while they last: bars, JSON lines, or plain talk."""
    with _logged(session) as log, _drawn(session) as draw:

        def both(event: Event) -> None:
            log(event)
            draw(event)

        yield both


@contextmanager
def _drawn(session: Session) -> Iterator[Sink]:
    if session.args.progress == "json":
        yield lambda event: print(_row(event), file=sys.stderr, flush=True)
    elif session.draws:
        with _bars(session) as bars:
            yield bars
    else:
        yield session.tell


@contextmanager
def _logged(session: Session) -> Iterator[Sink]:
    """MODELSTOW_LOG names a file that every event but the arrival of bytes is appended to, one JSON line each."""
    path = session.environ.get("MODELSTOW_LOG")
    if not path:
        yield lambda event: None
        return
    from ..telemetry.events import BytesArrived

    with open(path, "a", encoding="utf-8") as file:

        def log(event: Event) -> None:
            if not isinstance(event, BytesArrived):
                file.write(_row(event, time=round(time.time(), 3)) + "\n")
                file.flush()

        yield log


def _row(event: Event, **more: object) -> str:
    row: dict[str, object] = {**more, "event": type(event).__name__}
    row |= {each.name: getattr(event, each.name) for each in fields(event)}
    return json.dumps(row, default=str)


@contextmanager
def _bars(session: Session) -> Iterator[Sink]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True, no_color=bool(session.environ.get("NO_COLOR")) or None)
    with Progress(*columns, console=console, transient=False) as progress:
        yield _Bars(progress, session.tell)


class _Bars:
    """A bar for each blob in flight and one for all; what an earlier run had fetched counts as done from the start."""

    def __init__(self, progress: Progress, tell: Sink) -> None:
        self._progress, self._tell = progress, tell
        self._tasks: dict[str, TaskID] = {}
        self._all: TaskID | None = None
        self._total = self._held = 0

    def __call__(self, event: Event) -> None:
        from ..telemetry.events import BlobFailed, BlobFetched, BytesArrived, FetchStarted

        match event:
            case FetchStarted(digest=digest, size=size, held=held, name=name):
                note = f" (resumed at {held * 100 // size} %)" if held and size else ""
                self._tasks[digest] = self._progress.add_task(name + note, total=size, completed=held)
                self._total, self._held = self._total + size, self._held + held
                self._grow(held)
            case BytesArrived(digest=digest, count=count):
                if digest in self._tasks:
                    self._progress.advance(self._tasks[digest], count)
                if self._all is not None:
                    self._progress.advance(self._all, count)
            case BlobFetched(digest=digest) | BlobFailed(digest=digest):
                # A finished file's bar gives way, or a thousand small files would scroll the terminal away.
                if digest in self._tasks and len(self._tasks) > 8:
                    self._progress.remove_task(self._tasks.pop(digest))
            case _:
                self._tell(event)

    def _grow(self, held: int) -> None:
        if self._all is None and len(self._tasks) > 1:
            done = sum(task.completed for task in self._progress.tasks)
            self._all = self._progress.add_task("total", total=self._total, completed=int(done))
        elif self._all is not None:
            self._progress.update(self._all, total=self._total, advance=held)
