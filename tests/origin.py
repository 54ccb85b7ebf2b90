"""A real HTTP server on loopback that serves ranges and listings, and misbehaves on request."""

from __future__ import annotations

import hashlib
import html
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote, unquote, urlsplit

_RANGE = re.compile(r"bytes=(\d+)-(\d*)\Z")
_STEP = 1 << 16


@dataclass
class Fault:
    """How one answer is to go wrong. Fields are independent; the default is no fault."""

    status: int | None = None  # answer with this status and no content but *extra*
    headers: Mapping[str, str] = field(default_factory=dict)  # added to the answer
    cut_after: int | None = None  # bytes of body after which the connection is dropped
    reset: bool = True  # dropped by a reset, which throws away what has not been read; else closed
    flip: int | None = None  # offset in the object at which one bit is wrong
    extra: bytes = b""  # sent behind the body, and counted in its length
    ignore_range: bool = False  # 200 with the whole object
    wrong_range: bool = False  # a Content-Range that is not what was asked
    range_status: int = 206  # some S3 servers say 200 with a Content-Range
    no_length: bool = False  # neither Content-Length nor chunks: the end is the end of the connection
    redirect: str | None = None  # Location
    encoding: str | None = None  # a Content-Encoding that was not requested
    times: int = 1  # answers it applies to; -1: all


@dataclass
class Seen:
    """One request."""

    method: str
    path: str
    range: str | None
    headers: Mapping[str, str]
    client: int = 0  # the port it came from: one for each connection
    target: str = ""  # as it was in the request, query and all
    sent: int = 0  # bytes of body


