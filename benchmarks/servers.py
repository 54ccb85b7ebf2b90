"""Local HTTP servers, each a process of its own so that it does not share an interpreter with what it serves."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from .measure import tool

_RANGE = re.compile(r"bytes=(\d+)-(\d*)\Z")
_REPOSITORY = Path(__file__).parent.parent

_NGINX = """\
daemon off; {user} worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
events {{ worker_connections 256; }}
http {{
  access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  server {{ listen 127.0.0.1:{port}; root {served}; autoindex on; }}
}}
"""


class FileHandler(BaseHTTPRequestHandler):
    """Serves the files below ``folder`` with sendfile and ranges, and index pages of its folders."""

    folder: Path
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        """Answer one request."""
        name = unquote(urlsplit(self.path).path).lstrip("/")
        path = self.folder / name
        if path.is_dir():
            links = "".join(f'<a href="{p.name}">{p.name}</a>\n' for p in sorted(path.iterdir()) if p.is_file())
            title = f"Directory listing for /{name}"
            page = f"<html><head><title>{title}</title></head><body><h1>{title}</h1><pre>{links}</pre></body></html>"
            self.send_text(page, "text/html", body=body)
        elif path.is_file():
            self.send_file(path, {}, body=body)
        else:
            self.send_error(404)

    def send_text(self, text: str, kind: str, *, body: bool = True) -> None:
        """A whole answer of text."""
        data = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def send_file(self, path: Path, headers: dict[str, str], *, body: bool) -> None:
        """A file or the range of it that was asked for."""
        size = path.stat().st_size
        asked = _RANGE.match(self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        stop = min(size, int(asked[2]) + 1) if asked and asked[2] else size
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        for name, value in {"Accept-Ranges": "bytes", "Content-Length": str(stop - start), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self._copy(path, start, stop)

    def _copy(self, path: Path, start: int, stop: int) -> None:
        self.wfile.flush()
        with open(path, "rb") as file:
            try:
                while start < stop:
                    sent = self.send_some(file.fileno(), start, stop - start)
                    if sent == 0:
                        break
                    start += sent
            except (BrokenPipeError, ConnectionResetError):
                pass
        if start < stop:
            self.close_connection = True

    def send_some(self, fd: int, start: int, count: int) -> int:
        """Send up to *count* bytes of a body from *start*; how many went out."""
        return os.sendfile(self.connection.fileno(), fd, start, min(8 << 20, count))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # a refused connection would be tried again a second later


def serve(handler: type[FileHandler], folder: Path) -> None:
    """Serve *folder* until killed; the port is printed first."""
    handler.folder = folder
    server = _Server(("127.0.0.1", 0), handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


@contextmanager
def started(module: str, folder: Path, *options: str) -> Iterator[str]:
    """The address of a server module of this package that serves *folder* in a process of its own."""
    argv = [sys.executable, "-m", f"benchmarks.{module}", str(folder), *options]
    with subprocess.Popen(argv, cwd=_REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


@contextmanager
def web(folder: Path, scratch: Path) -> Iterator[tuple[str, str]]:
    """The address of a web server over *folder* and its name: nginx where it is installed, else Python with sendfile."""
    nginx = tool("nginx")
    if nginx is None:
        with started("servers", folder) as address:
            yield address, "a Python server with sendfile"
        return
    with _free_port() as port:
        pass
    user = "user root;" if os.geteuid() == 0 else ""
    (scratch / "nginx.conf").write_text(_NGINX.format(folder=scratch, served=folder, port=port, user=user))
    with _running([nginx, "-c", str(scratch / "nginx.conf"), "-p", str(scratch)], port):
        yield f"http://127.0.0.1:{port}", "nginx"


@contextmanager
def _free_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@contextmanager
def _running(argv: Sequence[str], port: int) -> Iterator[None]:
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as process:
        try:
            _wait_for(port)
            yield
        finally:
            process.terminate()


def _wait_for(port: int) -> None:
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.02)
    raise TimeoutError(f"no server answers on port {port}")


if __name__ == "__main__":
    serve(FileHandler, Path(sys.argv[1]))
