"""Redirects lead into private networks only from there, whatever a host calls itself."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from origin import Fault, Origin

from modelstow.backends import ProtocolError, read_all
from modelstow.backends.http.address_policy import AllowedScope, NotAllowed, check, resolve, scope_of
from modelstow.backends.http.client import HttpSource


@pytest.mark.parametrize(
    ("address", "reach"),
    [
        ("93.184.216.34", AllowedScope.GLOBAL),
        ("2606:2800:220:1::1", AllowedScope.GLOBAL),
        ("::ffff:93.184.216.34", AllowedScope.GLOBAL),
        ("127.0.0.1", AllowedScope.PRIVATE),
        ("10.0.0.7", AllowedScope.PRIVATE),
        ("172.16.0.1", AllowedScope.PRIVATE),
        ("192.168.1.1", AllowedScope.PRIVATE),
        ("100.64.0.1", AllowedScope.PRIVATE),
        ("0.0.0.0", AllowedScope.PRIVATE),
        ("255.255.255.255", AllowedScope.PRIVATE),
        ("224.0.0.1", AllowedScope.PRIVATE),
        ("::", AllowedScope.PRIVATE),
        ("::1", AllowedScope.PRIVATE),
        ("fd12::1", AllowedScope.PRIVATE),
        ("fec0::1", AllowedScope.PRIVATE),
        ("ff02::1", AllowedScope.PRIVATE),
        ("::ffff:127.0.0.1", AllowedScope.PRIVATE),
        ("::127.0.0.1", AllowedScope.PRIVATE),
        ("64:ff9b::10.0.0.1", AllowedScope.PRIVATE),
        ("2002:7f00:1::", AllowedScope.PRIVATE),
        ("169.254.169.254", AllowedScope.ANY),
        ("::ffff:169.254.169.254", AllowedScope.ANY),
        ("fe80::1%lo", AllowedScope.ANY),
        ("fd00:ec2::254", AllowedScope.ANY),
        ("100.100.100.200", AllowedScope.ANY),
        ("168.63.129.16", AllowedScope.ANY),
        ("192.0.0.192", AllowedScope.ANY),
        ("64:ff9b:1::7f00:1", AllowedScope.ANY),
        ("64:ff9b:1:7f00::1", AllowedScope.ANY),
        ("192.0.0.8", AllowedScope.PRIVATE),
        ("192.0.0.9", AllowedScope.GLOBAL),
        ("192.88.99.1", AllowedScope.PRIVATE),
        ("240.0.0.1", AllowedScope.PRIVATE),
        ("::ffff:0:127.0.0.1", AllowedScope.PRIVATE),
        ("::ffff:0:169.254.169.254", AllowedScope.ANY),
        ("2001:0:7f00:1::", AllowedScope.PRIVATE),
        ("2001:0:4136:e378:8000:63bf:5601:5601", AllowedScope.ANY),  # Teredo of 169.254.169.254
        ("2606:2800:220:1:0:5efe:10.0.0.1", AllowedScope.PRIVATE),
        ("2606:2800:220:1:200:5efe:169.254.169.254", AllowedScope.ANY),
        ("fe80::5efe:93.184.216.34", AllowedScope.ANY),
        ("3fff::1", AllowedScope.PRIVATE),
        ("5f00::1", AllowedScope.PRIVATE),
        ("100::1", AllowedScope.PRIVATE),
        ("2001:db8::1", AllowedScope.PRIVATE),
        ("2001:4:112::1", AllowedScope.GLOBAL),
        ("2001:2::1", AllowedScope.PRIVATE),
        ("4000::1", AllowedScope.PRIVATE),
    ],
)
def test_every_kind_of_address_has_its_reach(address: str, reach: AllowedScope):
    """IPv4 within IPv6 counts as what it leads to; where clouds hand out credentials is the farthest (N18)."""
    assert scope_of([address]) is reach
    assert scope_of(["93.184.216.34", address]) is reach


@pytest.mark.parametrize("spelling", ["2130706433", "127.1", "0x7f.1", "017700000001", "127.0.0.1"])
def test_odd_spellings_are_what_they_resolve_to(spelling: str):
    """Decimal, octal, hexadecimal and short forms are the same loopback (N18)."""
    assert resolve(spelling, 80) == resolve(spelling, 80, literal=True) == ("127.0.0.1",)
    with pytest.raises(NotAllowed):
        check(spelling, resolve(spelling, 80), AllowedScope.GLOBAL)


def test_a_name_is_no_literal():
    """Behind a proxy nothing is looked up here."""
    assert resolve("models.example", 80, literal=True) == ()
    assert scope_of(()) is AllowedScope.GLOBAL


def test_one_bad_address_of_several_is_enough():
    """A name must not be good by one of its addresses only."""
    check("h", ["93.184.216.34"], AllowedScope.GLOBAL)
    with pytest.raises(NotAllowed):
        check("h", ["93.184.216.34", "127.0.0.1"], AllowedScope.GLOBAL)


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch):
    """A name that is loopback for the check and something else the next time is asked for once (DNS rebinding)."""
    answers = [["127.0.0.1"], ["127.0.0.2"], ["127.0.0.3"]]
    real = socket.getaddrinfo

    def lookup(host: str, port: int, *args: object, **options: object) -> object:
        if host != "models.example":
            return real(host, port, *args, **options)  # type: ignore[arg-type]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers.pop(0)]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    with Origin({"x": b"right"}) as origin:
        assert read_all(HttpSource({}), f"{origin.at('models.example')}/x", at_most=10) == b"right"
        assert origin.gets("x")[0].headers["Host"].startswith("models.example:")

    assert len(answers) == 2


def test_every_address_is_tried_in_order(monkeypatch: pytest.MonkeyPatch):
    """The first address refuses the connection."""
    real = socket.getaddrinfo

    def lookup(host: str, port: int, *args: object, **options: object) -> object:
        addresses = ["127.0.0.9", "127.0.0.1"] if host == "models.example" else [host]
        return [row for address in addresses for row in real(address, port, *args, **options)]  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    with Origin({"x": b"right"}) as origin:
        assert read_all(HttpSource({}), f"{origin.at('models.example')}/x", at_most=10) == b"right"


@pytest.mark.parametrize("host", ["169.254.169.254", "[fe80::1]", "[::ffff:169.254.169.254]", "2852039166"])
def test_a_mirror_on_this_machine_does_not_lead_to_the_metadata_of_a_cloud(host: str):
    """Loopback may redirect to private addresses, not to link-local ones; nothing is connected to."""
    with Origin({}) as origin, pytest.raises(ProtocolError, match="not allowed") as caught:
        origin.fail("x", Fault(redirect=f"http://{host}/latest?canary", times=-1))
        HttpSource({}).open(f"{origin.url}/x")

    assert not caught.value.transient and "canary" not in str(caught.value)


def test_behind_a_proxy_numbers_are_judged_and_names_are_not():
    """The proxy resolves; a name that it is asked for is its business."""
    with Origin({}) as proxy:
        environ = {"http_proxy": proxy.url}
        for host in ("127.0.0.1", "10.1", "[::1]"):
            proxy.fail("x", Fault(redirect=f"http://{host}/y"))
            with pytest.raises(ProtocolError, match="not allowed"):
                HttpSource(environ).open("http://models.example/x")
        proxy.objects["y"] = b"by proxy"
        proxy.fail("x", Fault(redirect="http://cdn.example/y"))

        assert read_all(HttpSource(environ), "http://models.example/x", at_most=10) == b"by proxy"


WORLD = """
import json, sys
sys.path[:0] = [{tests!r}, {here!r}]
from origin import Fault, Origin
from modelstow.backends import SourceError, read_all
from modelstow.backends.http.client import HttpSource
rows = {{}}
servers = {{name: Origin({{"x": name.encode()}}, address=address) for name, address in {addresses!r}.items()}}
for server in servers.values():
    server.__enter__()
