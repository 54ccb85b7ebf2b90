"""HTTP keeps the contract against a real server, and survives what servers do."""

import socket
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from types import SimpleNamespace

import pytest
import requests
from builders import PATIENCE_S
from http_responses import MEANINGS, Meaning, assert_simply_ends, refusal_of, status_of
from origin import Fault, Origin, RawServer, gate_of

from modelstow.backends import (
    ConnectionFailed,
    NotFound,
    NotListable,
    ProtocolError,
    Source,
    SourceError,
    Throttled,
    read_all,
)
from modelstow.backends.conformance import BIG, TEN, SourceContract
from modelstow.backends.http import response
from modelstow.backends.http.client import HttpSource
from modelstow.reconcile.hints import hint_of


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin({f"m/{name}": data for name, data in SourceContract.OBJECTS.items()}) as served:
        yield served


def read(source: Source, url: str, start: int = 0, stop: int | None = None) -> tuple[int, bytes]:
    """Where the body begins, and its bytes."""
    body, data, view = source.open(url, start=start, stop=stop), bytearray(), memoryview(bytearray(1000))
    try:
        while count := body.read_into(view):
            data += view[:count]
    finally:
        body.close()
    return body.start, bytes(data)


class HttpContract(SourceContract):
    listing = "index"

    @pytest.fixture(autouse=True)
    def serve(self) -> Iterator[None]:
        with Origin({f"m/{name}": data for name, data in self.OBJECTS.items()}, listing=self.listing) as self.origin:
            yield

    def folder(self) -> str:
        return f"{self.origin.url}/m"

    def make(self) -> Source:
        return HttpSource({})


class TestNginxListing(HttpContract):
    pass


class TestPythonListing(HttpContract):
    listing = "python"


class TestSumsListing(HttpContract):
    listing = "sums"


class TestWithoutRanges(HttpContract):
    """As Python's http.server: every answer is the whole."""

    @pytest.fixture(autouse=True)
    def ignore(self, serve: None) -> None:
        self.origin.fail("*", Fault(ignore_range=True, times=-1))


def test_sums_give_digests_and_are_the_only_request():
    """A SHA256SUMS file names every digest; sizes are requested of what is wanted."""
    with Origin({"m/a": b"one", "m/deep/b": b"three"}, listing="sums") as origin:
        files = HttpSource({}).listing(f"{origin.url}/m/").files

        assert [(f.path, f.size, f.sha256 is not None) for f in files] == [("a", None, True), ("deep/b", None, True)]
        assert [seen.path for seen in origin.requests] == ["m/SHA256SUMS"]


HEADS = [b"405 Not Allowed", b"403 Forbidden", b"500 Oops", b"200 OK"]


@pytest.mark.parametrize("status", HEADS)
def test_where_head_fails_or_says_0_the_size_is_that_of_a_range(status: bytes):
    """Some servers refuse HEAD, or answer it with the length 0."""
    head = b"HTTP/1.1 %b\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % status
    fields = b"Content-Range: bytes 0-0/5\r\nContent-Length: 1\r\nConnection: close\r\n\r\n"
    answers = iter([head, b"HTTP/1.1 206 Partial Content\r\n" + fields + b"t"])

    with RawServer(lambda connection: connection.sendall(next(answers))) as server:
        assert HttpSource({}).size(f"{server.url}/a") == 5


def test_the_size_of_an_empty_object_is_0():
    """Asked for twice, since some servers answer HEAD with 0 whatever the object is."""
    with Origin({"a": b""}) as origin:
        assert HttpSource({}).size(f"{origin.url}/a") == 0


def test_a_folder_without_any_listing_says_to_list_the_files():
    """The hint says what to write."""
    with Origin({"m/a": b"one"}, listing="none") as origin, pytest.raises(NotListable) as caught:
        HttpSource({}).listing(f"{origin.url}/m/")

    assert "files" in hint_of(caught.value)


def test_a_web_page_is_no_listing():
    """Links of any page would be taken for files otherwise."""
    page = b'<html><title>Welcome</title><a href="model.bin">model</a></html>'
    with Origin({"m/": page}, listing="none") as origin, pytest.raises(NotListable):
        HttpSource({}).listing(f"{origin.url}/m/")


