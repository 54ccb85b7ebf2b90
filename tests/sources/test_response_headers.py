"""The head of an answer: trickled, endless, too large, contradicting itself."""

from __future__ import annotations

import socket
import threading
import traceback
from collections.abc import Callable

import pytest
from http_responses import Clock
from origin import Origin, RawServer, gate_of

from modelstow.backends import ConnectionFailed, ProtocolError, SourceError, TimedOut
from modelstow.backends.http.client import HEAD_TIMEOUT_S, HttpSource

OK = b"HTTP/1.1 200 OK\r\n"
SECRET = "canary"


def asked(answer: Callable[[socket.socket], object], **options: float) -> SourceError:
    """The error that this answer to a GET ends in."""
    with RawServer(answer) as server, pytest.raises(SourceError) as caught:
        HttpSource({}, **options).open(f"{server.url}/x?{SECRET}")
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    return caught.value


@pytest.mark.parametrize("pieces", [b"X-Slow: ", b"HTTP/1.1 100 Continue\r\n\r\n"], ids=["header", "continue"])
def test_a_trickled_head_ends_at_its_deadline(pieces: bytes):
    """Each byte comes long before a read would time out, and yet it is over (N12)."""
    stopped = threading.Event()

    def trickle(connection: socket.socket) -> None:
        if pieces.startswith(b"X"):
            connection.sendall(OK)
        while not stopped.wait(0.01):
            for byte in pieces:
                connection.sendall(bytes([byte]))

    try:
        error = asked(trickle, head_timeout_s=0.2)
    finally:
        stopped.set()

    assert isinstance(error, TimedOut) and error.transient


def test_a_proxy_that_trickles_its_answer_to_connect_ends_at_the_deadline():
    """The way to the server has a head of its own."""
    stopped = threading.Event()

    def trickle(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        while not stopped.wait(0.01):
            connection.sendall(b"X")

    with RawServer(trickle) as proxy, pytest.raises(TimedOut):
        HttpSource({"https_proxy": proxy.url}, head_timeout_s=0.2).open("https://models.example/x")
    stopped.set()


def test_the_deadline_is_for_the_head_alone(clock: Clock):
    """A body may take longer than a head, and so may the next body over the same connection."""
    with Origin({"x": b"0123456789"}) as origin:
        source = HttpSource({})
        for _ in range(2):
            gate = gate_of(origin, "x", after=5)
            body, view = source.open(f"{origin.url}/x"), memoryview(bytearray(5))
            assert body.read_into(view) == 5
            clock.advance(2 * HEAD_TIMEOUT_S)
            gate.set()
            assert body.read_into(view) == 5 and bytes(view) == b"56789"
            assert body.read_into(view) == 0
            body.close()

        assert len({seen.client for seen in origin.requests}) == 1


@pytest.mark.parametrize(
    "head",
    [
        OK + b"".join(b"X-%d: 1\r\n" % n for n in range(200)) + b"\r\n",
        OK + b"X-Long: " + b"x" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 " + b"x" * 70_000 + b"\r\n\r\n",
    ],
    ids=["many", "long", "status"],
)
def test_a_head_that_is_too_large_is_refused(head: bytes):
    """More than a hundred headers, lines of more than 64 KiB (N12)."""
    error = asked(lambda connection: connection.sendall(head))

    assert isinstance(error, ProtocolError) and "header is too large" in error.what


def test_two_lengths_are_refused():
    """Whichever is believed, the other would cut or lengthen the body (N22)."""
    error = asked(lambda c: c.sendall(OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello"))

    assert isinstance(error, ProtocolError) and "length" in error.what


@pytest.mark.parametrize("coding", [b"gzip", b"GZIP", b"zstd", b"br", b", ".join([b"gzip"] * 20), b"\x1b[2Jx"])
def test_an_encoded_body_is_refused_unread(coding: bytes):
    """However it is coded, whatever it would grow to; and its name cannot draw on a terminal (N13)."""
    error = asked(lambda c: c.sendall(OK + b"Content-Encoding: " + coding + b"\r\nContent-Length: 5\r\n\r\nhello"))

    assert isinstance(error, ProtocolError) and "encodes" in error.what and error.what.isprintable()


def test_a_transfer_coding_is_refused_too():
    """Only chunks are understood; what is compressed on the way is not what was asked for."""
    error = asked(lambda c: c.sendall(OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"))

    assert isinstance(error, ProtocolError)


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 200 OK\r\nContent-", b"SSH-2.0-OpenSSH\r\n\r\n"], ids=["none", "half", "other"]
)
def test_a_connection_that_breaks_or_is_no_http_is_unreachable(answer: bytes):
    """It may be over in a moment."""
    assert isinstance(asked(lambda connection: connection.sendall(answer)), ConnectionFailed)


def test_half_a_location_is_not_followed():
    """A connection that breaks within the head gives no redirect target."""
    head = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: /x?signa"
    with RawServer(lambda connection: connection.sendall(head)) as server, pytest.raises(ConnectionFailed):
        HttpSource({}).open(f"{server.url}/x")

    assert server.connections == 1


def test_a_status_line_cannot_speak_to_the_terminal():
    """Of the status only the number is the server's."""
    error = asked(lambda c: c.sendall(b"HTTP/1.1 404 \x1b[2Jcanary gone\r\nContent-Length: 0\r\n\r\n"))

    assert error.what == "HTTP 404 Not Found"


def test_the_library_logs_no_query(caplog: pytest.LogCaptureFixture):
    """Neither when all is well nor when headers cannot be parsed."""
    caplog.set_level("DEBUG")
    for head in (b"Content-Length: 0\r\n\r\n", b"no header\r\nContent-Length: 0\r\n\r\n"):
        with RawServer(lambda connection, head=head: connection.sendall(OK + head)) as server:
            HttpSource({}).open(f"{server.url}/x?signature=canary").close()

    assert "Failed to parse headers" in caplog.text and "/x?\u2026" in caplog.text and "canary" not in caplog.text