for start in servers:
    for end in servers:
        servers[start].fail("go", Fault(redirect=servers[end].at(end) + "/x"))
        try:
            found = read_all(HttpSource({{}}), servers[start].at(start) + "/go", at_most=100).decode()
        except SourceError as error:
            found = type(error).__name__
        rows[start + " > " + end] = (found == end) if found in servers else found
print(json.dumps(rows))
"""


def test_in_a_network_of_its_own_redirects_lead_only_where_they_may(tmp_path: Path):
    """Real names, real addresses, real connections: the whole table (N18)."""
    addresses = {
        "global.example": "93.184.216.34",
        "cdn.example": "93.184.216.35",
        "private.example": "10.9.8.7",
        "localhost": "127.0.0.1",
        "link.example": "169.254.169.254",
    }
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("needs unshare and ip")
    here = str(Path(__file__).resolve().parents[2])
    (tmp_path / "hosts").write_text("".join(f"{address} {name}\n" for name, address in addresses.items()))
    (tmp_path / "world.py").write_text(WORLD.format(tests=f"{here}/tests", here=here, addresses=addresses))
    setup = "ip link set lo up && mount --bind hosts /etc/hosts && " + "".join(
        f"ip addr add {address}/32 dev lo && " for address in addresses.values() if address != "127.0.0.1"
    )
    done = subprocess.run(
        ["unshare", "-rnm", "sh", "-c", f"({setup} true) || exit 77; exec {sys.executable} world.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no network namespace here: {done.stderr.strip()[-100:]}")
    rows = json.loads(done.stdout)

    level = {"global.example": 0, "cdn.example": 0, "private.example": 1, "localhost": 1, "link.example": 2}
    for start in addresses:
        for end in addresses:
            allowed = start == end or level[end] <= level[start]
            assert rows[f"{start} > {end}"] == (True if allowed else "ProtocolError"), (start, end, done.stderr)
