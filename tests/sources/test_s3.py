"""S3 keeps the contract against a real server on loopback, and survives what servers do."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
from builders import PATIENCE_S, Cli, blobs_of, manifest_of, tree_of
from http_responses import MEANINGS, Meaning, assert_simply_ends, refusal_of, status_of
from origin import Fault, Origin, gate_of
from s3servers import SECRET, settings, use

from modelstow.backends import (
    AccessDenied,
    ConnectionFailed,
    NotFound,
    ProtocolError,
    Source,
    SourceError,
    Throttled,
    TimedOut,
)
from modelstow.backends.conformance import TEN, SourceContract
from modelstow.backends.s3 import client as module
from modelstow.backends.s3.client import S3Source

pytestmark = pytest.mark.slow


@pytest.fixture
def credentials(moto: str, monkeypatch: pytest.MonkeyPatch) -> str:
    use(monkeypatch, settings(moto))
    return moto


@pytest.fixture
def client(credentials: str) -> Any:
    return boto3.client("s3", endpoint_url=credentials)


@pytest.fixture
def origin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Origin]:
    """A server that answers GET and HEAD as S3 does, and misbehaves on request. It does not look at signatures."""
    with Origin({f"models/m/{name}": data for name, data in SourceContract.OBJECTS.items()}) as served:
        use(monkeypatch, settings(served.url))
        yield served


def read(source: Source, locator: str, start: int = 0, stop: int | None = None) -> tuple[int, bool, bytes]:
    """Where the body begins, whether it kept to the range, and its bytes."""
    body, data, view = source.open(locator, start=start, stop=stop), bytearray(), memoryview(bytearray(1 << 20))
    try:
        while count := body.read_into(view):
            data += view[:count]
    finally:
        body.close()
    return body.start, body.ranged, bytes(data)


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
    source.page_size = 3

    assert len(source.listing("s3://many/m/").files) == 7


# ---- what a listing knows


def test_lock_downloads_nothing_and_pins_what_it_saw(client: Any, cli: Cli):
    """From checksum to lockfile; reconcile then fetches the very version, though the key has another content by now."""
    client.create_bucket(Bucket="pinned")
    client.put_bucket_versioning(Bucket="pinned", VersioningConfiguration={"Status": "Enabled"})
    client.put_object(Bucket="pinned", Key="m/ten", Body=TEN, ChecksumAlgorithm="SHA256")
    environ = settings(client.meta.endpoint_url)
    (cli.folder / "models.toml").write_text(manifest_of("s3://pinned/m"))

    cli.ok("lock", **environ)
    assert not blobs_of(cli.root)
    client.put_object(Bucket="pinned", Key="m/ten", Body=TEN[::-1], ChecksumAlgorithm="SHA256")
    done = cli.ok("reconcile", "--json", **environ).json

    assert tree_of(Path(done["trees"][0]["path"])) == {"ten": TEN}


def test_a_checksum_of_parts_is_not_the_contents(client: Any):
    """A multipart upload's sha256 is of its parts' checksums; taking it would lock a name that no bytes have."""
    client.create_bucket(Bucket="parts")
    upload = client.create_multipart_upload(Bucket="parts", Key="m/a", ChecksumAlgorithm="SHA256")["UploadId"]
    part = client.upload_part(
        Bucket="parts", Key="m/a", UploadId=upload, PartNumber=1, Body=TEN, ChecksumAlgorithm="SHA256"
    )
    rows = [{"PartNumber": 1, "ETag": part["ETag"], "ChecksumSHA256": part["ChecksumSHA256"]}]
    client.complete_multipart_upload(Bucket="parts", Key="m/a", UploadId=upload, MultipartUpload={"Parts": rows})

    [listed] = S3Source().listing("s3://parts/m").files

    assert (listed.sha256, listed.size) == (None, 10)


@pytest.mark.parametrize(
    ("head", "known"),
    [
        ({"ChecksumType": "FULL_OBJECT"}, True),
        ({"ETag": '"8b1a9953c4611296a827abf8c47804d7"'}, True),  # servers from before there were types
        ({"ETag": '"8b1a9953c4611296a827abf8c47804d7-3"'}, False),
        ({}, False),
        ({"ChecksumType": "COMPOSITE"}, False),
    ],
)
def test_only_a_checksum_of_the_full_object_is_a_digest(head: dict[str, str], known: bool):
    """Whatever cannot be the sha256 of the content is passed over, never guessed at."""
    digest = hashlib.sha256(TEN)
    text = b64encode(digest.digest()).decode()

    assert module._sha256({**head, "ChecksumSHA256": text}) == (digest.hexdigest() if known else None)
    assert module._sha256({**head, "ChecksumSHA256": f"{text}-3"}) is None
    assert module._sha256({**head, "ChecksumSHA256": "AAAA"}) is None
    assert module._sha256(head) is None


def test_names_are_keys_as_they_are(client: Any):
    """As with the `aws s3` command, nothing in a locator is quoted: what resembles an escape is part of the name."""
    client.create_bucket(Bucket="names")
    keys = ["m 1/a%20b.bin", "m 1/a#b.bin", "m 1/a+b&c=d.bin", "m 1/é/ü.bin"]
    for key in keys:
        client.put_object(Bucket="names", Key=key, Body=key.encode())
    source = S3Source()

    for listed in source.listing("s3://names/m 1").files:
        assert read(source, f"s3://names/m 1/{listed.path}")[2] == f"m 1/{listed.path}".encode()
        keys.remove(f"m 1/{listed.path}")
    assert not keys


def test_a_whole_bucket_can_be_listed(client: Any):
    """With or without the slash."""
    client.create_bucket(Bucket="whole")
    client.put_object(Bucket="whole", Key="a/b", Body=b"x")

    for locator in ("s3://whole", "s3://whole/"):
        assert [listed.path for listed in S3Source().listing(locator).files] == ["a/b"]


def test_what_is_stored_is_the_object_whatever_encoding_its_owner_named(client: Any):
    """A Content-Encoding is the owner's remark: its bytes are neither decoded nor refused."""
    client.create_bucket(Bucket="encoded")
    client.put_object(Bucket="encoded", Key="a", Body=TEN, ContentEncoding="gzip")

    assert read(S3Source(), "s3://encoded/a") == (0, True, TEN)
    assert read(S3Source(), "s3://encoded/a", 3, 5) == (3, True, b"34")