class Origin:
    """Serves ``objects`` (path -> bytes or a file on disk). Use as a context manager.

    ``listing``: "index" (as nginx), "python" (as http.server), "sums" (a SHA256SUMS file in every folder) or "none".
    ``rate`` caps bytes a second of each connection; ``tls`` makes it speak https; ``address`` is where it listens.
    """

    def __init__(
        self,
        objects: Mapping[str, bytes | Path] | None = None,
        *,
        listing: str = "index",
        rate: float | None = None,
        protect: Mapping[str, tuple[str, str]] | None = None,
        tls: ssl.SSLContext | None = None,
        address: str = "127.0.0.1",
    ) -> None:
        self.objects: dict[str, bytes | Path] = dict(objects or {})
        self.listing, self.rate, self.protect = listing, rate, dict(protect or {})
        self.requests: list[Seen] = []
        self.gates: dict[str, tuple[int, threading.Event]] = {}  # path -> offset in the object, and what to wait for there
        self.reached = threading.Event()  # set when an answer waits at a gate
        self._faults: dict[str, list[Fault]] = {}
        self._mutex = threading.Lock()
        origin = self

        class Handler(_Handler):
            served = origin

        self.scheme = "https" if tls else "http"
        self._server = ThreadingHTTPServer((address, 0), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *about: None  # type: ignore[method-assign]  # a client that hangs up is no error
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @classmethod
    def of_folder(cls, folder: Path, prefix: str = "", **options: object) -> Origin:
        """Serve the files of a folder as they are on disk."""
        files = {prefix + str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
        return cls(files, **options)  # type: ignore[arg-type]

    def __enter__(self) -> Origin:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        for _, gate in list(self.gates.values()):
            gate.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return self.at("127.0.0.1")

    def at(self, host: str) -> str:
        """Its URL under another name of the same machine."""
        return f"{self.scheme}://{host}:{self.port}"

    def fail(self, path: str, fault: Fault) -> None:
        """Let the next answers for *path* ("*": for any) go wrong; several queue up."""
        with self._mutex:
            self._faults.setdefault(path, []).append(fault)

    def behave(self) -> None:
        """Forget every fault."""
        with self._mutex:
            self._faults.clear()

    def gets(self, path: str | None = None) -> list[Seen]:
        """The GET requests so far, of one path or all."""
        return [seen for seen in list(self.requests) if seen.method == "GET" and path in (None, seen.path)]

    def sent(self, path: str | None = None) -> int:
        """Bytes of body sent so far."""
        return sum(seen.sent for seen in self.gets(path))

    def forget(self) -> None:
        """Forget the requests so far."""
        self.requests.clear()

    def next_fault(self, path: str) -> Fault:
        with self._mutex:
            for key in (path, "*"):
                queue = self._faults.get(key, [])
                if queue:
                    fault = queue[0]
                    if fault.times > 0:
                        fault.times -= 1
                        if fault.times == 0:
                            queue.pop(0)
                    return fault
        return Fault()

    def answer(self, seen: Seen) -> tuple[int, Mapping[str, str], bytes | Path] | None:
        """Status, headers and content of an answer that a subclass gives by rules of its own; None: an object as usual."""
        return None

    def read(self, path: str) -> bytes | Path | None:
        if path in self.objects:
            return self.objects[path]
        folder, _, name = path.rpartition("/")
        if name == "SHA256SUMS" and self.listing == "sums":
            return self._sums(folder + "/" if folder else "")
        return None

    def _sums(self, prefix: str) -> bytes | None:
        rows = []
        for name, content in sorted(self.objects.items()):
            if name.startswith(prefix):
                data = content if isinstance(content, bytes) else content.read_bytes()
                rows.append(f"{hashlib.sha256(data).hexdigest()}  {name[len(prefix) :]}\n")
        return "".join(rows).encode() if rows else None

    def index(self, prefix: str) -> bytes | None:
        """The index page of a folder as nginx or Python's http.server writes it."""
        names = sorted({self._first(name[len(prefix) :]) for name in self.objects if name.startswith(prefix)})
        if not names or self.listing not in ("index", "python"):
            return None
        title = "Index of" if self.listing == "index" else "Directory listing for"
        parent = '<a href="../">../</a>\n' if self.listing == "index" else ""
        links = "".join(f'<a href="{quote(name)}">{html.escape(name)}</a>\n' for name in names)
        return f"<html><head><title>{title} /{prefix}</title></head><body><pre>{parent}{links}</pre></body></html>".encode()

    @staticmethod
    def _first(rest: str) -> str:
        head, slash, _ = rest.partition("/")
        return head + slash


class _Handler(BaseHTTPRequestHandler):
    served: Origin
    protocol_version = "HTTP/1.1"
    # With small writes and Nagle's algorithm every answer would wait 40 ms for an acknowledgement.
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        seen = Seen(self.command, path, self.headers.get("Range"), dict(self.headers), self.client_address[1], self.path)
        self.served.requests.append(seen)
        fault = self.served.next_fault(path)
        if fault.redirect is not None or fault.status is not None:
            where = {} if fault.redirect is None else {"Location": fault.redirect}
            self._head(fault.status or 302, len(fault.extra), {**where, **fault.headers})
            self.wfile.write(fault.extra if body else b"")
            return None
        if (answered := self.served.answer(seen)) is not None:
            status, headers, content = answered
            if status != 200:
                return self._head(status, 0, headers)
            return self._object(content, fault, seen, body=body, headers=headers)
        if not self._allowed(path):
            return self._head(401, 0, {"WWW-Authenticate": 'Basic realm="models"'})
        content = self.served.read(path)
        if content is None and (path == "" or path.endswith("/")):
            page = self.served.index(path)
            if page is not None:
                self._head(200, len(page), {"Content-Type": "text/html", **fault.headers})
                if body:
                    self.wfile.write(page)
                return None
        if content is None:
            return self._head(404, 0, {})
        return self._object(content, fault, seen, body=body)

    def _allowed(self, path: str) -> bool:
        import base64

        for prefix, (user, password) in self.served.protect.items():
            if path.startswith(prefix):
                want = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
                return self.headers.get("Authorization") == want
        return True

    def _object(
        self,
        content: bytes | Path,
        fault: Fault,
        seen: Seen,
        *,
        body: bool,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        match = None if fault.ignore_range else _RANGE.match(seen.range or "")
        start = int(match[1]) if match else 0
        stop = min(size, int(match[2]) + 1) if match and match[2] else size
        headers = {**headers, **fault.headers}
        if match and start >= size:
            return self._head(416, 0, {"Content-Range": f"bytes */{size}"})
        if match:
            shown = start + 1 if fault.wrong_range else start
            headers["Content-Range"] = f"bytes {shown}-{stop - 1}/{size}"
        if fault.encoding:
            headers["Content-Encoding"] = fault.encoding
        length = None if fault.no_length else stop - start + len(fault.extra)
        self._head(fault.range_status if match else 200, length, headers)
        if body:
            self._send(content, start, stop, fault, seen)
        return None

    def _send(self, content: bytes | Path, start: int, stop: int, fault: Fault, seen: Seen) -> None:
        at, sent, size, began = start, 0, stop, time.monotonic()
        file = None if isinstance(content, bytes) else open(content, "rb")  # noqa: SIM115 — closed below
        try:
            while at < stop:
                count = min(_STEP, stop - at)
                if fault.cut_after is not None:
                    count = min(count, fault.cut_after - sent)
                offset, gate = self.served.gates.get(seen.path, (size, None))
                if gate is not None and at < offset < at + count:
                    count = offset - at
                if gate is not None and at == offset:
                    self.wfile.flush()
                    self.served.reached.set()
                    gate.wait()  # `stop` opens every gate
                    self.served.gates.pop(seen.path, None)
                if count <= 0:
                    return self._drop(reset=fault.reset)
                if file is not None:
                    file.seek(at)
                    data = bytearray(file.read(count))
                else:
                    data = bytearray(content[at : at + count])  # type: ignore[index]
                if fault.flip is not None and at <= fault.flip < at + count:
                    data[fault.flip - at] ^= 1
                self.wfile.write(data)
                at, sent = at + count, sent + count
                seen.sent = sent
                if self.served.rate:
                    time.sleep(max(0.0, began + sent / self.served.rate - time.monotonic()))
            self.wfile.write(fault.extra)
            if fault.no_length:
                self.close_connection = True
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            if file is not None:
                file.close()

    def _drop(self, *, reset: bool = True) -> None:
        import socket
        import struct

        self.wfile.flush()
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _head(self, status: int, length: int | None, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        if length is None:
            self.send_header("Connection", "close")
        elif "Content-Length" not in headers:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def gate_of(origin: Origin, path: str, *, after: int = 0) -> threading.Event:
    """Hold the answer that comes to this byte of *path*; ``origin.reached`` is set when it waits there."""
    gate = threading.Event()
    origin.reached.clear()
    origin.gates[path] = (after, gate)
    return gate


class RawServer:
    """Answers every connection on loopback by a function that may write whatever it likes. A context manager."""

    def __init__(self, answer: Callable[[socket.socket], object]) -> None:
        self._answer, self.stopped = answer, threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self.connected = threading.Event()  # set by the first connection

    def __enter__(self) -> RawServer:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                self.connected.set()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while b"\r\n\r\n" not in connection.recv(1 << 16):
                pass
            self._answer(connection)
