"""Redirects: what goes along, where they may not lead, and how long a target is remembered."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from origin import Fault, Origin, RawServer

from modelstow.backends import AccessDenied, NotFound, ProtocolError, SourceError, Throttled, redact
from modelstow.backends.http.client import HttpSource
from modelstow.backends.http.redirects import CACHE_TTL_S, check

TEN = b"0123456789"


@pytest.fixture
def hub() -> Iterator[Origin]:
    with Origin({"m/ten": TEN, "m/other": TEN}) as served:
        yield served


@pytest.fixture
def cdn() -> Iterator[Origin]:
    with Origin({"x": TEN, "y": TEN}) as served:
        yield served


def part(source: HttpSource, url: str, start: int, stop: int) -> bytes:
    """The bytes of a range, as the source gives it."""
    body, view, data = source.open(url, start=start, stop=stop), memoryview(bytearray(100)), b""
    try:
        while count := body.read_into(view):
            data += bytes(view[:count])
    finally:
        body.close()
    return data


# ---- what goes along (N16)


def test_another_origin_is_sent_nothing_but_what_every_server_is_sent(hub: Origin, cdn: Origin, tmp_path: Path):
    """No token, no login, no header of the request's own beyond the range."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password canary\n")
    hub.fail("m/ten", Fault(redirect=f"{cdn.at('localhost')}/x", times=-1, headers={"Set-Cookie": "canary=1; Path=/"}))

    for source in (
        HttpSource({"NETRC": str(netrc)}),
        HttpSource({}, token=lambda url: "canary" if hub.url in url else None),
    ):
        assert part(source, f"{hub.url}/m/ten", 2, 5) == TEN[2:5]
        assert (
            "canary" in hub.gets()[-1].headers.get("Authorization", "")
            or "Basic" in hub.gets()[-1].headers["Authorization"]
        )
        assert set(cdn.gets()[-1].headers) == {"Host", "User-Agent", "Accept", "Accept-Encoding", "Range"}


def test_the_token_is_looked_up_again_for_every_hop(hub: Origin, cdn: Origin):
    """Each hop gets what its own address may have."""
    asked = []
    hub.fail("m/ten", Fault(redirect="/m/other"))
    hub.fail("m/other", Fault(redirect=f"{cdn.url}/x"))

    def token(url: str) -> str:
        asked.append(url)
        return f"token-{len(asked)}"

    part(HttpSource({}, token=token), f"{hub.url}/m/ten", 0, 5)

    assert asked == [f"{hub.url}/m/ten", f"{hub.url}/m/other", f"{cdn.url}/x"]
    assert [seen.headers["Authorization"] for seen in hub.gets()] == ["Bearer token-1", "Bearer token-2"]
    assert cdn.gets()[0].headers["Authorization"] == "Bearer token-3"


