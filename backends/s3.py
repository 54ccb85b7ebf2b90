"""``s3://bucket/prefix``: any S3, by boto3 and its own chain of credentials, endpoints and regions.

A version id that a listing found is kept in the locator as ``?versionId=…``: what was locked stays what is fetched.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from .base import Body, Listed, Listing
from .errors import Denied, Misbehaved, NotFound, SourceError, Throttled, TimedOut, Unreachable

if TYPE_CHECKING:
    from botocore.client import BaseClient

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
_DENIED = {
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "AllAccessDisabled",
}
_MISSING = {"NoSuchKey", "NoSuchBucket", "NoSuchVersion", "NotFound"}
_THROTTLED = {"SlowDown", "Throttling", "RequestLimitExceeded", "ServiceUnavailable", "TooManyRequests"}


class S3Source:
    """Objects of buckets. Botocore's retries are off: retrying is decided in one place, and not here."""

    network = True
    page = 1000
    """Keys asked for at once in a listing; S3 gives no more."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        self._environ = os.environ if environ is None else environ
        self._made: BaseClient | None = None
        self._mutex = Lock()

    def open(self, locator: str, *, start: int = 0, stop: int | None = None) -> Body:
        arguments = self._arguments(locator)
        if start or stop is not None:
            arguments["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        answer = self._ask("get_object", locator, arguments)
        span = answer.get("ContentRange", "")
        total = answer["ContentLength"] if not span else int(span.rpartition("/")[2])
        # Some servers send a range with status 200: what it is, Content-Range says.
        begins = int(span.removeprefix("bytes ").partition("-")[0]) if span else 0
        stream = answer["Body"]

        def read_into(view: memoryview) -> int:
            try:
                data = stream.read(len(view))
            except Exception as error:
                raise _translated(error, locator) from error
            view[: len(data)] = data
            return len(data)

        def close() -> None:
            # Closing alone would wait for the read of another thread. botocore does not show what is beneath.
            with suppress(AttributeError, OSError, ValueError, RuntimeError):
                stream._raw_stream.shutdown()
            stream.close()

        return Body(start=begins, total=total, read_into=read_into, close=close)

    def size(self, locator: str) -> int | None:
        size: int = self._ask("head_object", locator, self._arguments(locator))["ContentLength"]
        return size

    def listing(self, locator: str) -> Listing:
        bucket, key, _ = _parts(locator)
        prefix = key.rstrip("/") + "/" if key else ""  # t2v/ is not t2v-other
        keys = list(self._keys(bucket, prefix, locator))
        if not keys:
            raise NotFound("no object is below it", locator=locator, hint="check the bucket and the prefix")
        with ThreadPoolExecutor(8) as pool:
            files = tuple(pool.map(lambda row: self._listed(bucket, prefix, row, locator), keys))
        return Listing(locator=locator, files=files)

    def origin(self, locator: str) -> str:
        return f"s3://{_parts(locator)[0]}"

    def _keys(self, bucket: str, prefix: str, locator: str) -> Iterator[tuple[str, int]]:
        token: dict[str, str] = {}
        while True:
            page = self._ask(
                "list_objects_v2", locator, {"Bucket": bucket, "Prefix": prefix, "MaxKeys": self.page, **token}
            )
            for row in page.get("Contents", ()):
                if not row["Key"].endswith("/"):  # what consoles make for a folder
                    yield row["Key"], row["Size"]
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _listed(self, bucket: str, prefix: str, row: tuple[str, int], locator: str) -> Listed:
        """A row with the sha256 that S3 keeps, where it keeps one of the whole object, and the version."""
        key, size = row
        head = self._ask("head_object", locator, {"Bucket": bucket, "Key": key, "ChecksumMode": "ENABLED"})
        sha256 = None
        checksum = head.get("ChecksumSHA256", "")
        # A composite checksum (of a multipart upload) is not the content's: it ends in -<parts>.
        if checksum and head.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT" and "-" not in checksum:
            import base64

            sha256 = base64.b64decode(checksum).hex()
        version = head.get("VersionId")
        suffix = f"?versionId={quote(version)}" if version and version != "null" else ""
        return Listed(path=key[len(prefix) :], size=size, sha256=sha256, suffix=suffix)

    def _arguments(self, locator: str) -> dict[str, Any]:
        bucket, key, version = _parts(locator)
        return {"Bucket": bucket, "Key": key} | ({"VersionId": version} if version else {})

    def _ask(self, operation: str, locator: str, arguments: Mapping[str, Any]) -> Any:
        try:
            return getattr(self._client(), operation)(**arguments)
        except SourceError:
            raise
        except Exception as error:
            raise _translated(error, locator) from error

    def _client(self) -> BaseClient:
        with self._mutex:
            if self._made is None:
                self._made = self._make()
            return self._made

    def _make(self) -> BaseClient:
        import boto3  # a quarter of a second; only who has an s3:// pays it
        import botocore
        from botocore.config import Config

        anonymous = self._environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "true", "yes")
        config = Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            retries={"total_max_attempts": 1},
            max_pool_connections=64,
            signature_version=botocore.UNSIGNED if anonymous else None,
        )
        endpoint = self._environ.get("AWS_ENDPOINT_URL_S3") or self._environ.get("AWS_ENDPOINT_URL")
        session = boto3.session.Session()
        region = session.region_name or "us-east-1"
        client: BaseClient = session.client("s3", endpoint_url=endpoint, config=config, region_name=region)
        return client


def _parts(locator: str) -> tuple[str, str, str]:
    """Bucket, key and version id of a locator."""
    parts = urlsplit(locator.replace("#", "%23"))
    if not parts.netloc:
        raise SourceError("an s3:// locator names a bucket", locator=locator, hint="write s3://bucket/prefix")
    version = parse_qs(parts.query).get("versionId", [""])[0]
    return parts.netloc, unquote(parts.path.lstrip("/")), version


def _translated(error: Exception, locator: str) -> SourceError:
    from botocore import exceptions as botocore

    if isinstance(error, botocore.NoCredentialsError | botocore.PartialCredentialsError | botocore.TokenRetrievalError):
        hint = "set AWS_PROFILE or AWS_ACCESS_KEY_ID, or AWS_NO_SIGN_REQUEST=1 for a public bucket"
        return Denied("there are no credentials", locator=locator, hint=hint)
    if isinstance(error, botocore.ClientError):
        return _refused(error, locator)
    if isinstance(error, botocore.ReadTimeoutError | botocore.ConnectTimeoutError):
        return TimedOut("the server did not answer in time", locator=locator)
    if isinstance(error, botocore.BotoCoreError | OSError):
        return Unreachable(f"connection failed ({type(error).__name__})", locator=locator)
    return Misbehaved(f"the answer makes no sense ({type(error).__name__})", locator=locator)


def _refused(error: Any, locator: str) -> SourceError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in _DENIED or status in (401, 403):
        hint = "check the credentials (AWS_PROFILE, AWS_ACCESS_KEY_ID) and what they may read"
        return Denied(f"S3 refused ({code or status})", locator=locator, hint=hint)
    if code in _MISSING or status == 404:
        return NotFound(f"S3 has none ({code or status})", locator=locator)
    if code in _THROTTLED or status in (429, 503):
        return Throttled(f"S3 asks to slow down ({code or status})", locator=locator)
    if status >= 500:
        return Unreachable(f"S3 failed ({code or status})", locator=locator)
    return SourceError(f"S3 refused ({code or status})", locator=locator)