def test_links_that_lead_out_of_the_folder_are_not_followed():
    """Neither the parent, nor another host, nor a sorted view of the same page."""
    page = (
        b'<title>Index of /m</title><a href="../">up</a><a href="/other/x">x</a><a href="http://elsewhere/y">y</a>'
        b'<a href="?C=N;O=D">sort</a><a href="a.bin">a</a>'
    )
    with Origin({"m/": page}, listing="none") as origin:
        assert [f.path for f in HttpSource({}).listing(f"{origin.url}/m").files] == ["a.bin"]


def test_an_ignored_range_is_recognised_by_the_start(origin: Origin):
    """200 with everything begins at 0 (N4)."""
    origin.fail("m/ten", Fault(ignore_range=True))

    assert read(HttpSource({}), f"{origin.url}/m/ten", 4) == (0, TEN)


def test_a_wrong_content_range_is_not_believed(origin: Origin):
    """The whole is asked for instead (N5)."""
    origin.fail("m/ten", Fault(wrong_range=True))

    assert read(HttpSource({}), f"{origin.url}/m/ten", 4) == (0, TEN)
    assert [seen.range for seen in origin.gets("m/ten")] == ["bytes=4-", None]


def test_a_range_with_status_200_is_a_range(origin: Origin):
    """Some S3 servers send one; Content-Range decides, not the status (N6)."""
    origin.fail("m/ten", Fault(range_status=200))

    assert read(HttpSource({}), f"{origin.url}/m/ten", 4, 6) == (4, b"45")


def test_a_range_beyond_the_end_gives_the_whole_for_comparison(origin: Origin):
    """416 means that the object is another: the reader sees its length (N8)."""
    body = HttpSource({}).open(f"{origin.url}/m/ten", start=50, stop=60)
    body.close()

    assert (body.start, body.total) == (0, 10)


@pytest.mark.parametrize("meaning", [*MEANINGS, (410, NotFound, False), (502, ConnectionFailed, True)], ids=status_of)
def test_statuses_are_distinguished(origin: Origin, meaning: Meaning):
    """Permanent or worth retrying; and the number is part of the error."""
    error = refusal_of(HttpSource({}), f"{origin.url}/m/ten", origin, "m/ten", meaning)

    assert error.retry_after == (7.0 if error.transient else None)
    assert error.status == meaning[0]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7", 7.0),
        ("0", 0.0),
        ("1000000000", 1e9),  # the engine caps it
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("Thu, 01 Jan 1970 00:00:00 -0000", 0.0),
        ("Fri, 31 Feb 2026 00:00:00 GMT", None),
        ("-3", None),
        ("1e3", None),
        ("9" * 5000, None),
        ("soon", None),
        ("", None),
    ],
)
def test_retry_after_is_read_in_both_forms(origin: Origin, text: str, seconds: float | None):
    """A date in the past is now; nonsense is nothing (N15)."""
    origin.fail("m/ten", Fault(status=429, headers={"Retry-After": text}))

    with pytest.raises(Throttled) as caught:
        HttpSource({}).open(f"{origin.url}/m/ten")

    assert caught.value.retry_after == seconds


def test_a_retry_after_in_the_future_is_so_many_seconds(origin: Origin, monkeypatch: pytest.MonkeyPatch):
    """By the clock of this machine."""
    now = 1_800_000_000
    monkeypatch.setattr(response, "time", SimpleNamespace(time=lambda: float(now)))
    origin.fail("m/ten", Fault(status=503, headers={"Retry-After": formatdate(now + 100, usegmt=True)}))

    with pytest.raises(Throttled) as caught:
        HttpSource({}).open(f"{origin.url}/m/ten")

    assert caught.value.retry_after == 100


