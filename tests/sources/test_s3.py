"""S3 keeps the contract against a real server on loopback that checks signatures."""

from __future__ import annotations

import hashlib
import os
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from origin import Origin, gate_of

from backends import Denied, NotFound, Source, Unreachable
from backends.conformance import SourceContract
from backends.s3 import S3Source


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture
def credentials(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An environment in which boto3 finds keys and the endpoint by itself, and nothing of this machine."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return server


@pytest.fixture
def client(credentials: str) -> Any:
    return boto3.client("s3", endpoint_url=credentials)


class TestS3(SourceContract):
    @pytest.fixture(autouse=True)
    def serve(self, client: Any) -> None:
        client.create_bucket(Bucket="models")
        for name, data in self.OBJECTS.items():
            client.put_object(Bucket="models", Key=f"m/{name}", Body=data)
        client.put_object(Bucket="models", Key="m-other/x", Body=b"not below m/")
        client.put_object(Bucket="models", Key="m/folder/", Body=b"")

    def folder(self) -> str:
        return "s3://models/m"

    def make(self) -> Source:
        return S3Source()


def test_a_checksum_of_the_whole_object_is_taken_and_nothing_is_downloaded(client: Any):
    """S3 keeps ChecksumSHA256 where the upload asked for it."""
    client.create_bucket(Bucket="sums")
    data = b"weights"
    digest = hashlib.sha256(data)
    client.put_object(
        Bucket="sums", Key="m/a", Body=data, ChecksumAlgorithm="SHA256", ChecksumSHA256=b64encode(digest.digest()).decode()
    )
    client.put_object(Bucket="sums", Key="m/b", Body=data, ChecksumAlgorithm="CRC32")

    files = {f.path: f.sha256 for f in S3Source().listing("s3://sums/m").files}

    assert files == {"a": digest.hexdigest(), "b": None}


def test_a_listed_version_stays_what_is_fetched(client: Any):
    """The locator carries the version id; a later upload under the same key does not change it."""
    client.create_bucket(Bucket="versions")
    client.put_bucket_versioning(Bucket="versions", VersioningConfiguration={"Status": "Enabled"})
    client.put_object(Bucket="versions", Key="m/a", Body=b"first")
    [listed] = S3Source().listing("s3://versions/m").files
    client.put_object(Bucket="versions", Key="m/a", Body=b"second!")

    body, view = S3Source().open(f"s3://versions/m/a{listed.suffix}"), memoryview(bytearray(10))

    assert bytes(view[: body.read_into(view)]) == b"first"


def test_a_long_listing_is_read_page_by_page(client: Any):
    """More keys than a page holds come in several answers."""
    client.create_bucket(Bucket="many")
    for number in range(7):
        client.put_object(Bucket="many", Key=f"m/{number:04}", Body=b"")
    source = S3Source()
    source.page = 3

    assert len(source.listing("s3://many/m/").files) == 7


def test_what_is_not_there_is_told_apart_from_what_may_not_be_read(credentials: str, monkeypatch: pytest.MonkeyPatch):
    """No bucket: not found. No credentials: denied. Nobody listening: worth asking again."""
    with pytest.raises(NotFound):
        S3Source().listing("s3://no-such-bucket/m")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(Denied, match="no credentials"):
        S3Source().open("s3://models/m/ten")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    with pytest.raises(Unreachable) as caught:
        S3Source().open("s3://models/m/ten")
    assert "canary" not in str(caught.value)


def test_closing_from_another_thread_ends_a_read_that_waits(credentials: str, monkeypatch: pytest.MonkeyPatch):
    """A server that stalls holds nobody up."""
    with Origin({"models/ten": b"0123456789"}) as origin:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", origin.url)
        gate_of(origin, "models/ten", after=5)
        body = S3Source().open("s3://models/ten")
        assert body.read_into(memoryview(bytearray(5))) == 5
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(body.read_into, memoryview(bytearray(5)))
            assert origin.reached.wait(10)
            with pytest.raises(TimeoutError):
                waiting.exception(0.1)  # it is in the middle of it
            body.close()
            assert waiting.exception(10) is not None or waiting.result() == 0