def test_a_login_does_not_follow_to_another_port_of_its_host(hub: Origin, cdn: Origin, tmp_path: Path):
    """A credential is bound to scheme, host and port; the file of logins knows only hosts."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password canary\n")
    hub.fail("m/ten", Fault(redirect=f"{cdn.url}/x", times=-1))
    source = HttpSource({"NETRC": str(netrc)})

    for _ in range(2):  # the second goes straight to the remembered target
        part(source, f"{hub.url}/m/ten", 0, 5)

    assert [("Authorization" in seen.headers) for seen in (*hub.gets(), *cdn.gets())] == [True, False, False]


def test_cookies_are_neither_kept_nor_sent(hub: Origin):
    """They know neither scheme nor port, and none is needed to fetch a file."""
    source = HttpSource({})
    hub.fail("m/ten", Fault(headers={"Set-Cookie": "canary=1; Path=/"}))

    for _ in range(2):
        part(source, f"{hub.url}/m/ten", 0, 5)

    assert "Cookie" not in hub.gets()[-1].headers


# ---- where they may not lead (N17, N21)


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "FTP://host/x",
        "data:text/plain,canary",
        "javascript:canary",
        "http://user:canary@127.0.0.1/x",
        "http://127.0.0.1\\@evil.example/x",
        "http://evil.example\\.good.example/x",
        "//user@127.0.0.1/x",
        "http://127.0.0.1:99999/x",
        "http://127.0.0.1:port/x",
        "http://[::1/x",
        "http://ex%61mple/x",
        "http://b\u00fccher.example/x",
        "http://a b/x",
        "",
    ],
)
def test_redirects_to_what_is_no_plain_web_address_are_refused(location: str):
    """Other schemes, credentials, backslashes, broken ports, raw unicode hosts, nothing at all."""
    head = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + location.encode() + b"\r\n\r\n"
    with RawServer(lambda connection: connection.sendall(head)) as server, pytest.raises(ProtocolError) as caught:
        HttpSource({}).open(f"{server.url}/x")

    assert not caught.value.transient and "canary" not in str(caught.value)
    assert server.connections == 1


def test_a_path_in_raw_utf8_is_followed_as_it_was_meant(hub: Origin):
    """Servers send it without asking; the bytes are what counts."""
    hub.objects["m/b\u00fccher \u6a21"] = TEN
    head = "HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + f"{hub.url}/m/b\u00fccher \u6a21" + "\r\n\r\n"
    with RawServer(lambda connection: connection.sendall(head.encode())) as server:
        assert part(HttpSource({}), f"{server.url}/x", 1, 4) == TEN[1:4]


@pytest.mark.parametrize(
    "locator",
    [
        "http://user:canary@127.0.0.1/x",
        "http://127.0.0.1\\@evil.example/x",
        "http://canary\\@127.0.0.1/x",
        "http://127.0.0.1/x\r\nHost: canary",
        "http://127.0.0.1\r\n/x",
        "http://user:can\u2100ary@127.0.0.1/x",
        "http://127.0.0.1:canary/x",
        "http:///x",
    ],
)
def test_a_locator_that_is_no_plain_web_address_is_not_asked(locator: str):
    """Nor is what it holds shown (N21)."""
    for ask in (HttpSource({}).open, HttpSource({}).size):
        with pytest.raises(SourceError) as caught:
            ask(locator)
        assert not caught.value.transient
    if "@" in locator:
        assert "canary" not in str(caught.value)


def test_a_unicode_host_is_a_host():
    """It goes to the network as punycode; a control character or a look-alike of a slash does not."""
    check("http://b\u00fccher.example/x")
    with pytest.raises(SourceError):
        check("http://b\u2100cher.example/x")


@pytest.mark.parametrize(
    ("locator", "shown"),
    [
        ("http://h/p?sig=canary", "http://h/p"),
        ("http://h?sig=canary", "http://h"),
        ("http://h#canary", "http://h"),
        ("http://u:canary@h/p", "http://h/p"),
        ("http://u:can@ary@h/p", "http://h/p"),
        ("http://u:c?canary@h/p", "http://\u2026"),
        ("http://h?a@canary", "http://\u2026"),
        ("http://u:canary/x@h/p", "http://\u2026"),
        ("http://h/a@b", "http://h/a@b"),
        ("http://[::1]:80/p?canary", "http://[::1]:80/p"),
        ("file:///a/path", "file:///a/path"),
        ("s3://bucket/key?versionId=1", "s3://bucket/key"),
        ("hf://org/name@rev/f", "hf://org/name@rev/f"),
        ("/a/path?x", "/a/path?x"),
    ],
)
def test_what_is_shown_of_a_locator_holds_no_secret(locator: str, shown: str):
    """Userinfo and query go; a password may hold what a URL may not."""
    assert redact(locator) == shown


# ---- how long a target is remembered


def test_ranges_of_a_redirected_file_cost_its_hub_one_request(hub: Origin, cdn: Origin):
    """Eight at once go straight to where the first was led."""
    hub.fail("m/ten", Fault(redirect=f"{cdn.url}/x?signature=canary", status=307, times=-1))
    source = HttpSource({})
    part(source, f"{hub.url}/m/ten", 0, 1)

    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda n: part(source, f"{hub.url}/m/ten", n, n + 1), range(1, 9)))

    assert b"".join(parts) == TEN[1:9]
    assert (len(hub.gets()), len(cdn.gets("x"))) == (1, 9)


def test_a_target_is_forgotten_after_five_minutes(hub: Origin, cdn: Origin):
    """And whole files always begin at the locator."""
    now = [0.0]
    hub.fail("m/ten", Fault(redirect=f"{cdn.url}/x", times=-1))
    source = HttpSource({}, clock=lambda: now[0])
    for now[0] in (0.0, CACHE_TTL_S - 1, CACHE_TTL_S, CACHE_TTL_S + 1):
        part(source, f"{hub.url}/m/ten", 0, 5)
    assert len(hub.gets()) == 2

    source.open(f"{hub.url}/m/ten").close()
    assert len(hub.gets()) == 3


@pytest.mark.parametrize(
    "fault", [Fault(status=s) for s in (400, 401, 403, 404, 410, 416, 500, 503)] + [Fault(wrong_range=True)]
)
def test_a_target_that_refuses_is_renewed_by_its_hub(hub: Origin, cdn: Origin, fault: Fault):
    """A signed address expired: the locator is asked once more, and the new one is remembered."""
    source = HttpSource({})
    hub.fail("m/ten", Fault(redirect=f"{cdn.url}/x?signature=old"))
    hub.fail("m/ten", Fault(redirect=f"{cdn.url}/y?signature=new"))
    part(source, f"{hub.url}/m/ten", 0, 1)
    cdn.fail("x", Fault(status=fault.status, wrong_range=fault.wrong_range, times=-1))

    assert part(source, f"{hub.url}/m/ten", 1, 5) == TEN[1:5]
    assert part(source, f"{hub.url}/m/ten", 5, 9) == TEN[5:9]

    assert [seen.path for seen in cdn.gets()] == ["x", "x", "y", "y"]
    assert len(hub.gets()) == 2


def test_a_target_that_refused_is_not_asked_again(hub: Origin, cdn: Origin):
    """Its hub has the file itself by now."""
    source = HttpSource({})
    hub.fail("m/ten", Fault(redirect=f"{cdn.url}/x"))
    part(source, f"{hub.url}/m/ten", 0, 1)
    cdn.fail("x", Fault(status=403, times=-1))

    for _ in range(3):
        assert part(source, f"{hub.url}/m/ten", 1, 5) == TEN[1:5]

    assert len(cdn.gets()) == 2


def test_a_target_that_went_away_is_renewed_by_its_hub(hub: Origin, cdn: Origin):
    """A refused connection is a refusal."""
    source = HttpSource({})
    answer = (
        b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-0/10\r\nContent-Length: 1\r\nConnection: close\r\n\r\n0"
    )
    with RawServer(lambda connection: connection.sendall(answer)) as gone:
        hub.fail("m/ten", Fault(redirect=f"{gone.url}/x"))
        hub.fail("m/ten", Fault(redirect=f"{cdn.url}/x"))
        assert part(source, f"{hub.url}/m/ten", 0, 1) == TEN[:1]

    assert part(source, f"{hub.url}/m/ten", 1, 5) == TEN[1:5]


@pytest.mark.parametrize(
    ("status", "kind"), [(401, AccessDenied), (403, AccessDenied), (400, SourceError), (404, NotFound), (429, Throttled)]
)
def test_a_refusal_by_the_target_is_not_blamed_on_the_login(hub: Origin, cdn: Origin, status: int, kind: type[SourceError]):
    """The message says who refused, without the signature."""
    hub.fail("m/ten", Fault(redirect=f"{cdn.at('localhost')}/x?signature=canary", times=-1))
    cdn.fail("x", Fault(status=status, times=-1))

    with pytest.raises(kind) as caught:
        part(HttpSource({}), f"{hub.url}/m/ten", 0, 5)

    assert f"localhost:{cdn.port}, where it redirects to" in caught.value.what
    assert "netrc" not in caught.value.hint
    assert "canary" not in f"{caught.value} {caught.value.hint} {caught.value.locator}"


def test_a_redirect_keeps_the_connection_to_its_hub(hub: Origin):
    """An empty answer leaves nothing to read, so the next request goes over the same connection; so does a HEAD."""
    hub.fail("m/ten", Fault(redirect="/m/other", times=-1))
    source = HttpSource({})
    for _ in range(3):
        source.size(f"{hub.url}/m/ten")

    assert len({seen.client for seen in hub.requests}) == 1
