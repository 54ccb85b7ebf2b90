"""A folder behind HTTP: ranges, index pages, a cap on speed, and a count of what was asked and sent."""

from __future__ import annotations

import html
import re
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

_RANGE = re.compile(r"bytes=(\d+)-(\d*)\Z")
_STEP = 1 << 18


@dataclass
class Request:
    """One request, and the bytes of body that it was sent."""

    method: str
    path: str
    sent: int = 0


class Origin:
    """Serves a folder on loopback while used as a context manager. ``rate`` caps the bytes a second of each answer."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rate = folder, 0.0  # 0: as fast as it goes
        self.requests: list[Request] = []
        self.answering = 0  # bodies that are being sent
        self.changed = threading.Condition()
        self._hold_at: int | None = None
        handler = type("Handler", (_Handler,), {"origin": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Origin:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def gets(self) -> list[str]:
        """The paths of all GET requests so far."""
        return [request.path for request in self.requests if request.method == "GET"]

    @property
    def sent(self) -> int:
        """Bytes of body sent so far."""
        return sum(request.sent for request in self.requests)

    def forget(self) -> None:
        """Count from zero."""
        self.requests = []

    def sent_in_all(self) -> int:
        """Bytes of body sent so far, once every answer has ended: a client may have its last byte before we count it."""
        with self.changed:
            self.changed.wait_for(lambda: self.answering == 0)
        return self.sent

    def hold(self, at: int | None) -> None:
        """Send no more once so many bytes were sent; None: go on."""
        with self.changed:
            self._hold_at = at
            self.changed.notify_all()

    @property
    def holds(self) -> bool:
        """Whether so many bytes were sent that no more are."""
        return self._hold_at is not None and self.sent >= self._hold_at

    def wait_while_held(self) -> None:
        """Called before each part of an answer."""
        if self._hold_at is not None:
            with self.changed:
                self.changed.wait_for(lambda: not self.holds)


class _Handler(BaseHTTPRequestHandler):
    origin: Origin
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = Request(self.command, path)
        self.origin.requests.append(request)
        place = self.origin.folder / path.lstrip("/")
        if ".." in path.split("/") or not place.exists():
            self._head(404, 0)
        elif place.is_dir():
            self._index(path, place)
        else:
            self._file(place, request)

    def _index(self, path: str, folder: Path) -> None:
        names = sorted(each.name + "/" * each.is_dir() for each in folder.iterdir())
        links = "".join(f'<a href="{quote(name)}">{html.escape(name)}</a>\n' for name in names)
        page = f"<html><head><title>Index of {html.escape(path)}</title></head><body><pre>{links}</pre></body></html>"
        self._head(200, len(page.encode()))
        if self.command == "GET":
            self.wfile.write(page.encode())

    def _file(self, file: Path, request: Request) -> None:
        size = file.stat().st_size
        asked = _RANGE.match(self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        stop = min(size, int(asked[2]) + 1) if asked and asked[2] else size
        if asked and start >= size:
            return self._head(416, 0, f"bytes */{size}")
        self._head(206 if asked else 200, stop - start, f"bytes {start}-{stop - 1}/{size}" if asked else "")
        if self.command == "GET":
            self._body(file, start, stop, request)
        return None

    def _body(self, file: Path, start: int, stop: int, request: Request) -> None:
        began = time.monotonic()
        self._count_answer(1)
        with open(file, "rb") as body:
            body.seek(start)
            try:
                while chunk := body.read(min(_STEP, stop - body.tell())):
                    self.origin.wait_while_held()
                    self.wfile.write(chunk)
                    request.sent += len(chunk)
                    if rate := self.origin.rate:
                        time.sleep(max(0.0, began + request.sent / rate - time.monotonic()))
            except ConnectionError:  # the other side was killed
                self.close_connection = True
            finally:
                self._count_answer(-1)

    def _count_answer(self, change: int) -> None:
        with self.origin.changed:
            self.origin.answering += change
            self.origin.changed.notify_all()

    def _head(self, status: int, length: int, content_range: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