@pytest.mark.usefixtures("endless_reads")
def test_closing_from_another_thread_ends_a_read_that_waits(origin: Origin):
    """Taking over a range from a source that stalls costs no time."""
    gate_of(origin, "m/ten", after=5)
    body = HttpSource({}).open(f"{origin.url}/m/ten")
    assert body.read_into(memoryview(bytearray(5))) == 5
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(body.read_into, memoryview(bytearray(5)))
        assert origin.reached.wait(PATIENCE_S)
        with pytest.raises(TimeoutError):
            waiting.exception(0.1)  # it is in the middle of it
        body.close()  # the gate is still shut and no read times out
        assert waiting.exception(PATIENCE_S) is not None or waiting.result() == 0


def test_a_dropped_connection_is_transient(origin: Origin):
    """Whatever came before the drop was delivered (N9)."""
    origin.fail("m/deep/er/big.bin", Fault(cut_after=10_000))
    body, data, view = HttpSource({}).open(f"{origin.url}/m/deep/er/big.bin"), bytearray(), memoryview(bytearray(1000))

    with pytest.raises(ConnectionFailed) as caught:
        while count := body.read_into(view):
            data += view[:count]
    body.close()

    assert caught.value.transient and caught.value.locator == f"{origin.url}/m/deep/er/big.bin"
    assert data == BIG[:10_000]


def test_a_body_that_ends_early_simply_ends(origin: Origin):
    """A connection that is closed in good order raises nothing."""
    assert_simply_ends(HttpSource({}), f"{origin.url}/m/ten", origin, "m/ten")


def test_an_encoded_body_is_refused(origin: Origin):
    """gzip was not requested, and a range of it would be no range (N13)."""
    origin.fail("m/ten", Fault(encoding="gzip"))

    with pytest.raises(ProtocolError, match="gzip"):
        HttpSource({}).open(f"{origin.url}/m/ten")

    assert origin.gets()[-1].headers["Accept-Encoding"] == "identity"


def test_redirects_are_followed_with_their_queries(origin: Origin):
    """Five at most."""
    origin.fail("m/old", Fault(redirect=f"{origin.url}/m/ten?signature=abc", times=-1))

    assert read(HttpSource({}), f"{origin.url}/m/old", 3) == (3, TEN[3:])

    origin.fail("m/loop", Fault(redirect=f"{origin.url}/m/loop", times=-1))
    with pytest.raises(ProtocolError, match="redirects"):
        HttpSource({}).open(f"{origin.url}/m/loop")


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://host/x", "data:text/plain,x", "http://user:pw@127.0.0.1/x"]
)
def test_redirects_to_other_schemes_and_with_passwords_are_refused(origin: Origin, target: str):
    """Only http and https, without credentials (N17)."""
    origin.fail("m/ten", Fault(redirect=target))

    with pytest.raises(ProtocolError):
        HttpSource({}).open(f"{origin.url}/m/ten")