# ---- what servers do


def test_an_ignored_range_is_recognised_by_the_start(origin: Origin):
    """200 with everything begins at 0, and the body extends to the end (N4)."""
    origin.fail("models/m/ten", Fault(ignore_range=True))

    assert read(S3Source(), "s3://models/m/ten", 4, 6) == (0, False, TEN)


def test_a_wrong_content_range_is_not_believed(origin: Origin):
    """The whole is asked for instead (N5)."""
    origin.fail("models/m/ten", Fault(wrong_range=True))

    assert read(S3Source(), "s3://models/m/ten", 4) == (0, False, TEN)
    assert [seen.range for seen in origin.gets("models/m/ten")] == ["bytes=4-", None]


def test_a_range_with_status_200_is_a_range(origin: Origin):
    """rclone's server sends one; Content-Range decides, not the status (N6)."""
    origin.fail("models/m/ten", Fault(range_status=200))

    assert read(S3Source(), "s3://models/m/ten", 4, 6) == (4, True, b"45")


@pytest.mark.parametrize("served", ["client", "origin"])
def test_a_range_beyond_the_end_gives_the_whole_for_comparison(request: pytest.FixtureRequest, served: str):
    """416 means that the object is another: the reader sees its length (N8). With S3's explanation, and with none."""
    found = request.getfixturevalue(served)
    if served == "client":
        found.create_bucket(Bucket="models")
        found.put_object(Bucket="models", Key="m/ten", Body=TEN)

    body = S3Source().open("s3://models/m/ten", start=50, stop=60)
    body.close()

    assert (body.start, body.total, body.ranged) == (0, 10, False)


def test_a_body_that_ends_early_simply_ends(origin: Origin):
    """No check of botocore's is in between."""
    assert_simply_ends(S3Source(), "s3://models/m/ten", origin, "models/m/ten")


@pytest.mark.usefixtures("endless_reads")
def test_closing_ends_a_read_that_waits(origin: Origin):
    """From another thread, at once: a reader never hangs on a server that says nothing."""
    gate = gate_of(origin, "models/m/deep/er/big.bin", after=1000)
    body, view = S3Source().open("s3://models/m/deep/er/big.bin"), memoryview(bytearray(1 << 20))

    def to_the_end() -> int:
        count = 0
        try:
            while more := body.read_into(view):
                count += more
        except SourceError:
            pass
        return count

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(to_the_end)
        assert origin.reached.wait(PATIENCE_S)
        body.close()
        assert reading.result(PATIENCE_S) <= 1000
    gate.set()


