"""No secret comes out: real commands, well and badly served, and every byte that they leave is searched (N23, N24)."""

from __future__ import annotations

import base64
import re
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from builders import CalledCli, Cli, manifest_of, some_bytes
from origin import Fault, Origin

pytestmark = pytest.mark.slow

LOGIN, TOKEN, AWS, PROXY, SIGNATURE, USERINFO, BUNDLE = (
    f"canary{name}{name}" for name in ("login", "token", "aws", "proxy", "signature", "userinfo", "bundle")
)
FILES = {"config.json": b"{}", "w.bin": some_bytes(300_000, 1)}


class World:
    """A hub that wants a login and redirects to signed addresses, and everything that may go wrong around it."""

    def __init__(self, cli: Cli, stack: ExitStack) -> None:
        self.cli, self.shown = cli, ""
        self.hub = stack.enter_context(Origin({f"m/{k}": v for k, v in FILES.items()}, protect={"m/": ("me", LOGIN)}))
        self.cdn = stack.enter_context(Origin(dict(FILES)))
        self.proxy = stack.enter_context(Origin({}))
        with Origin({}) as gone:
            self.refusing = gone.url
        (cli.folder / "netrc").write_text(f"machine 127.0.0.1 login me password {LOGIN}\n")
        (cli.folder / "netrc").chmod(0o600)
        self.environ = {
            "NETRC": str(cli.folder / "netrc"),
            "HF_TOKEN": TOKEN,
            "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
            "AWS_SECRET_ACCESS_KEY": AWS,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL_S3": self.hub.url,
            "MODELSTOW_LOG": str(cli.folder / "events.log"),
            "no_proxy": "127.0.0.1,localhost",
            "http_proxy": f"http://me:{PROXY}@127.0.0.1:{self.proxy.port}",
            "https_proxy": f"http://me:{PROXY}@127.0.0.1:{self.proxy.port}",
        }

    def manifest(self, name: str, source: str, *, mirror: str = "") -> tuple[str, ...]:
        """A manifest with one model from *source*; the options that name it and its lockfile."""
        text = manifest_of(source) + (f'[mirrors]\nurls = ["{mirror}"]\n' if mirror else "")
        (self.cli.folder / f"{name}.toml").write_text(text)
        return "--manifest", f"{name}.toml", "--lock", f"{name}.lock"

    def run(self, *args: str, expect: tuple[int, ...] = (0,), **environ: str) -> str:
        """Run a command in both output modes, tracebacks included; all its output."""
        said = ""
        for way in (("--verbose",), ("--json",)):
            ran = self.cli.run(*args, *way, **{**self.environ, **environ})
            assert ran.code in expect, f"{args} ended with {ran.code}\n{ran.out}\n{ran.err}"
            said += ran.out + ran.err
        self.shown += said
        return said

    def left(self) -> Iterator[tuple[str, bytes]]:
        """Everything that the commands printed and wrote."""
        yield "what was said", self.shown.encode()
        folder = self.cli.folder
        for path in [folder / "events.log", *folder.glob("good*.lock"), *folder.rglob("root/**/*")]:
            yield str(path), str(path).encode() + (path.read_bytes() if path.is_file() else b"")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(CalledCli(tmp_path), stack)


def assert_no_canary(world: World) -> None:
    """Neither as they are nor as they go over the wire."""
    secrets = [LOGIN, TOKEN, AWS, PROXY, SIGNATURE, USERINFO, BUNDLE, "canary"]
    secrets += [base64.b64encode(f"me:{secret}".encode()).decode().rstrip("=") for secret in (LOGIN, PROXY, USERINFO)]
    for where, content in world.left():
        for secret in secrets:
            assert secret.encode() not in content, f"{secret} in {where}: {around(content, secret)}"


def around(content: bytes, secret: str) -> str:
    match = re.search(b".{0,300}" + re.escape(secret.encode()) + b".{0,100}", content, re.DOTALL)
    return match[0].decode(errors="replace") if match else ""


def test_the_main_job_leaves_no_secret(world: World):
    """A login, and signed redirects: lock, plan, reconcile, ensure, verify; the secrets really were used."""
    world.cli = Cli(world.cli.folder)  # in processes of their own, as they are installed
    good = world.manifest("good", f"{world.hub.url}/m")
    world.hub.fail("m/w.bin", Fault(redirect=f"{world.cdn.at('localhost')}/w.bin?X-Amz-Signature={SIGNATURE}", times=-1))

    world.run("lock", *good)
    world.run("plan", *good, MODELSTOW_ROOT=str(world.cli.folder / "other" / "root"))
    world.run("ensure", "m", "--progress", "json", *good, MODELSTOW_ROOT=str(world.cli.folder / "other" / "root"))
    world.run("reconcile", *good)
    world.run("ensure", "--all", "--force", "--progress", "json", *good)
    world.run("verify", "--full", *good)
    world.run("doctor", *good, expect=(0, 1, 2))

    assert any(SIGNATURE in seen.target for seen in world.cdn.gets("w.bin"))
    assert any("Authorization" in seen.headers for seen in world.hub.gets("m/config.json"))
    assert (world.cli.folder / "events.log").stat().st_size > 0
    assert_no_canary(world)


