"""TLS is verified against the name, and nothing is tried without it."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from builders import PATIENCE_S
from origin import Fault, Origin, gate_of
from s3servers import settings, use

from modelstow.backends import ConnectionFailed, ProtocolError, SourceError, read_all
from modelstow.backends.http.client import HttpSource
from modelstow.backends.s3.client import S3Source

if shutil.which("openssl") is None:
    pytest.skip("needs the openssl program to make certificates", allow_module_level=True)

GOOD = "DNS:localhost,IP:127.0.0.1"


def openssl(folder: Path, *args: str) -> None:
    subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True, timeout=60)


def certificate(folder: Path, name: str, names: str, *, until: str = "20400101000000Z") -> ssl.SSLContext:
    """A server's side of TLS with a certificate of the folder's own CA for these names."""
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl(folder, "req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
    (folder / f"{name}.ext").write_text(f"subjectAltName={names}\n")
    (folder / f"{name}.index").write_text("")
    (folder / f"{name}.cnf").write_text(
        f"[ca]\ndefault_ca=d\n[d]\ndatabase={name}.index\nnew_certs_dir=.\npolicy=p\ndefault_md=sha256\nrand_serial=yes\n"
        "[p]\ncommonName=supplied\n"
    )
    sign = ("ca", "-batch", "-config", f"{name}.cnf", "-cert", "ca.pem", "-keyfile", "ca.key", "-notext")
    dates = ("-startdate", "20200101000000Z", "-enddate", until)
    openssl(folder, *sign, *dates, "-in", f"{name}.csr", "-out", f"{name}.pem", "-extfile", f"{name}.ext")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    return context


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CA of its own, ``ca``, and one that signs nothing, ``others``."""
    folder = tmp_path_factory.mktemp("ca")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    more = ("-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign")
    for name in ("ca", "others"):
        where = ("-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")
        openssl(folder, "req", "-x509", *key, *where, "-days", "3650", *more)
    return folder


@pytest.fixture(scope="module")
def context(authority: Path) -> ssl.SSLContext:
    return certificate(authority, "good", GOOD)


@pytest.fixture
def served(context: ssl.SSLContext) -> Iterator[Origin]:
    with Origin({"x": b"right"}, tls=context) as origin:
        yield origin


def trusting(authority: Path) -> HttpSource:
    return HttpSource({"REQUESTS_CA_BUNDLE": str(authority / "ca.pem")})


def test_a_trusted_server_is_read_by_each_of_its_names(authority: Path, served: Origin):
    """The connection is made to an address, and the name is verified all the same."""
    for host in ("localhost", "127.0.0.1"):
        assert read_all(trusting(authority), f"{served.at(host)}/x", at_most=10) == b"right"


def test_the_name_is_sent_to_the_server(authority: Path, context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch):
    """Servers of many names choose their certificate by it (SNI)."""
    names: list[str | None] = []
    monkeypatch.setattr(context, "sni_callback", lambda sock, name, context: names.append(name))
    with Origin({"x": b"right"}, tls=context) as origin:
        read_all(trusting(authority), f"{origin.at('localhost')}/x", at_most=10)

    assert names == ["localhost"]


def test_an_unknown_authority_is_refused_once(served: Origin):
    """A hard error: nothing is asked, nothing is tried again without verifying (N20)."""
    with pytest.raises(ProtocolError, match="certificate is not valid") as caught:
        HttpSource({}).open(f"{served.at('localhost')}/x?canary")

    assert not caught.value.transient and "REQUESTS_CA_BUNDLE" in caught.value.hint
    assert "canary" not in str(caught.value) and served.requests == []


@pytest.mark.parametrize(
    ("variables", "source"),
    [
        ({"REQUESTS_CA_BUNDLE": "ca"}, "http"),
        ({"CURL_CA_BUNDLE": "ca"}, "http"),
        ({"REQUESTS_CA_BUNDLE": "ca", "CURL_CA_BUNDLE": "others"}, "http"),
        ({"REQUESTS_CA_BUNDLE": "ca", "AWS_CA_BUNDLE": "others"}, "http"),
        ({"REQUESTS_CA_BUNDLE": "ca", "CURL_CA_BUNDLE": "others"}, "s3"),
        ({"AWS_CA_BUNDLE": "ca", "REQUESTS_CA_BUNDLE": "others"}, "s3"),
    ],
)
def test_variables_name_the_certificates_to_trust(
    authority: Path, served: Origin, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], source: str
):
    """Which one wins, for web servers and for buckets."""
    served.objects["bucket/x"] = b"right"
    use(monkeypatch, settings(served.at("localhost")))
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    for name, whose in variables.items():
        monkeypatch.setenv(name, str(authority / f"{whose}.pem"))

    if source == "http":
        assert read_all(HttpSource(), f"{served.at('localhost')}/x", at_most=10) == b"right"
    else:
        assert read_all(S3Source(), "s3://bucket/x", at_most=10) == b"right"