def test_a_netrc_login_goes_to_its_host_and_not_along_a_redirect(tmp_path, origin: Origin):
    """A password is bound to the host it is for (N16)."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password canary\n")
    netrc.chmod(0o600)
    origin.protect["m/"] = ("me", "canary")
    source = HttpSource({"NETRC": str(netrc)})

    assert read(source, f"{origin.url}/m/ten")[1] == TEN

    with Origin({"x": b"other"}) as other:
        origin.fail("m/ten", Fault(redirect=f"http://localhost:{other.port}/x"))
        read(source, f"{origin.url}/m/ten")
        assert "Authorization" not in other.gets("x")[0].headers


def test_no_secret_of_a_locator_is_in_an_error():
    """Signed queries and passwords are cut off (N24)."""
    secret = "canary"
    with pytest.raises(SourceError) as caught:
        HttpSource({}).open(f"http://127.0.0.1:1/m/ten?X-Amz-Signature={secret}")

    assert secret not in "".join(traceback.format_exception(caught.value)) + caught.value.locator


def test_a_refused_connection_is_transient():
    """Connection refused may be over in a moment (N25)."""
    with pytest.raises(ConnectionFailed):
        HttpSource({}).open("http://127.0.0.1:1/x")


def test_a_small_object_is_read_whole_or_refused(origin: Origin):
    """A listing that never ends does not fill the memory."""
    url = f"{origin.url}/m/deep/er/big.bin"

    assert len(read_all(HttpSource({}), url, at_most=3_000_000)) == 2_008_000
    with pytest.raises(ValueError, match="longer"):
        read_all(HttpSource({}), url, at_most=1000)


def test_bodies_are_read_by_the_fast_way(origin: Origin):
    """urllib3 still has the attribute below which http.client reads into our buffer; if not, this test fails."""
    with requests.get(f"{origin.url}/m/ten", stream=True, timeout=10) as response:
        assert callable(response.raw._fp.readinto)


def test_the_environment_names_proxies_by_host():
    """Lower case wins, NO_PROXY exempts a domain and what is below it, ALL_PROXY serves where there is no other."""
    from modelstow.backends.environment import proxy

    environ = {"HTTPS_PROXY": "http://big:1", "https_proxy": "http://small:1", "NO_PROXY": "corp.example,.local"}

    assert proxy("https://models.example/x", environ) == "http://small:1"
    assert proxy("https://hub.corp.example/x", environ) == ""
    assert proxy("https://a.local/x", environ) == ""
    assert proxy("http://models.example/x", environ) == ""
    assert proxy("http://models.example/x", {**environ, "ALL_PROXY": "http://any:1"}) == "http://any:1"
    assert proxy("https://models.example/x", {**environ, "ALL_PROXY": "http://any:1"}) == "http://small:1"
    assert proxy("http://a.local/x", {**environ, "ALL_PROXY": "http://any:1"}) == ""
    assert proxy("https://a.corp.example/x", {**environ, "no_proxy": "Corp.Example"}) == ""


def test_a_small_read_returns_with_what_has_come(origin: Origin):
    """Otherwise a server that trickles would be noticed only when a buffer is full, hours later."""
    gate = gate_of(origin, "m/ten", after=4)
    body = HttpSource().open(f"{origin.url}/m/ten")

    assert body.read_into(memoryview(bytearray(10))) == 4
    gate.set()
    assert body.read_into(memoryview(bytearray(10))) == 6 and body.read_into(memoryview(bytearray(10))) == 0
    body.close()


def test_the_connection_of_a_small_body_is_used_again(origin: Origin):
    """A thousand small files cost one connection."""
    source = HttpSource()
    for _ in range(3):
        body = source.open(f"{origin.url}/m/ten")
        assert body.read_into(memoryview(bytearray(10))) == 10
        body.close()

    assert len({seen.client for seen in origin.gets()}) == 1


def test_the_connection_of_a_short_refusal_or_redirect_is_used_again(origin: Origin):
    """Mirrors that do not hold a blob, and hubs that send elsewhere, cost no handshake each time."""
    origin.fail("m/gone", Fault(status=404, extra=b"<html>not found</html>", times=-1))
    origin.fail("m/moved", Fault(redirect=f"{origin.url}/m/ten", extra=b"moved to m/ten", times=-1))
    source = HttpSource()

    for _ in range(3):
        with pytest.raises(NotFound):
            source.open(f"{origin.url}/m/gone")
        assert read(source, f"{origin.url}/m/moved") == (0, TEN)

    assert len(origin.gets()) == 3 + 2 * 3 and len({seen.client for seen in origin.gets()}) == 1


@pytest.mark.usefixtures("endless_reads")
@pytest.mark.parametrize("rest", [b"", b"a part of it"])
def test_a_refusal_whose_text_does_not_come_is_reported_all_the_same(rest: bytes):
    """The text is not waited for; the connection is not used again."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 100\r\n\r\n" + rest)
        server.stopped.wait()

    source = HttpSource()
    with RawServer(answer) as server:
        for _ in range(2):
            with pytest.raises(NotFound):
                source.open(f"{server.url}/x")
        assert server.connections == 2


def test_a_netrc_that_is_no_text_holds_no_login(tmp_path, origin: Origin):
    """The address can be asked all the same."""
    (tmp_path / "netrc").write_bytes(b"machine \xff\xfe login \xe9")

    HttpSource({"NETRC": str(tmp_path / "netrc")}).open(f"{origin.url}/m/ten").close()
