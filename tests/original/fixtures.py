"""What the tests of the original's promises share: its models with real digests, and a source that can be held up."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Queue
from typing import Any

from builders import PATIENCE_S, Ran, lock_of

from modelstow.backends import Body, ConnectionFailed, Listing, Source, TimedOut
from modelstow.cas import Digest
from modelstow.reconcile.desired.lockfile import Lockfile
from modelstow.reconcile.events.events import Event, Waiting

Variants = Mapping[str, Mapping[str, bytes]]


def locked(key: str, variants: Variants, bases: Iterable[str]) -> Lockfile:
    """A lockfile of one model; each file is had from ``base/variant/path``, shared bytes from their first variant."""
    lock = lock_of({key: variants})
    places: dict[Digest, str] = {}
    for variant, files in variants.items():
        for path, data in files.items():
            places.setdefault(Digest.of(data), f"{variant}/{path}")
    rows = list(bases)
    blobs = {d: blob._replace(urls=tuple(f"{base}/{places[d]}" for base in rows)) for d, blob in lock.blobs.items()}
    return replace(lock, blobs=blobs)


def served(variants: Variants, base: str) -> dict[str, bytes]:
    """What a source has to serve at *base* for a lockfile made by ``locked``."""
    return {f"{base}/{variant}/{path}": data for variant, files in variants.items() for path, data in files.items()}


def put(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files by hand, as a user who knows nothing of the store."""
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def damage(path: Path, data: bytes) -> None:
    """Overwrite a placed file in place and give it its old times, as rotting bits would."""
    before = path.stat()
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(0o444)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def snapshot(root: Path) -> dict[str, tuple[int, int, int]]:
    """Every name below *root* with its inode, size and change time: equal before and after means nothing was written."""
    found = {str(path): path.lstat() for path in root.rglob("*")}
    return {name: (there.st_ino, there.st_size, there.st_ctime_ns) for name, there in found.items()}


def opened() -> threading.Event:
    """A gate that is open."""
    gate = threading.Event()
    gate.set()
    return gate


class WatchedSource:
    """Wraps a source. ``asked`` counts openings by locator; each waits at ``gate``; while ``broken`` all are refused."""

    def __init__(self, inner: Source, *, gate: threading.Event | None = None, broken: str = "") -> None:
        self._inner, self.gate, self.broken = inner, gate or opened(), broken
        self.network = inner.network
        self.asked: Counter[str] = Counter()
        self.ranges: list[tuple[str, int, int | None]] = []
        self._news = threading.Condition()

    @property
    def calls(self) -> int:
        return self.asked.total()

    def open(self, locator: str, *, start: int = 0, stop: int | None = None) -> Body:
        with self._news:
            self.asked[locator] += 1
            self.ranges.append((locator, start, stop))
            self._news.notify_all()
        if self.broken:
            raise ConnectionFailed(self.broken, locator=locator)
        if not self.gate.wait(PATIENCE_S):
            raise TimedOut("the gate was not opened", locator=locator)
        return self._inner.open(locator, start=start, stop=stop)

    def wait_for(self, *locators: str) -> bool:
        """Until each of *locators* was asked for; False if that does not happen."""
        with self._news:
            return self._news.wait_for(lambda: self.asked.keys() >= set(locators), PATIENCE_S)

    def forget(self) -> None:
        """Count from zero."""
        self.asked.clear()
        self.ranges.clear()

    def size(self, locator: str) -> int | None:
        return self._inner.size(locator)

    def listing(self, locator: str) -> Listing:
        return self._inner.listing(locator)

    def origin(self, locator: str) -> str:
        return self._inner.origin(locator)


@dataclass
class EventLog:
    """A sink that keeps every event and signals when one caller waits for another's work."""

    events: list[Event] = field(default_factory=list)
    waiting: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Waiting):
            self.waiting.set()


@contextmanager
def at_once(*calls: Callable[[], Any], gate: threading.Event | None = None) -> Iterator[list[Future[Any]]]:
    """Run calls in threads that start together; *gate* is opened at the end, however the block ends."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        barrier.wait(PATIENCE_S)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        try:
            yield [pool.submit(run, call) for call in calls]
        finally:
            if gate is not None:
                gate.set()


@dataclass
class Disk:
    """A disk of a fixed size on which nothing but one store's models takes room; call it for the bytes that are free."""

    root: Path
    capacity: int

    def __call__(self) -> int:
        used: dict[int, int] = {}
        for folder in ("blobs", "models", "partial", "quarantine", "trash"):
            for path in (self.root / folder).rglob("*"):
                if path.is_file():
                    used[path.stat().st_ino] = path.stat().st_size
        return self.capacity - sum(used.values())


class Talking:
    """A command started with ``--progress json``, whose events are put into *heard* while it runs."""

    def __init__(self, process: subprocess.Popen[str], heard: Queue[dict[str, Any]]) -> None:
        self.process, self._heard, self._said = process, heard, list[str]()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._said.append(line)
            if line.startswith("{"):
                self._heard.put(json.loads(line))

    def end(self) -> Ran:
        """Wait for its end."""
        assert self.process.stdout is not None
        out = self.process.stdout.read()
        code = self.process.wait(PATIENCE_S)
        self._thread.join(PATIENCE_S)
        self.process.stdout.close()
        return Ran(code, out, "".join(self._said))


@contextmanager
def talking(*processes: subprocess.Popen[str]) -> Iterator[tuple[Queue[dict[str, Any]], list[Talking]]]:
    """Listen to started commands, one queue for all; those that still run in the end are killed."""
    heard: Queue[dict[str, Any]] = Queue()
    try:
        yield heard, [Talking(process, heard) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def hear(heard: Queue[dict[str, Any]], *expected: Callable[[dict[str, Any]], bool]) -> None:
    """Take events until each of *expected* was true of one."""
    missing = list(expected)
    while missing:
        row = heard.get(timeout=PATIENCE_S)
        missing = [fits for fits in missing if not fits(row)]