def test_a_bucket_does_not_trust_what_only_web_servers_are_to_trust(
    authority: Path, served: Origin, monkeypatch: pytest.MonkeyPatch
):
    """CURL_CA_BUNDLE is not for buckets."""
    use(monkeypatch, settings(served.at("localhost")))
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.setenv("CURL_CA_BUNDLE", str(authority / "ca.pem"))

    with pytest.raises(ProtocolError, match="certificate is not valid") as caught:
        S3Source().open("s3://bucket/x")
    assert "AWS_CA_BUNDLE" in caught.value.hint


@pytest.mark.parametrize(
    ("names", "until", "why"),
    [("DNS:other.example", "20400101000000Z", "localhost"), (GOOD, "20210101000000Z", "expired")],
    ids=["wrong name", "expired"],
)
def test_a_certificate_for_another_name_or_time_is_refused(authority: Path, names: str, until: str, why: str):
    """The message says what is wrong with it (N20)."""
    bad = certificate(authority, why, names, until=until)
    with Origin({"x": b"right"}, tls=bad) as origin, pytest.raises(ProtocolError, match=why) as caught:
        trusting(authority).open(f"{origin.at('localhost')}/x")

    assert not caught.value.transient and origin.requests == []


def test_a_self_signed_certificate_is_refused(authority: Path):
    """A certificate signed by an unknown authority is not trusted (N20)."""
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-addext", f"subjectAltName={GOOD}")
    openssl(authority, "req", "-x509", *key, "-keyout", "self.key", "-out", "self.pem", "-subj", "/CN=localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "self.pem", authority / "self.key")
    with Origin({"x": b"right"}, tls=context) as origin, pytest.raises(ProtocolError, match="self-signed"):
        trusting(authority).open(f"{origin.at('localhost')}/x")


def test_https_does_not_lead_to_http(authority: Path, served: Origin):
    """Not even to the same host (N19)."""
    with Origin({"x": b"plain"}) as plain:
        served.fail("x", Fault(redirect=f"{plain.at('localhost')}/x"))
        with pytest.raises(ProtocolError, match="from https to http"):
            trusting(authority).open(f"{served.at('localhost')}/x")

        assert plain.requests == []


def test_a_server_that_speaks_no_tls_is_a_permanent_error():
    """No falling back to plain text (N20)."""
    with Origin({"x": b"plain"}) as plain, pytest.raises(ProtocolError, match="TLS failed"):
        HttpSource({}).open(f"https://localhost:{plain.port}/x")


def test_a_handshake_that_breaks_is_no_bad_certificate():
    """A connection that was dropped may be better the next time."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drop() -> None:
            connection, _ = listener.accept()
            connection.recv(1)
            connection.close()

        threading.Thread(target=drop, daemon=True).start()
        with pytest.raises(ConnectionFailed) as caught:
            HttpSource({}).open(f"https://localhost:{listener.getsockname()[1]}/x")

    assert caught.value.transient


def test_a_missing_file_of_certificates_is_reported(served: Origin, tmp_path: Path):
    """It is a setting that is wrong, not the network."""
    with pytest.raises(SourceError, match="certificates") as caught:
        HttpSource({"REQUESTS_CA_BUNDLE": str(tmp_path / "canary.pem")}).open(f"{served.url}/x")

    assert not caught.value.transient and "canary" not in f"{caught.value}{caught.value.hint}"


@pytest.mark.usefixtures("endless_reads")
def test_a_body_over_tls_may_be_closed_by_another_thread(authority: Path, context: ssl.SSLContext):
    """A read that waits ends at once."""
    with Origin({"x": bytes(100_000)}, tls=context) as origin:
        gate_of(origin, "x", after=10)
        body = trusting(authority).open(f"{origin.at('localhost')}/x")
        assert body.read_into(memoryview(bytearray(10))) == 10
        ended = threading.Event()

        def read() -> None:
            with suppress(SourceError):
                body.read_into(memoryview(bytearray(10)))
            ended.set()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        assert not ended.wait(0.05)
        body.close()
        assert ended.wait(PATIENCE_S)