def test_a_body_read_to_its_end_gives_its_connection_back(origin: Origin):
    """A hundred small files do not take a hundred connections."""
    source = S3Source()
    for _ in range(5):
        assert read(source, "s3://models/m/ten")[2] == TEN

    pool = source._client()._endpoint.http_session._manager.connection_from_url(origin.url)
    assert pool.num_connections == 1


@pytest.mark.parametrize("meaning", [*MEANINGS, (501, SourceError, False), (504, TimedOut, True)], ids=status_of)
def test_statuses_are_distinguished(origin: Origin, meaning: Meaning):
    """Permanent or worth asking again."""
    error = refusal_of(S3Source(), "s3://models/m/ten", origin, "models/m/ten", meaning)

    assert error.retry_after == (7.0 if meaning[0] in (429, 500, 503) else None)


@pytest.mark.parametrize("page", [b"<html><body>Welcome</body>", b"<html></html>", b"welcome"])
def test_a_listing_that_is_none_lists_nothing(origin: Origin, page: bytes):
    """A web server's page is no answer of S3."""
    origin.objects["models"] = page

    with pytest.raises(SourceError):
        S3Source().listing("s3://models/m")


@pytest.mark.parametrize("more", ["", "<NextContinuationToken>same</NextContinuationToken>"])
def test_a_listing_that_never_ends_is_ended(origin: Origin, more: str):
    """A page that is followed by itself would be read forever."""
    row = "<Contents><Key>m/a</Key><Size>1</Size></Contents>"
    page = f"<ListBucketResult><IsTruncated>true</IsTruncated>{more}{row}</ListBucketResult>"
    origin.objects["models"] = page.encode()

    with pytest.raises(ProtocolError, match="is truncated"):
        S3Source().listing("s3://models/m")


def test_keys_beyond_the_prefix_are_passed_over(origin: Origin):
    """A server that does not know prefixes lists everything; the rest is not ours."""
    rows = "".join(f"<Contents><Key>{key}</Key><Size>1</Size></Contents>" for key in ("m/a", "m-other/b", "c"))
    origin.objects |= {"models": f"<ListBucketResult>{rows}</ListBucketResult>".encode(), "models/m/a": b"x"}

    assert [listed.path for listed in S3Source().listing("s3://models/m").files] == ["a"]


def test_a_listing_is_whole_or_fails(origin: Origin):
    """A server that is busy for a moment must not make lock download what has a checksum."""
    rows = "<Contents><Key>m/a</Key><Size>1</Size></Contents>"
    origin.objects |= {"models": f"<ListBucketResult>{rows}</ListBucketResult>".encode(), "models/m/a": b"x"}
    origin.fail("models/m/a", Fault(status=503))

    with pytest.raises(Throttled):
        S3Source().listing("s3://models/m")


# ---- endpoints, credentials, errors


def test_an_endpoint_is_asked_by_path(origin: Origin, monkeypatch: pytest.MonkeyPatch):
    """`models.minio.local` would not resolve; the general variable names an endpoint as well."""
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://localhost:{origin.port}")

    assert read(S3Source(), "s3://models/m/ten")[2] == TEN
    assert origin.gets()[0].headers["Host"] == f"localhost:{origin.port}"


