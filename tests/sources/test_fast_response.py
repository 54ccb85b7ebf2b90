"""Short answers over an open connection are parsed by us; whatever is not plain is requested in the common way."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

import pytest
from http_responses import Clock
from origin import RawServer

from modelstow.backends import AccessDenied, NotFound, SourceError
from modelstow.backends.conformance import TEN
from modelstow.backends.http.client import HEAD_TIMEOUT_S, HttpSource
from modelstow.backends.source import read_body

STATUS = b"HTTP/1.1 206 Partial Content\r\n"
RANGE = b"Content-Range: bytes 0-9/10\r\n"
LENGTH = b"Content-Length: 10\r\n"
HEAD = STATUS + RANGE + LENGTH
PLAIN = HEAD + b"\r\n" + TEN


class Script:
    """The answers to requests as they come, over any number of connections; a plain one where none is left.

    After the answers that *ends* counts, from 0, it closes the connection.
    """

    def __init__(self, *answers: bytes, ends: frozenset[int] = frozenset()) -> None:
        self._answers, self._ends = answers, ends
        self.connections: list[int] = []  # the port of each request's client
        self.requests: list[bytes] = []

    def __call__(self, connection: socket.socket) -> None:
        request = b""  # the first was read by the server
        while True:
            index = len(self.connections)
            self.connections.append(connection.getpeername()[1])
            self.requests.append(request)
            connection.sendall(self._answers[index] if index < len(self._answers) else PLAIN)
            if index in self._ends:
                return
            request = b""
            while b"\r\n\r\n" not in request:
                if not (came := connection.recv(1 << 16)):
                    return
                request += came


def ten_of(source: HttpSource, server: RawServer, path: str = "x") -> bytes:
    locator = f"{server.url}/{path}"
    return read_body(source.open(locator, start=0, stop=10), at_most=100, locator=locator)


def test_short_ranges_share_a_connection():
    """One after the other over the first connection, each asked once."""
    script = Script()
    with RawServer(script) as server:
        source = HttpSource({})
        assert [ten_of(source, server, f"{n}?a=%20") for n in range(3)] == [TEN] * 3

    assert len(set(script.connections)) == 1
    first, *fields = script.requests[2].decode().split("\r\n")
    assert first == "GET /2?a=%20 HTTP/1.1"
    assert f"Host: {server.url.removeprefix('http://')}" in fields and "Range: bytes=0-9" in fields
    assert "Accept-Encoding: identity" in fields


ODD = {
    "chunked": STATUS + RANGE + b"Transfer-Encoding: chunked\r\n\r\na\r\n" + TEN + b"\r\n0\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 11\r\n\r\n" + TEN,
    "a length that is none": STATUS + RANGE + b"Content-Length: +10\r\n\r\n" + TEN,
    "more than it announced": PLAIN + b"x",
    "too much": STATUS + b"Content-Range: bytes 0-99999/100000\r\nContent-Length: 100000\r\n\r\n" + bytes(100_000),
    "a folded field": HEAD + b"X-Folded: a\r\n b\r\n\r\n" + TEN,
    "bare line feeds": HEAD.replace(b"\r\n", b"\n") + b"X-More: a\r\n\r\n" + TEN,
    "a control character": HEAD + b"X-Odd: a\x00b\r\n\r\n" + TEN,
    "a field without a name": HEAD + b": x\r\n\r\n" + TEN,
    "a long head": HEAD + b"".join(b"X-Long-%d: %s\r\n" % (n, b"x" * 200) for n in range(90)) + b"\r\n" + TEN,
    "an older protocol": PLAIN.replace(b"HTTP/1.1", b"HTTP/1.0"),
    "blanks without end": HEAD + b"X-Blank: " + b" \t" * 7_000 + b"\x01\r\n\r\n" + TEN,
    "a status of its own": b"HTTP/1.1 099 Whatever\r\n" + RANGE + LENGTH + b"\r\n" + TEN,
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_what_is_not_plain_is_asked_for_again_in_the_common_way(odd: bytes):
    """The second answer over one connection is odd: its bytes are not used, and another connection fetches them."""
    script = Script(PLAIN, odd)
    with RawServer(script) as server:
        source = HttpSource({})
        assert [ten_of(source, server, str(n)) for n in range(4)] == [TEN] * 4

    first, second, third, *later = script.connections
    assert first == second != third
    assert set(later) == {third} and len(later) == 2


@pytest.mark.parametrize("half", [b"", STATUS, HEAD + b"\r\n" + TEN[:5]], ids=["at once", "in the head", "in the body"])
def test_a_connection_that_ends_as_it_is_used_again_is_no_failure(half: bytes):
    """A server may close what was idle just when it is asked: another connection is, once (N2)."""
    script = Script(PLAIN, half, ends=frozenset({1}))
    with RawServer(script) as server:
        source = HttpSource({})
        assert [ten_of(source, server) for _ in range(3)] == [TEN] * 3

    first, second, third, fourth = script.connections
    assert first == second != third == fourth


def test_what_a_server_closes_is_not_used_again():
    """An answer that says so is the last of its connection, and as good as any."""
    script = Script(PLAIN, HEAD + b"Connection: Close\r\n\r\n" + TEN, ends=frozenset({1}))
    with RawServer(script) as server:
        source = HttpSource({})
        assert [ten_of(source, server) for _ in range(3)] == [TEN] * 3

    first, second, third = script.connections
    assert first == second != third


@pytest.mark.parametrize(("status", "kind"), [(b"404 Not Found", NotFound), (b"403", AccessDenied)], ids=["404", "403"])
def test_a_short_refusal_keeps_its_connection(status: bytes, kind: type[SourceError]):
    """It is an answer like another, and means what it always means."""
    script = Script(PLAIN, b"HTTP/1.1 " + status + b"\r\nContent-Length: 4\r\n\r\nnope")
    with RawServer(script) as server:
        source = HttpSource({})
        assert ten_of(source, server) == TEN
        with pytest.raises(kind):
            ten_of(source, server)
        assert ten_of(source, server) == TEN

    assert len(script.connections) == 3 and len(set(script.connections)) == 1


def test_a_short_redirect_keeps_its_connection():
    """It is followed over the connection that sent it."""
    script = Script(PLAIN, b"HTTP/1.1 302 Found\r\nLocation: /there\r\nContent-Length: 0\r\n\r\n")
    with RawServer(script) as server:
        source = HttpSource({})
        assert [ten_of(source, server), ten_of(source, server)] == [TEN] * 2

    assert len(script.connections) == 3 and len(set(script.connections)) == 1
    assert script.requests[2].startswith(b"GET /there HTTP/1.1\r\n")


@pytest.mark.usefixtures("endless_reads")
@pytest.mark.parametrize("status", [b"404 Not Found", b"302 Found\r\nLocation: /there"], ids=["refusal", "redirect"])
def test_the_body_of_what_is_no_content_is_not_waited_for(status: bytes):
    """It announces what it never sends; it is not read anyway."""
    announced = b"HTTP/1.1 " + status + b"\r\nContent-Length: 200\r\n\r\n"
    script = Script(PLAIN, announced, announced, ends=frozenset({2}))
    with RawServer(script) as server:
        source = HttpSource({}, head_timeout_s=3600.0)
        assert ten_of(source, server) == TEN
        with suppress(NotFound):
            assert ten_of(source, server) == TEN


@pytest.mark.usefixtures("endless_reads")
def test_a_head_of_bare_line_feeds_is_not_waited_for_twice():
    """Its end is seen as soon as it is there, though it is none by the standard."""
    bare = HEAD.replace(b"\r\n", b"\n") + b"\n" + TEN
    script = Script(PLAIN, bare, bare)
    with RawServer(script) as server:
        source = HttpSource({}, head_timeout_s=3600.0)
        assert [ten_of(source, server) for _ in range(3)] == [TEN] * 3


def test_a_compressed_answer_is_refused_here_too():
    """A range of a compressed form is no range (N14)."""
    script = Script(PLAIN, HEAD + b"Content-Encoding: gzip\r\n\r\n" + TEN)
    with RawServer(script) as server:
        source = HttpSource({})
        assert ten_of(source, server) == TEN
        with pytest.raises(SourceError, match="encodes the body as gzip"):
            ten_of(source, server)


def test_a_trickled_short_answer_ends_at_the_deadline_of_a_head(clock: Clock):
    """Each byte comes long before a read would time out; then another connection is asked (N12)."""
    script, stopped = Script(PLAIN), threading.Event()

    def answer(connection: socket.socket) -> None:
        if script.connections:
            script(connection)
            return
        script.connections.append(0)
        connection.sendall(PLAIN)
        connection.recv(1 << 16)
        with suppress(OSError):
            connection.sendall(HEAD)
            clock.advance(HEAD_TIMEOUT_S + 1)
            while not stopped.wait(0.02):
                connection.sendall(b"X-Slow: a\r\n")

    with RawServer(answer) as server:
        source = HttpSource({})
        assert [ten_of(source, server), ten_of(source, server)] == [TEN] * 2
    stopped.set()


def test_a_token_with_a_line_in_it_is_never_sent():
    """Neither over a new connection nor over an open one does it smuggle in a header."""
    script, tokens = Script(), ["good", "bad\r\nX-Smuggled: 1"]
    with RawServer(script) as server:
        source = HttpSource({}, token=lambda url: tokens[0])
        assert ten_of(source, server) == TEN
        tokens.pop(0)
        with pytest.raises(SourceError) as caught:
            ten_of(source, server)

    assert "bad" not in str(caught.value)
    assert not any(b"Smuggled" in request for request in script.requests)


def test_an_interrupt_leaves_no_half_answer_behind(monkeypatch: pytest.MonkeyPatch):
    """What asks next over that connection would be given the answer to another question."""
    script = Script()
    with RawServer(script) as server:
        source = HttpSource({})
        assert ten_of(source, server) == TEN

        def interrupted(*about: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("modelstow.backends.http.fast_response._parse_head", interrupted)
            ten_of(source, server)
        assert ten_of(source, server) == TEN

    first, second, third = script.connections
    assert first == second != third
