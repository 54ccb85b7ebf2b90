"""Servers with a capped rate that count the bytes they send: a connection's own cap, or one for all of them.

``python -m benchmarks.rate_capped_server FOLDER connection|server BYTES_A_SECOND``; ``GET /sent`` tells the count.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from threading import Lock
from urllib.request import urlopen

from .servers import FileHandler, serve

SENT = "/sent"
_STEP = 256 << 10
_LATE_S = 0.1  # what an overslept sender may catch up


class Bucket:
    """When bytes may go out, at so many a second. Pure; safe for threads.

    Bytes are paid for before they go, and nothing is saved up while nothing is sent: neither a new request nor a new
    range begins with a burst.
    """

    def __init__(self, rate: float) -> None:
        self._rate, self._paid_until, self._mutex = rate, 0.0, Lock()

    def begin(self, now: float) -> None:
        """A body begins: time before it counts for nothing."""
        with self._mutex:
            self._paid_until = max(self._paid_until, now)

    def take(self, count: int, now: float) -> float:
        """Seconds to wait before *count* bytes may go out."""
        with self._mutex:
            self._paid_until = max(self._paid_until, now - _LATE_S) + count / self._rate
            return max(0.0, self._paid_until - now)


class PacedHandler(FileHandler):
    """Serves files at ``rate`` bytes a second: on each connection, or on all together where ``shared`` is set."""

    rate = 1e6
    shared: Bucket | None = None
    bytes_sent = 0  # of bodies, by all connections
    _counting = Lock()

    def setup(self) -> None:
        """A connection begins."""
        super().setup()
        self._bucket = self.shared or Bucket(self.rate)

    def answer(self, *, body: bool) -> None:
        """Answer one request."""
        if self.path == SENT:
            self.send_text(str(PacedHandler.bytes_sent), "text/plain", body=body)
        else:
            super().answer(body=body)

    def send_file(self, path: Path, headers: dict[str, str], *, body: bool) -> None:
        """A file or the range of it that was asked for."""
        self._bucket.begin(time.monotonic())
        super().send_file(path, headers, body=body)

    def send_some(self, fd: int, start: int, count: int) -> int:
        """Send a little of a body, in its time."""
        count = min(count, _STEP)
        time.sleep(self._bucket.take(count, time.monotonic()))
        sent = super().send_some(fd, start, count)
        with self._counting:
            PacedHandler.bytes_sent += sent
        return sent


def bytes_sent(address: str) -> int:
    """How many bytes of bodies a paced server has sent."""
    with urlopen(address + SENT) as answer:
        return int(answer.read())


def main(folder: str, scope: str, rate: str) -> None:
    """Serve until killed."""
    PacedHandler.rate = float(rate)
    PacedHandler.shared = Bucket(float(rate)) if scope == "server" else None
    serve(PacedHandler, Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