def test_a_profile_names_keys_and_endpoint(origin: Origin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """AWS_PROFILE, with files where the environment says they are."""
    (tmp_path / "config").write_text(f"[profile lab]\nregion = eu-west-3\nendpoint_url = {origin.url}\n")
    (tmp_path / "keys").write_text(f"[lab]\naws_access_key_id = LABKEY\naws_secret_access_key = {SECRET}\n")
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("AWS_PROFILE", "lab")

    assert read(S3Source(), "s3://models/m/ten")[2] == TEN
    assert "Credential=LABKEY/" in (signed := origin.gets()[0].headers["Authorization"]) and "/eu-west-3/s3/" in signed


@pytest.mark.parametrize("how", ["no keys at all", "AWS_NO_SIGN_REQUEST"])
def test_a_public_bucket_is_read_without_a_signature(client: Any, monkeypatch: pytest.MonkeyPatch, moto: str, how: str):
    """Automatically without any credentials; with some, by the switch."""
    if "public" not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket="public", ACL="public-read")
        client.put_object(Bucket="public", Key="m/ten", Body=TEN, ACL="public-read")
        client.put_object(Bucket="public", Key="m/own", Body=TEN, ACL="private")
    if how == "AWS_NO_SIGN_REQUEST":
        monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "1")
    else:
        use(monkeypatch, settings(moto, key="", secret=""))
    source = S3Source()

    assert {listed.path for listed in source.listing("s3://public/m/").files} == {"ten", "own"}
    assert read(source, "s3://public/m/ten")[2] == TEN
    for ask in (source.open, source.size):
        with pytest.raises(AccessDenied, match="without credentials") as caught:
            ask("s3://public/m/own")
        assert ("AWS_NO_SIGN_REQUEST" if how == "AWS_NO_SIGN_REQUEST" else "AWS_PROFILE") in caught.value.hint


def _half(variables: dict[str, str]) -> None:
    del variables["AWS_SECRET_ACCESS_KEY"]


def _no_profile(variables: dict[str, str]) -> None:
    variables["AWS_PROFILE"] = "nobody"


@pytest.mark.parametrize(("spoil", "said"), [(_half, "AWS_SECRET_ACCESS_KEY"), (_no_profile, "nobody")])
def test_credentials_that_cannot_be_used_are_a_refusal(
    origin: Origin, monkeypatch: pytest.MonkeyPatch, spoil: Any, said: str
):
    """Half a pair, or a profile that is not there: permanent, and no unsigned request is made instead."""
    variables = settings(origin.url)
    spoil(variables)
    use(monkeypatch, variables)

    for ask in (S3Source().open, S3Source().size, S3Source().listing):
        with pytest.raises(AccessDenied, match=said) as caught:
            ask("s3://models/m/ten")
        assert caught.value.hint and not caught.value.transient
    assert not origin.requests


@pytest.mark.parametrize(("set_to", "seconds"), [(None, module.METADATA_TIMEOUT_S), ("3", 3)])
def test_an_instance_that_is_none_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, set_to: str | None, seconds: float):
    """boto3 would wait two seconds for the metadata service of a cloud; who sets another time gets it."""
    use(monkeypatch, {"AWS_METADATA_SERVICE_TIMEOUT": set_to} if set_to else {})

    assert module._session()._session.get_config_variable("metadata_service_timeout") == seconds


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("ExpiredToken", 400),
        ("InvalidToken", 400),
        ("TokenRefreshRequired", 400),
        ("AuthorizationHeaderMalformed", 400),
        ("RequestTimeTooSkewed", 403),
        ("RequestExpired", 400),
        ("SomethingNew", 403),
        ("", 401),
    ],
)
def test_every_kind_of_refusal_is_denied(code: str, status: int):
    """Some come with status 400: the code decides."""
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}

    error = module._response_error(answer, "s3://models/m/ten", "")

    assert isinstance(error, AccessDenied) and error.code == "AUTH_FAIL" and error.hint


def test_what_is_missing_is_distinguished_from_what_may_not_be_read(credentials: str, monkeypatch: pytest.MonkeyPatch):
    """No bucket: not found. Connection refused: worth retrying. No bucket in the locator: permanent."""
    with pytest.raises(NotFound):
        S3Source().listing("s3://no-such-bucket/m")
    with pytest.raises(SourceError, match="names a bucket"):
        S3Source().open("s3:///m/ten")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    with pytest.raises(ConnectionFailed) as caught:
        S3Source().open("s3://models/m/ten")
    assert SECRET not in str(caught.value)


def test_bodies_are_read_by_the_fast_way(origin: Origin):
    """botocore still keeps urllib3's response below its stream, and http.client's below that; if not, this test fails."""
    answer = S3Source()._client().get_object(Bucket="models", Key="m/ten")

    assert callable(answer["Body"]._raw_stream._fp.readinto)
    answer["Body"].close()


def test_a_bucket_is_named_in_any_case_of_the_scheme():
    """As it may be typed behind `push`; the registry knows it so too."""
    assert module._parts("S3://bucket/a/key") == module._parts("s3://bucket/a/key") == ("bucket", "a/key", "")
