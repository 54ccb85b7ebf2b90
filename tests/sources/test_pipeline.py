"""Small objects are requested ahead of their responses over an open connection; what is not plain has no body here."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from builders import PATIENCE_S
from hypothesis import given
from hypothesis import strategies as st
from origin import Fault, Origin, RawServer

from modelstow.backends import ProtocolError
from modelstow.backends.conformance import TEN
from modelstow.backends.http import pipeline as pipelines
from modelstow.backends.http.client import HttpSource
from modelstow.backends.http.pipeline import Pipeline
from modelstow.backends.source import PipelinedSource, read_body

LENGTH = b"Content-Length: 10\r\n"
HEAD = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-9/10\r\n" + LENGTH
PLAIN = HEAD + b"\r\n" + TEN
WHOLE = b"HTTP/1.1 200 OK\r\n" + LENGTH + b"\r\n" + TEN
ABSENT = b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\ngone"


class Script:
    """One response to each request of a connection, then the plain one; it closes where a response is None."""

    def __init__(self, *responses: bytes | None) -> None:
        self.responses = list(responses)
        self.requests: list[tuple[int, bytes]] = []  # with the port of the client

    def __call__(self, connection: socket.socket) -> None:
        received = b"GET / HTTP/1.1\r\n\r\n"  # the first was read by the server
        while True:
            while b"\r\n\r\n" not in received:
                if not (more := connection.recv(1 << 16)):
                    return
                received += more
            request, _, received = received.partition(b"\r\n\r\n")
            self.requests.append((connection.getpeername()[1], request))
            response = self.responses.pop(0) if self.responses else PLAIN
            if response is None:
                return
            connection.sendall(response)


def bodies(source: HttpSource, url: str, count: int, poll: Callable[[], None] = lambda: None) -> list[bytes | None] | None:
    """What the pipeline yields for so many objects of ten bytes, after a first one that opens a connection."""
    read_body(source.open(f"{url}/first", start=0, stop=10), at_most=100, locator=url)
    return again(source, url, count, poll)


def again(source: HttpSource, url: str, count: int, poll: Callable[[], None] = lambda: None) -> list[bytes | None] | None:
    with source.pipeline(f"{url}/0", poll) as fetch_objects:
        return None if fetch_objects is None else list(fetch_objects([(f"{url}/{n}", 10) for n in range(count)]))


def test_a_web_server_is_a_pipelined_source():
    """The transfer asks for it by this protocol."""
    assert isinstance(HttpSource({}), PipelinedSource)


def test_many_objects_come_over_one_connection():
    """Bodies in the order of the requests, whole or as a range; the connection serves the next request too."""
    script = Script(PLAIN, WHOLE)
    with RawServer(script) as server:
        source = HttpSource({})
        assert bodies(source, server.url, 100) == [TEN] * 100
        assert again(source, server.url, 3) == [TEN] * 3

    assert len(script.requests) == 104 and len({port for port, _ in script.requests}) == 1
    assert script.requests[5][1].startswith(b"GET /4 HTTP/1.1\r\n") and b"Range: bytes=0-9" in script.requests[5][1]


def test_requests_are_sent_before_the_first_response():
    """A server that answers nothing has received several."""
    received = bytearray()

    class Sock:
        def settimeout(self, seconds: float) -> None: ...

        def sendall(self, data: bytes) -> None:
            received.extend(data)

        def recv_into(self, view: memoryview) -> int:
            return 0

    pipeline = Pipeline(Connection(Sock()), lambda: None)
    assert list(pipeline.bodies([b"GET %d\r\n" % n for n in range(100)], [10] * 100)) == []
    assert received.count(b"GET") == 32 and not pipeline.reusable and pipeline.plain


def test_without_an_open_connection_there_is_no_pipeline():
    """The first response of a server has to be read by the full parser."""
    with RawServer(Script()) as server:
        assert again(HttpSource({}), server.url, 3) is None


def test_no_pipeline_through_a_proxy():
    """Some proxies mix up the order of responses."""
    with Origin({"0": TEN}) as proxy:
        source = HttpSource({"http_proxy": proxy.url})
        with source.pipeline("http://host.invalid/0", lambda: None) as fetch_objects:
            assert fetch_objects is None


SKIPPED = {
    "not found": ABSENT,
    "another length": b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n" + TEN + b"x",
    "another total": PLAIN.replace(b"/10", b"/11"),
    "an encoding": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n" + LENGTH + b"\r\n" + TEN,
    "a range without its place": b"HTTP/1.1 206 Partial Content\r\n" + LENGTH + b"\r\n" + TEN,
}


@pytest.mark.parametrize("response", SKIPPED.values(), ids=SKIPPED)
def test_a_response_with_another_body_is_skipped(response: bytes):
    """Those behind it arrive."""
    with RawServer(Script(PLAIN, PLAIN, response)) as server:
        assert bodies(HttpSource({}), server.url, 4) == [TEN, None, TEN, TEN]


ENDS = {
    "a redirect": b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n",
    "too many requests": b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 9\r\nContent-Length: 0\r\n\r\n",
    "not authorised": b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n",
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\na\r\n" + TEN + b"\r\n0\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 11\r\n\r\n" + TEN,
    "a length that is none": b"HTTP/1.1 200 OK\r\nContent-Length: +10\r\n\r\n" + TEN,
    "no length": b"HTTP/1.1 200 OK\r\n\r\n" + TEN,
    "a folded field": HEAD + b"X-Folded: a\r\n b\r\n\r\n" + TEN,
    "bare line feeds": HEAD.replace(b"\r\n", b"\n") + b"X-More: a\r\n\r\n" + TEN,
    "a control character": HEAD + b"X-Odd: a\x00b\r\n\r\n" + TEN,
    "a field without a name": HEAD + b": x\r\n\r\n" + TEN,
    "HTTP/1.0": PLAIN.replace(b"HTTP/1.1", b"HTTP/1.0"),
    "informational": b"HTTP/1.1 103 Early Hints\r\n\r\n" + PLAIN,
    "no content": b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
    "not HTTP": b"hello\r\n\r\n",
    "an endless head": HEAD + b"X: " + b"a" * 20_000,
}


@pytest.mark.parametrize("response", ENDS.values(), ids=ENDS)
def test_a_response_that_is_not_plain_ends_all_pipelines_to_its_server(response: bytes):
    """What came before it stays; the connection is closed and the server asked one by one from then on."""
    script = Script(PLAIN, PLAIN, response)
    with RawServer(script) as server:
        source = HttpSource({})
        assert bodies(source, server.url, 4) == [TEN]
        assert bodies(source, server.url, 4) is None


def test_a_server_that_closes_leaves_the_rest_unanswered():
    """As many do after a thousand requests: over a new connection it goes on."""
    closing = HEAD + b"Connection: close\r\n\r\n" + TEN
    with RawServer(Script(PLAIN, PLAIN, closing, None, PLAIN, PLAIN, None)) as server:
        source = HttpSource({})
        assert bodies(source, server.url, 4) == [TEN, TEN]
        assert bodies(source, server.url, 4) == [TEN]


def test_a_far_too_long_body_is_not_read():
    """An object of another size may be large: the connection is given up."""
    with RawServer(Script(PLAIN, b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n")) as server:
        assert bodies(HttpSource({}), server.url, 4) == []


def test_bytes_behind_the_last_response_close_the_connection():
    """They would be read as the next response."""
    script = Script(PLAIN, PLAIN + b"x")
    with RawServer(script) as server:
        source = HttpSource({})
        assert bodies(source, server.url, 1) == [TEN]
        assert again(source, server.url, 1) is None


def test_a_pipeline_that_is_not_read_to_its_end_closes_the_connection():
    """Unread responses would be those of the next requests."""
    with RawServer(Script()) as server:
        source = HttpSource({})
        bodies(source, server.url, 1)
        with source.pipeline(f"{server.url}/0", lambda: None) as fetch_objects:
            assert fetch_objects is not None and next(fetch_objects([(f"{server.url}/{n}", 10) for n in range(3)])) == TEN
        assert again(source, server.url, 1) is None


class Connection:
    host, port, default_port = "host", 80, 80

    def __init__(self, sock: object) -> None:
        self.sock = sock


class Trickle:
    """A socket that gives one byte at a time, each a second later on its clock."""

    def __init__(self, data: bytes) -> None:
        self.data, self.now = data, 0.0

    def monotonic(self) -> float:
        return self.now

    def settimeout(self, seconds: float) -> None: ...

    def sendall(self, data: bytes) -> None: ...

    def recv_into(self, view: memoryview) -> int:
        self.now += 1
        view[0], self.data = self.data[0], self.data[1:]
        return 1


def test_a_server_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch):
    """Each response has to come within its time, and a server that failed so once is not asked so again."""
    sock = Trickle(PLAIN)
    monkeypatch.setattr(pipelines, "time", sock)
    pipeline = Pipeline(Connection(sock), lambda: None)

    assert list(pipeline.bodies([b"GET"], [10])) == []
    assert sock.now < 15 and not pipeline.plain and not pipeline.reusable


def test_waiting_can_be_cancelled():
    """While nothing arrives, *poll* is called; what it raises ends the wait."""
    silent = threading.Event()

    def serve(connection: socket.socket) -> None:
        connection.sendall(PLAIN)
        silent.wait(PATIENCE_S)

    def poll() -> None:
        raise KeyboardInterrupt

    with RawServer(serve) as server:
        source = HttpSource({})
        with pytest.raises(KeyboardInterrupt):
            bodies(source, server.url, 3, poll)
        silent.set()
        assert again(source, server.url, 1) is None


def test_invalid_locators_are_refused():
    """No control character reaches a request, no credential a URL."""
    with RawServer(Script()) as server:
        source = HttpSource({})
        bodies(source, server.url, 1)
        with source.pipeline(f"{server.url}/0", lambda: None) as fetch_objects:
            assert fetch_objects is not None
            with pytest.raises(ProtocolError):
                fetch_objects([(f"{server.url}/a\r\nX: y", 10)])


def test_a_login_is_sent_with_each_request(tmp_path: Path):
    """As for a single request."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    with Origin({"first": TEN, "0": TEN, "1": TEN}, protect={"": ("me", "secret")}) as origin:
        assert bodies(HttpSource({"NETRC": str(netrc)}), origin.url, 3) == [TEN, TEN, None]