def test_refusals_leave_no_secret(world: World):
    """401, 403, 404, loops, forbidden and refused targets, rate limits: of a source and of its redirect target."""
    good = world.manifest("good", f"{world.hub.url}/m")
    world.run("lock", *good)
    signed = f"?X-Amz-Signature={SIGNATURE}"
    force = ("ensure", "m", "--force", "--progress", "json", *good)

    for status in (401, 403):
        world.hub.behave()
        world.hub.fail("m/w.bin", Fault(status=status, times=-1))
        world.run(*force, expect=(5, 8))
        world.hub.behave()
        world.cdn.behave()
        world.hub.fail("m/w.bin", Fault(redirect=f"{world.cdn.at('localhost')}/w.bin{signed}", times=-1))
        world.cdn.fail("w.bin", Fault(status=status, times=-1))
        said = world.run(*force, expect=(5, 8))
        assert "where it redirects to" in said
    for target in (
        f"{world.hub.url}/m/w.bin{signed}",
        f"file:///etc/passwd{signed}",
        f"http://me:{USERINFO}@127.0.0.1/x{signed}",
        f"http://169.254.169.254/latest{signed}",
        f"http://b\u00fccher.example/{SIGNATURE}",
    ):
        world.hub.behave()
        world.hub.fail("m/w.bin", Fault(redirect=target, times=-1))
        world.run(*force, expect=(5,))

    world.run("lock", *world.manifest("gone", f"{world.refusing}/m"), expect=(5,))
    # What is asked for a listing is asked once, so a refused connection costs no waiting here.
    for name, fault in (
        ("refused", Fault(redirect=f"{world.refusing}/{signed}", times=-1)),
        ("busy", Fault(status=429, times=-1)),
    ):
        world.hub.behave()
        world.hub.fail("m/SHA256SUMS", fault)
        world.run("lock", *world.manifest(name, f"{world.hub.url}/m"), expect=(5,))

    assert_no_canary(world)


def test_proxies_certificates_and_keys_leave_no_secret(world: World):
    """A proxy that refuses, a bad certificate, a bundle that is not there, S3 keys that are wrong."""
    world.proxy.fail("*", Fault(status=407, times=-1))
    for url in ("http://models.example/m", "https://models.example/m"):
        world.run("lock", *world.manifest("proxied", url), expect=(5, 8))
    assert any("Proxy-Authorization" in seen.headers for seen in world.proxy.gets())

    bundle = str(world.cli.folder / f"{BUNDLE}.pem")
    world.run("lock", *world.manifest("bundle", f"{world.hub.url}/m"), expect=(5,), REQUESTS_CA_BUNDLE=bundle)
    if shutil.which("openssl"):
        with Origin({}, tls=self_signed(world.cli.folder)) as bad:
            for host in ("localhost", "127.0.0.1"):
                said = world.run("lock", *world.manifest("tls", f"{bad.at(host)}/m"), expect=(5,))
                assert "certificate is not valid" in said
            world.hub.fail("m/SHA256SUMS", Fault(redirect=f"{bad.at('localhost')}/x?s={SIGNATURE}", times=-1))
            world.run("lock", *world.manifest("led", f"{world.hub.url}/m"), expect=(5,))

    world.hub.fail("bucket", Fault(status=403, times=-1))
    world.run("lock", *world.manifest("keys", "s3://bucket/m"), expect=(5, 8))
    elsewhere = {"AWS_ENDPOINT_URL_S3": world.refusing}
    world.run("lock", *world.manifest("keys", "s3://bucket/m"), expect=(5, 8), **elsewhere)
    world.run(
        "lock", *world.manifest("keys", "s3://bucket/m"), expect=(5, 8), AWS_ENDPOINT_URL_S3=f"http://me:{USERINFO}@x y/"
    )

    assert_no_canary(world)


def test_secrets_in_settings_are_refused_without_being_shown(world: World):
    """Userinfo and signed queries in a manifest, a lockfile, an argument, a mirror."""
    good = world.manifest("good", f"{world.hub.url}/m")
    world.run("lock", *good)
    host = world.hub.url.removeprefix("http://")
    bad = [f"http://me:{USERINFO}@{host}/m", f"http://{host}/m?sig={SIGNATURE}", f"http://me:{USERINFO}/x@{host}/m"]
    for number, source in enumerate(bad):
        if number < 2:
            world.run("lock", *world.manifest("secret", source), expect=(2,))
            world.run("lock", *world.manifest("mirrored", f"{world.hub.url}/m", mirror=source), expect=(2,))
            lock = (world.cli.folder / "good.lock").read_text()
            (world.cli.folder / "secret.lock").write_text(lock.replace(f"{world.hub.url}/m", source))
            world.run("plan", "--lock", "secret.lock", "--manifest", "none.toml", expect=(2,))
            world.run("add", source, "--manifest", "new.toml", expect=(2,))
        world.run("ensure", "m", "--force", *good, expect=(0, 2), MODELSTOW_MIRRORS=source)

    assert_no_canary(world)


def self_signed(folder: Path) -> ssl.SSLContext:
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "self.key")
    subprocess.run(
        ["openssl", "req", "-x509", *key, "-out", "self.pem", "-subj", "/CN=localhost"],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "self.pem", folder / "self.key")
    return context