def test_a_broken_body_ends_the_pipeline():
    """What was cut off is no body."""
    with Origin({"first": TEN, **{str(n): TEN for n in range(4)}}) as origin:
        origin.fail("1", Fault(status=404))
        origin.fail("3", Fault(cut_after=5))
        assert bodies(HttpSource({}), origin.url, 4) == [TEN, None, TEN]


def test_a_pipeline_without_requests_keeps_its_connection():
    """Where everything is there already, the next request finds it open."""
    with RawServer(Script()) as server:
        source = HttpSource({})
        bodies(source, server.url, 1)
        with source.pipeline(f"{server.url}/0", lambda: None) as fetch_objects:
            assert fetch_objects is not None and list(fetch_objects([])) == []
        assert again(source, server.url, 1) == [TEN]


@given(st.lists(st.binary(max_size=300), max_size=8), st.integers(1, 40), st.binary(max_size=200))
def test_whatever_a_server_sends_no_body_is_made_up(payloads: list[bytes], step: int, noise: bytes):
    """Responses cut anywhere, with noise behind them: each body is one that was sent, in its place."""
    stream = b"".join(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(p), p) for p in payloads) + noise

    class Sock:
        def __init__(self) -> None:
            self.pieces: Iterator[bytes] = (stream[at : at + step] for at in range(0, len(stream), step))

        def settimeout(self, seconds: float) -> None: ...

        def sendall(self, data: bytes) -> None: ...

        def recv_into(self, view: memoryview) -> int:
            piece = next(self.pieces, b"")
            view[: len(piece)] = piece
            return len(piece)

    pipeline = Pipeline(Connection(Sock()), lambda: None)
    found = list(pipeline.bodies([b"GET"] * len(payloads), [len(p) for p in payloads]))
    assert found == payloads
    if not noise:
        assert pipeline.reusable
